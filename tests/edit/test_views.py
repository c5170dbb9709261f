"""Plans as sources: measurements before writing equal those of the file."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from torchparams.engines import ThreadEngine
from torchparams.errors import NotReadable, PlanError
from torchparams.testing import MemorySource, safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": [0.25, 0.75]},
    "average": {},
    "slerp": {"weights": 0.3},
    "task_arithmetic": {"weights": [0.5, 0.7], "base": 0},
    "ties": {"density": 0.4, "base": 0},
    "dare": {"density": 0.4, "seed": 3, "base": 0},
    "dare_ties": {"density": 0.4, "seed": 3, "base": 0},
}


def finite(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        made: np.ndarray[Any, Any] = np.nan_to_num(array.astype(np.float32) % 7).astype(array.dtype)
    return made


def checkpoint(folder: Path, number: int, dtype: str = "float32") -> str:
    path = folder / f"{number}.safetensors"
    arrays = {
        "a.weight": sample(dtype, (70, 50), seed=3 * number),
        "a.bias": sample(dtype, (7,), seed=3 * number + 1),
        "step": np.array([5], np.int64),
    }
    if dtype in ("float32", "float16", "bfloat16"):  # sums of samples that reach the type's end would overflow
        for name in ("a.weight", "a.bias"):
            arrays[name] = finite(arrays[name])
    path.write_bytes(safetensors_bytes(arrays))
    return str(path)


def agree(plan: Any) -> None:
    """Digest and statistics of a plan are those of the file that it writes."""
    digest, stats = tp.digest(plan).digest, tp.stats(plan)
    plan.run()
    assert tp.digest(plan.path).digest == digest
    assert [row.to_json() for row in tp.stats(plan.path)] == [row.to_json() for row in stats]
    assert tp.diff(plan, plan.path).same


@pytest.mark.parametrize("target", ["m.safetensors", "m.pt", "m/"])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_measured_before_it_is_written(method: str, target: str, tmp_path: Path) -> None:
    base, a, b = (checkpoint(tmp_path, number, "bfloat16") for number in range(3))
    options: dict[str, Any] = {key: base if key == "base" else value for key, value in METHODS[method].items()}
    agree(tp.merge([a, b], tmp_path / target, method=method, **options))


@pytest.mark.parametrize("dtype", ["f64", "f16", "bf16", "float8_e4m3fn"])
def test_a_cast_is_measured_before_it_is_written(dtype: str, tmp_path: Path) -> None:
    agree(tp.convert(checkpoint(tmp_path, 1), tmp_path / "m.safetensors", dtype=dtype, allow_overflow=True))


def test_shards_and_parts(tmp_path: Path) -> None:
    agree(tp.convert(checkpoint(tmp_path, 1), tmp_path / "m", max_shard_size=8192))
    agree(tp.convert(checkpoint(tmp_path, 1), tmp_path / "p.pt", "a.**", strip_prefix="a."))


def test_tied_tensors_and_views_of_a_torch_file(tmp_path: Path) -> None:
    memory = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"w": memory, "tied": memory, "part": memory[1:3], "transposed": memory.T, "every second": memory[:, ::2]}
    torch.save(state, tmp_path / "s.pt")
    for dtype in (None, "bf16"):
        plan = tp.convert(tmp_path / "s.pt", tmp_path / f"m{dtype}.pt", dtype=dtype)
        assert tp.of(plan).info("w").aliases == ("tied",)
        agree(plan)
    for name, tensor in state.items():
        assert torch.equal(tp.of(tp.convert(tmp_path / "s.pt"))[name], tensor), name


def test_a_fold_and_a_delta_are_measured_before_they_are_written(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    tp.delta(b, a, tmp_path / "d.safetensors").run()
    view = tp.apply_delta(a, tmp_path / "d.safetensors")
    assert tp.diff(view, b).same
    assert tp.digest(view).digest == tp.digest(b).digest
    extracted = tp.extract_lora(b, a, tmp_path / "adapter", "a.weight", rank=4)
    before = tp.digest(extracted).digest
    extracted.run()
    assert tp.digest(tmp_path / "adapter" / "adapter_model.safetensors").digest == before
    agree(tp.fold_lora(a, tmp_path / "adapter", tmp_path / "folded.safetensors"))


def test_without_a_path_there_is_nothing_to_run(tmp_path: Path) -> None:
    plan = tp.convert({"w": np.ones(3, np.float32)}, dtype="bf16")
    assert tp.of(plan).info("w").dtype == "bfloat16"
    assert str(plan).startswith("plan: a view")
    assert plan.to_json()["path"] is None
    with pytest.raises(PlanError) as caught:
        plan.run()
    assert str(caught.value) == "The plan has no path to write to. Pass path=… when making the plan."
    with pytest.raises(PlanError, match="max_shard_size needs a directory as path"):
        tp.convert({"w": np.ones(3)}, max_shard_size="1MB")
    with pytest.raises(PlanError, match="needs a path to write to"):
        tp.convert({"w": np.ones(3)}, format="safetensors")


def test_the_rounding_error_of_a_cast() -> None:
    values = {"w": finite(sample("float32", (1000,)))}
    found = tp.diff(values, tp.convert(values, dtype="bf16"), numeric=True)["w"]
    rounded = torch.from_numpy(values["w"]).to(torch.bfloat16).double().numpy()
    assert found.max == np.abs(np.float64(values["w"]) - rounded)[~np.isnan(rounded)].max()


def test_the_difference_of_two_checkpoints_can_be_measured() -> None:
    a, b = ({"w": np.random.default_rng(seed).standard_normal((30, 40)).astype(np.float32)} for seed in range(2))
    difference = tp.merge([a, b], weights=[1, -1], dtype="f32")
    assert tp.stats(difference)["w"].max == float((a["w"] - b["w"]).max())
    assert np.array_equal(tp.of(difference).numpy("w"), a["w"] - b["w"])


def test_what_a_cast_would_lose_is_told_and_only_writing_refuses_it(tmp_path: Path) -> None:
    values = {"w": np.array([1, 70_000, 1e-10, 1.0001], np.float32), "b": np.zeros(2, np.float32)}
    plan = tp.convert(values, tmp_path / "m.safetensors", dtype="f16")
    for found in (tp.stats(plan), tp.diff(values, plan, numeric=True), tp.digest(plan)):
        assert {name: (lost.overflow, lost.underflow) for name, lost in found.lost.items()} == {"w": (1, 1)}
        assert "1 value overflow: w. Writing raises an error." in str(found)
    assert tp.stats(plan).to_json()["lost"] == [{"name": "w", "overflow": 1, "underflow": 1, "changed": 3}]
    merged = tp.merge([values, values], tmp_path / "s.safetensors", weights=[1, 1], dtype="f16")
    assert tp.stats(merged).lost["w"].overflow == 1
    for each in (plan, merged):
        with pytest.raises(PlanError, match=r"value .*too large for float16"):
            each.run()


def test_views_compose() -> None:
    a, b = ({"w": np.full((3, 4), value, np.float32)} for value in (1, 3))
    mean = tp.merge([a, b])
    half = tp.convert(mean, dtype="f16", rename={"w": "v"})
    assert tp.of(half).names == ["v"]
    assert tp.stats(tp.merge([half, {"v": np.zeros((3, 4), np.float16)}], weights=[1, 0.5]))["v"].max == 2
    assert tp.diff(mean, {"w": np.full((3, 4), 2, np.float32)}).same


def test_a_view_of_files_pickles(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    plan = tp.merge([a, b])
    before = tp.digest(plan).digest
    again = pickle.loads(pickle.dumps(tp.of(plan).source))
    assert tp.digest(again).digest == before


def test_an_operand_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    class Blind(MemorySource):
        def numpy(self, name: str) -> Any:
            raise NotReadable(f"{name!r} has no values", where=self.label)

    from torchparams.edit.plan.layout import Output
    from torchparams.edit.plan.plan import Plan
    from torchparams.expressions.operations import Linear

    a = MemorySource({"w": np.ones(3)})
    b = Blind({"w": np.ones(3)}, label="there.safetensors")
    plan = Plan([Output("mean", Linear([a.row("w"), b.row("w")], [0.5, 0.5]))])
    (unread,) = tp.stats(plan).unread
    assert (unread.name, unread.reason) == ("mean", "there.safetensors: 'w' has no values")
    (row,) = tp.diff(plan, {"mean": np.ones(3)})
    assert (row.status, row.reason) == ("unread", "there.safetensors: 'w' has no values")
    with pytest.raises(NotReadable, match=r"there\.safetensors: 'w' has no values"):
        tp.digest(plan)


def test_names_are_checked_when_a_view_is_made() -> None:
    from torchparams.errors import UnknownName
    from torchparams.sources.view import ViewSource

    source = MemorySource({"w": np.ones(3)})
    with pytest.raises(PlanError, match="Two rows have the name 'x'"):
        ViewSource([("x", source.row("w")), ("x", source.row("w"))])
    with pytest.raises(PlanError, match="'x' is a row and an alias"):
        ViewSource([("x", source.row("w"))], aliases={"x": ("x",)})
    with pytest.raises(UnknownName, match="No parameter is named 'v'"):
        source.row(source.resolve("v"))


def test_memory_depends_neither_on_the_size_of_a_row_nor_on_its_leaves(tmp_path: Path) -> None:
    import tracemalloc

    from torchparams.edit.plan.layout import Output
    from torchparams.edit.plan.plan import Plan
    from torchparams.expressions.operations import Concat

    def sparse(name: str, numel: int, count: int) -> str:
        path = tmp_path / name
        entries = ",".join(
            f'"{i}":{{"dtype":"F32","shape":[{numel}],"data_offsets":[{4 * numel * i},{4 * numel * (i + 1)}]}}'
            for i in range(count)
        )
        header = f"{{{entries}}}".encode()
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 4 * numel * count)
        return str(path)

    many = tp.of(sparse("many.safetensors", 50_000, 2000)).source
    one = tp.of(sparse("one.safetensors", 100_000_000, 1)).source
    plan = Plan([Output("w", Concat([many.row(str(i)) for i in range(2000)]))])
    tracemalloc.start()
    try:
        assert tp.stats(plan, engine=ThreadEngine(2))["w"].zeros == 100_000_000
        assert tp.stats(tp.merge([one, plan], rename={"w": "0"}), engine=ThreadEngine(2))["0"].zeros == 100_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60 << 20
