"""ZeRO checkpoints in DeepSpeed's layout, written here; `oracles/test_zero.py` has those of DeepSpeed itself."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from torchparams.errors import FileFormatError, TorchParamsError, UnknownName
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TAG = "global_step7"
STAGES = (1, 2, 3)
WORLDS = (1, 2, 3, 4)


def weights() -> dict[str, torch.Tensor]:
    """The float32 weights of a model: two groups, of sizes that no world size divides."""
    made = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (11, 7), "fc.weight": (5, 3), "scale": (), "fc.bias": (5,), "norm.weight": (7,)}
    return {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}


GROUPS = (("embed.weight", "fc.weight", "scale"), ("fc.bias", "norm.weight"))


def padded(flat: torch.Tensor, unit: int) -> torch.Tensor:
    return torch.cat([flat, torch.full((-len(flat) % unit,), 9e9, dtype=flat.dtype)])


def partitions(stage: int, world: int, values: dict[str, torch.Tensor], padding: int = 0) -> list[list[torch.Tensor]]:
    """For each rank, the flat tensor of each group."""
    found: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for group in GROUPS:
        if stage == 3:
            parts = [padded(values[name].reshape(-1), world).chunk(world) for name in group]
            for rank in range(world):
                found[rank].append(torch.cat([part[rank] for part in parts]))
            continue
        flat = torch.cat([torch.cat([values[name].reshape(-1), torch.full((padding,), 8e8)]) for name in group])
        size = len(padded(flat, 2 * world)) // world
        for rank in range(world):  # padding at the end is not stored
            found[rank].append(flat[rank * size : (rank + 1) * size].clone())
    return found


def write(folder: Path, stage: int, world: int, prefix: str = "", padding: int = 0) -> Path:
    """A checkpoint of ZeRO."""
    values = weights()
    moments = {name: value * 2 for name, value in values.items()}
    frozen = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    tag = folder / TAG
    tag.mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    (folder / "zero_to_fp32.py").write_text("raise SystemExit")
    whole = {name: value.bfloat16() if stage < 3 else torch.zeros(0) for name, value in values.items()}
    for rank in range(world if stage == 3 else 1):
        fragment = padded(frozen.reshape(-1), world).chunk(world)[rank] if stage == 3 else frozen
        torch.save(
            {
                "module": {
                    "table": torch.ones(3, dtype=torch.bfloat16),
                    "count": torch.arange(4),
                    **whole,
                    "frozen": frozen if stage < 3 else torch.zeros(0, dtype=torch.bfloat16),
                    "head.weight": whole["embed.weight"],
                },
                "buffer_names": ["table", "count"],
                "param_shapes": [OrderedDict((name, values[name].shape) for name in group) for group in GROUPS],
                "frozen_param_shapes": OrderedDict(frozen=frozen.shape),
                "frozen_param_fragments": OrderedDict(frozen=fragment.clone()),
                "shared_params": {"head.weight": "embed.weight"},
                "global_steps": 7,
            },
            tag / (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"),
        )
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    held = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    parts, states = partitions(stage, world, values, padding), partitions(stage, world, moments, padding)
    for rank in range(world):
        state = {
            number: {"exp_avg": padded(states[rank][number], 2), "step": torch.tensor(7.0)}
            for number in range(len(GROUPS))
        }
        optimizer: dict[str, Any] = {
            "zero_stage": stage,
            "partition_count": world if stage == 3 else [world] * len(GROUPS),
            key: parts[rank],
            held: {"state": state, "param_groups": [{"lr": 0.1}, {"lr": 0.2}]},
        }
        if padding:
            optimizer["param_alignment_paddings"] = [[padding] * len(group) for group in GROUPS]
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, tag / name)
    return folder


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_weights_and_moments(tmp_path: Path, stage: int, world: int) -> None:
    folder = write(tmp_path / "run", stage, world, "bf16_" if world == 2 else "")
    params = tp.of(folder)
    assert params.source.format == f"ZeRO stage {stage}"
    for name, value in weights().items():
        np.testing.assert_array_equal(params.numpy(name), value.numpy())
    assert params.infos["embed.weight"].aliases == ("head.weight",)
    assert params.numpy("table").tolist() == [1, 1, 1]
    assert {str(params.infos[name].dtype) for name in ("table", "count", "frozen")} == {"float32", "int64", "bfloat16"}
    assert params.numpy("frozen").astype(float).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert params.metadata["global_steps"] == 7
    assert tp.digest(folder / TAG).digest == tp.digest(folder).digest
    state = tp.of(f"{folder}#optimizer")
    assert set(state.names) == {f"{name}.{key}" for name in weights() for key in ("exp_avg", "step")}
    for name, value in weights().items():
        np.testing.assert_array_equal(state.numpy(f"{name}.exp_avg"), value.numpy() * 2)
        assert state.numpy(f"{name}.step") == 7
    assert state.metadata["param_groups"] == [{"lr": 0.1}, {"lr": 0.2}]
    assert tp.of(f"{folder}#optimizer.fc").names == ["weight.exp_avg", "weight.step", "bias.exp_avg", "bias.step"]


def test_the_listing(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 2, 2)
    text = str(tp.ls(folder)).replace(f"{tmp_path}/", "")
    assert text.startswith("run (ZeRO stage 2)\nname ")
    assert "embed.weight = head.weight  [11, 7]  float32" in text
    assert "parts that can be listed separately: run#optimizer\n" in text


def test_padding_after_each_parameter(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 2, 2, padding=3)
    for name, value in weights().items():
        np.testing.assert_array_equal(tp.of(folder).numpy(name), value.numpy())


def test_a_partition_is_copied_by_the_kernel(tmp_path: Path) -> None:
    plan = tp.convert(write(tmp_path / "run", 2, 2), tmp_path / "out.safetensors", "fc.weight | embed.weight")
    assert plan.copied == plan.nbytes == 4 * (77 + 77 + 15)  # the tied name too
    plan.run()
    assert np.array_equal(tp.of(tmp_path / "out.safetensors").numpy("fc.weight"), weights()["fc.weight"].numpy())


def test_rows_are_sent_to_other_processes(tmp_path: Path) -> None:
    params = tp.of(write(tmp_path / "run", 3, 2))
    rows = pickle.loads(pickle.dumps([params.source.row(name) for name in params.names]))
    assert [row.shape for row in rows] == [params.infos[name].shape for name in params.names]
    assert tp.digest(pickle.loads(pickle.dumps(params.source))).digest == tp.digest(params).digest


def test_below_a_trainer_that_gathered_the_weights(tmp_path: Path) -> None:
    """A whole model beside the folder of DeepSpeed is what the directory is; the moments are in that folder."""
    folder = write(tmp_path / "run", 2, 2)
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"w": np.ones(3, np.float32)}))
    assert tp.of(folder).names == ["w"]
    assert "fc.weight.exp_avg" in tp.of(f"{folder}#optimizer").names


# --- what is wrong ---------------------------------------------------------------------------


def message(folder: Path, error: type[TorchParamsError] = FileFormatError) -> str:
    """The one line that the directory is refused with."""
    with pytest.raises(error) as caught:
        tp.of(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{folder}/", "").replace(f"{folder}: ", "").replace(f"{TAG}/", "").removeprefix(f"{TAG}: ")


def changed(path: Path, change: Callable[[Any], None]) -> None:
    state = torch.load(path)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("text", ["../other", "/etc", "a/b", "..", "", "a\nb", "x" * 300])
def test_latest_names_a_tag_and_no_path(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "run", 2, 1)
    (folder / "latest").write_text(text)
    assert message(folder).startswith("latest: It names the tag ")
    assert f"which is not in the directory. There are {TAG}." in message(folder)


def test_latest_names_a_tag_that_is_not_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 2, 1)
    (folder / "latest").write_text("global_step8\n")
    assert message(folder) == (
        f"latest: It names the tag 'global_step8', which is not in the directory. There are {TAG}. Choose one: {TAG}."
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank(tmp_path: Path, stage: int) -> None:
    folder = write(tmp_path / "run", stage, 4)
    (folder / TAG / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    assert message(folder) == (
        "There are the partitions of 3 ranks, and zero_pp_rank_0_mp_rank_00_optim_states.pt is one of 4. "
        "Missing is rank 2. Copy the files of all ranks."
    )


def test_a_missing_file_of_a_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 3, 4)
    (folder / TAG / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert message(folder) == "It lacks 1 file *_model_states.pt: that of rank 1. Copy the files of all ranks."
    folder = write(tmp_path / "other", 1, 2)
    (folder / TAG / "mp_rank_00_model_states.pt").unlink()
    assert message(folder) == "It lacks 1 file *_model_states.pt: that of rank 0. Copy the files of all ranks."


def optim(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def set_state(key: str, value: Any) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        state["optimizer_state_dict"][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_state("partition_count", 3), "There are the partitions of 2 ranks, and"),
        (set_state("partition_count", [2, 4]), f"{optim(0)}: Its groups are split over different numbers of ranks"),
        (set_state("partition_count", None), f"{optim(0)}: Its partition_count is None"),
        (set_state("partition_count", [10**9]), f"{optim(0)}: Its partition_count is a list of 1 item"),
        (set_state("zero_stage", 5), f"{optim(0)}: Its zero_stage is 5, not 1, 2 or 3"),
        (set_state("zero_stage", 1), f"{optim(1)}: It is of stage 2 and 2 ranks, and {optim(0)} of 1 and 2"),
        (set_state("single_partition_of_fp32_groups", []), f"{optim(0)}: Its optimizer has a state 0, and there are 0"),
        (set_state("single_partition_of_fp32_groups", 7), f"{optim(0)}: Its single_partition_of_fp32_groups is 7"),
        (
            set_state("single_partition_of_fp32_groups", [torch.zeros(3), torch.zeros(6)]),
            "mp_rank_00_model_states.pt: The shapes of group 0 take 93 elements, but the partitions of 2 ranks hold 48",
        ),
        (set_state("param_alignment_paddings", [[1], [2]]), f"{optim(0)}: Its param_alignment_paddings give group 0 a"),
        (
            set_state("base_optimizer_state", {"state": {9: {}}}),
            f"{optim(0)}: Its optimizer has a state 9, and there are 2 groups",
        ),
        (lambda state: state.pop("optimizer_state_dict"), f"{optim(0)}: Its optimizer_state_dict is None, not a dict"),
    ],
)  # fmt: skip
def test_what_a_rank_says_is_checked(tmp_path: Path, change: Callable[[Any], None], said: str) -> None:
    folder = write(tmp_path / "run", 2, 2)
    changed(folder / TAG / optim(0), change)
    assert message(folder).startswith(said)


def set_model(key: str, value: Any) -> Callable[[Any], None]:
    return lambda state: state.update({key: value})


MODEL = "mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_model("param_shapes", [{"a": (200,)}, {"b": (2,)}]), f"{MODEL}: The shapes of group 0 take 200 elements"),
        (set_model("param_shapes", [{"a": (93,)}]), f"{optim(0)}: It has 2 groups, and {MODEL} the shapes of 1"),
        (set_model("param_shapes", [{"a": (-3,)}, {}]), f"{MODEL}: Its param_shapes give 'a' the shape a tuple"),
        (set_model("param_shapes", [{"a": (93,)}, {"a": (12,)}]), f"{MODEL}: It has the shape of 'a' twice"),
        (set_model("param_shapes", [{"fc.bias": (93,)}, {}]), f"{MODEL}: 'fc.bias' has the shape [5] in its module"),
        (set_model("param_shapes", 3), f"{MODEL}: Its param_shapes is 3, not a dict"),
        (set_model("frozen_param_fragments", {}), f"{MODEL}: It has the shape of the frozen 'frozen', but no"),
        (set_model("frozen_param_shapes", {"frozen": (9, 9)}), f"{MODEL}: The frozen 'frozen' has the shape [9, 9]"),
        (set_model("module", None), f"{MODEL}: Its module is None, not a dict"),
        (lambda state: state.pop("param_shapes"), f"{MODEL}: It lacks the shapes of the parameters (param_shapes)"),
    ],
)  # fmt: skip
def test_what_the_model_says_is_checked(tmp_path: Path, change: Callable[[Any], None], said: str) -> None:
    folder = write(tmp_path / "run", 2, 2)
    changed(folder / TAG / MODEL, change)
    assert message(folder, TorchParamsError).startswith(said)


def test_partitions_of_another_size_in_stage_3(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 3, 2)
    changed(folder / TAG / optim(1), set_state("fp32_flat_groups", [torch.zeros(3), torch.zeros(6)]))
    assert message(folder) == f"{optim(1)}: Its partitions hold 9 elements, and by the shapes there are 55"


def test_moments_that_are_too_short(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 2, 2)
    changed(folder / TAG / optim(1), lambda state: state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
            .update(exp_avg=torch.zeros(5)))  # fmt: skip
    with pytest.raises(FileFormatError, match=r"exp_avg of group 0 has 5 elements, and the group 45"):
        tp.of(f"{folder}#optimizer")
    assert tp.of(folder).names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "belongs to a second model-parallel rank, but no file records"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "It has experts in separate files"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "are both of rank 0"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, name: str, said: str) -> None:
    folder = write(tmp_path / "run", 2, 2)
    (folder / TAG / name).write_bytes((folder / TAG / optim(0)).read_bytes())
    assert said in message(folder)


def test_a_state_of_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 2, 1)
    changed(folder / TAG / optim(0), set_state("base_optimizer_state", None))
    with pytest.raises(UnknownName, match="It has no optimizer state"):
        tp.of(f"{folder}#optimizer")
