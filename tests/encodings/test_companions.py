"""Codes are never treated as values: which tensors hold codes, and how each function handles them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchparams as tp
from command import command
from torchparams.encodings.companions import CODES, GROUPS, coded
from torchparams.errors import MismatchError, NotReadable, TorchParamsError
from torchparams.reading import Reading

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

F8 = torch.float8_e4m3fn


def codes_of(weights: dict[str, Any]) -> dict[str, bool]:
    """Name → whether it is codes, of what is found."""
    return {name: found.codes for name, found in coded(tp.of(weights, raw=True).reading()).items()}


def tensor(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    return torch.ones(shape or (4, 4)).to(dtype)


# --- recognition -------------------------------------------------------------------------------

ENCODINGS: dict[str, tuple[dict[str, torch.dtype], set[str]]] = {
    "fp8 by block": ({"l.weight": F8, "l.weight_scale_inv": torch.float32}, {"l.weight"}),
    "fp8 by tensor": ({"l.weight": F8, "l.weight_scale": torch.float32, "l.input_scale": torch.float32}, {"l.weight"}),
    "fp8, DeepSeek's own names": ({"l.weight": F8, "l.scale": torch.float32}, {"l.weight"}),
    "a fused fp8 parameter": ({"e.down_proj": F8, "e.down_proj_scale_inv": torch.float32}, {"e.down_proj"}),
    "bitsandbytes, 8 bits": (
        {"l.weight": torch.int8, "l.SCB": torch.float32, "l.weight_format": torch.uint8},
        {"l.weight"},
    ),
    "bitsandbytes, 4 bits": (
        {
            "l.weight": torch.uint8,
            "l.weight.absmax": torch.uint8,
            "l.weight.quant_map": torch.float32,
            "l.weight.nested_absmax": torch.float32,
            "l.weight.nested_quant_map": torch.float32,
            "l.weight.quant_state.bitsandbytes__nf4": torch.uint8,
        },
        {"l.weight"},
    ),
    "bitsandbytes, 4 bits in bfloat16": (
        {
            "l.weight": torch.bfloat16,
            "l.weight.absmax": torch.float32,
            "l.weight.quant_map": torch.float32,
            "l.weight.quant_state.bitsandbytes__fp4": torch.uint8,
        },
        {"l.weight"},
    ),
    "GPTQ": (
        {"l.qweight": torch.int32, "l.qzeros": torch.int32, "l.scales": torch.float16, "l.g_idx": torch.int32},
        {"l.qweight"},
    ),
    "compressed-tensors": (
        {"l.weight_packed": torch.int32, "l.weight_scale": torch.bfloat16, "l.weight_shape": torch.int64},
        {"l.weight_packed"},
    ),
    "ModelOpt NVFP4": (
        {"l.weight": torch.uint8, "l.weight_scale": F8, "l.weight_scale_2": torch.float32},
        {"l.weight"},
    ),
    "MXFP4": ({"e.gate_up_proj_blocks": torch.uint8, "e.gate_up_proj_scales": torch.uint8}, {"e.gate_up_proj_blocks"}),
    "EXL2": ({"l.q_weight": torch.int32, "l.q_scale": torch.int32, "l.q_scale_max": torch.float16}, {"l.q_weight"}),
    "HQQ": ({"l.W_q": torch.uint8, "l.scale": torch.float16, "l.zero": torch.float16}, {"l.W_q"}),
    "AQLM": ({"l.codes": torch.int8, "l.codebooks": torch.float16, "l.scales": torch.float16}, {"l.codes"}),
    "sparse": ({"l.bitmask": torch.uint8, "l.compressed": torch.float32, "l.shape": torch.int64}, {"l.bitmask"}),
    "quanto": ({"l.weight._data": torch.int8, "l.weight._scale": torch.float32}, {"l.weight._data"}),
    "MLX": ({"l.weight": torch.uint32, "l.scales": torch.float16, "l.biases": torch.float16}, {"l.weight"}),
    "the state of an 8-bit optimizer": (
        {"state.0.state1": torch.uint8, "state.0.qmap1": torch.float32, "state.0.absmax1": torch.float32},
        {"state.0.state1"},
    ),
    "a name without modules": ({"w": torch.int8, "w_scale": torch.float32}, {"w"}),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_codes_and_what_belongs_to_them_are_recognised(name: str) -> None:
    dtypes, codes = ENCODINGS[name]
    found = codes_of({key: tensor(dtype) for key, dtype in dtypes.items()})
    assert {key for key, is_codes in found.items() if is_codes} == codes
    assert found.keys() == dtypes.keys() - {"l.input_scale"}


NAMED = {
    "EXL2": {"l.q_weight": torch.int32, "l.q_scale": torch.int32},
    "EXL3": {"l.trellis": torch.int16, "l.suh": torch.float16, "l.svh": torch.float16},
    "HQQ": {"l.W_q": torch.uint8, "l.scale": torch.float16, "l.zero": torch.float16},
    "AQLM": {"l.codes": torch.int8, "l.codebooks": torch.float16, "l.scales": torch.float16},
    "QuIP#": {"l.Qidxs": torch.int16, "l.SU": torch.float16, "l.SV": torch.float16},
    "VPTQ": {"l.indices": torch.int32, "l.centroids.weight": torch.float16},
    "EETQ": {"l.weight": torch.int8, "l.weight_scales": torch.float16},
    "MLX": {"l.weight": torch.uint32, "l.scales": torch.float16, "l.biases": torch.float16},
    "quanto": {"l.weight._data": torch.int8, "l.weight._scale": torch.float32},
    "Marlin": {"l.B": torch.int32, "l.s": torch.float16},
    "compressed-tensors' sparse format": {"l.bitmask": torch.uint8, "l.compressed": torch.float32},
    "an 8-bit optimizer of bitsandbytes": {"s.state1": torch.uint8, "s.absmax1": torch.float32},
}


@pytest.mark.parametrize("packing", NAMED)
def test_packings_that_are_not_decoded_are_listed_as_stored_and_named(
    packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: tensor(dtype) for name, dtype in NAMED[packing].items()} | {"norm.weight": tensor()}
    path = tmp_path / "m.safetensors"
    tp.save(weights, path)
    assert set(tp.of(path).names) == weights.keys()
    codes = next(iter(weights))
    note = f"Holds codes of {packing}, which is not decoded"
    assert note in tp.of(path).undecoded[codes]
    for arguments in (("ls", path), ("show", path, codes)):
        done = command(capsys, *arguments)
        assert (done.status, note in done.out) == (0, True)
    assert command(capsys, "ls", path, "--json").json["undecoded"][0]["name"] == codes
    assert not tp.of(path, raw=True).undecoded
    assert codes in {each.name for each in tp.stats(path).unread}
    for writing in (("convert", path, tmp_path / "out.safetensors", "--dtype", "bf16"),
                      ("merge", path, path, tmp_path / "out.safetensors")):  # fmt: skip
        done = command(capsys, *writing)
        assert (done.status, note in done.err) == (2, True), done.err
    assert not (tmp_path / "out.safetensors").exists()


def test_of_the_companions_floating_point_ones_are_numbers() -> None:
    weights = {"l.weight": tensor(torch.uint8), "l.weight_scale": tensor(F8), "l.weight_scale_2": tensor()}
    found = coded(tp.of(weights, raw=True).reading())
    assert {name: each.numbers for name, each in found.items()} == {
        "l.weight": False,
        "l.weight_scale": False,
        "l.weight_scale_2": True,
    }


PLAIN: dict[str, dict[str, torch.dtype]] = {
    "CLIP's temperature": {"logit_scale": torch.float32, "position_ids": torch.int64, "logit.weight": torch.float32},
    "scales of a key-value cache": {
        "attn.k_proj.weight": F8,
        "attn.k_proj.k_scale": torch.float32,
        "attn.k_scale": torch.float32,
        "attn.v_scale": torch.float32,
    },
    "a scale of activations": {"l.weight": F8, "l.input_scale": torch.float32},
    "counters beside scales": {"bn.num_batches_tracked": torch.int64, "bn.scale": torch.float32, "bn.weight_scale": F8},
    "floats beside scales": {"l.weight": torch.bfloat16, "l.weight_scale": torch.float32, "l.scale": torch.float32},
    "masks": {"l.weight": torch.bool, "l.weight_scale": torch.float32},
    "fake quantisation": {"w.scale": torch.float32, "w.zero_point": torch.int32, "w.fake_quant_enabled": torch.uint8},
    "float8 alone": {"l.weight": F8, "l.bias": torch.float32},
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tensors_stay_numbers(name: str) -> None:
    assert not codes_of({key: tensor(dtype) for key, dtype in PLAIN[name].items()})


@pytest.mark.filterwarnings("ignore")  # torch will let go of these types
def test_quantised_types_of_torch_keep_their_scales_to_themselves() -> None:
    weight = torch.quantize_per_tensor(torch.ones(2, 2), 0.5, 0, torch.qint8)
    other = torch.quantize_per_tensor(torch.ones(2, 2), 0.5, 0, torch.qint32)
    weights = {"conv.weight": weight, "x": other, "conv.scale": torch.tensor(0.1), "conv.zero_point": torch.tensor(3)}
    assert tp.of(weights).names == list(weights)
    assert torch.equal(tp.of(weights)["conv.weight"], weight.dequantize())
    assert [each.name for each in tp.stats(weights).unread] == ["x"]


def test_an_alias_has_companions_too() -> None:
    shared = tensor(F8)
    assert codes_of({"head.weight": shared, "embed.weight": shared, "embed.weight_scale": tensor()}) == {
        "head.weight": True,
        "embed.weight_scale": False,
    }


STEMS = st.sampled_from(["", "a.", "b."])
ENDINGS = st.sampled_from(sorted({end for ending, *ends in GROUPS for end in (ending, *ends[0], *ends[1]) if end}))
TYPES = st.sampled_from([torch.float32, torch.int8, F8, torch.int64, torch.bool])


@given(st.dictionaries(st.builds(str.__add__, STEMS, ENDINGS), TYPES, max_size=12))
def test_what_is_found_follows_from_names_and_types_in_any_order(dtypes: dict[str, torch.dtype]) -> None:
    weights = {name: tensor(dtype, 1) for name, dtype in dtypes.items()}
    found = codes_of(weights)
    assert codes_of(dict(reversed(weights.items()))) == found
    assert found.keys() <= weights.keys()
    for name, is_codes in found.items():
        if is_codes:
            by_bits_and_bytes = any(other.startswith((f"{name}.absmax", f"{name}.quant_")) for other in weights)
            assert tp.of(weights).info(name).dtype in CODES or by_bits_and_bytes
    assert not found or any(found.values())


def test_a_source_is_looked_at_once_whatever_its_size() -> None:
    class Counting(Reading):
        looks = 0

        @property
        def infos(self) -> Any:
            type(self).looks += 1
            return super().infos

    plain = {f"l.{i}.weight": np.zeros(1, np.float32) for i in range(1000)}
    assert not coded(Counting(tp.of(plain).infos.values()))
    assert Counting.looks == 1  # the types; no name is looked at


# --- verbs on files ----------------------------------------------------------------------------

ENCODED = {
    "fp8": {"l.weight": tensor(F8), "l.weight_global_scale": torch.full((1, 1), 0.5), "norm.weight": tensor()},
    "int8": {"l.weight": tensor(torch.int8), "l.per_channel_scale": torch.full((4,), 0.5), "norm.weight": tensor()},
}


@pytest.fixture(params=list(ENCODED))
def file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    tp.convert(ENCODED[request.param], path).run()
    return str(path)


def changed(file: str, path: Path) -> str:
    """A copy in which codes, scales and plain numbers differ."""
    weights = {name: value.clone() for name, value in tp.of(file).items()}
    for value in weights.values():
        value[0] = torch.full_like(value[0].float(), 3.0).to(value.dtype)
    tp.convert(weights, path).run()
    return str(path)


def adapter(folder: Path, module: str = "l") -> str:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": torch.ones(1, 4), "B": torch.ones(4, 1)}
    weights = {f"base_model.model.{module}.lora_{x}.weight": value for x, value in factors.items()}
    tp.convert(weights, folder / "adapter_model.safetensors").run()
    return str(folder)


REFUSED: dict[str, Callable[[str, str, Path], object]] = {
    "merge": lambda a, b, out: tp.merge([a, b], out / "merged.safetensors"),
    "merge the same": lambda a, b, out: tp.merge([a, a], out / "merged.safetensors"),
    "merge by ties": lambda a, b, out: tp.merge([b], out / "merged.safetensors", base=a, method="ties"),
    "merge codes alone": lambda a, b, out: tp.merge([a, b], out / "merged.safetensors", "l.weight"),
    "merge scales alone": lambda a, b, out: tp.merge([a, b], out / "merged.safetensors", "l.* & ~l.weight"),
    "fold": lambda a, b, out: tp.fold_lora(
        a, adapter(out / "adapter"), out / "folded.safetensors", fan_in_fan_out=False
    ),
    "fold and cast": lambda a, b, out: tp.fold_lora(
        a, adapter(out / "adapter", "norm"), out / "folded.safetensors", dtype="bf16", fan_in_fan_out=False
    ),
    "extract": lambda a, b, out: tp.extract_lora(a, b, out / "adapter", rank=1),
    "extract the rest": lambda a, b, out: tp.extract_lora(a, b, out / "adapter", rank=1, save_rest=True),
    "convert": lambda a, b, out: tp.convert(a, out / "out.safetensors", dtype="bf16"),
    "convert codes alone": lambda a, b, out: tp.convert(a, out / "out.safetensors", "l.*", dtype="bf16"),
    "save": lambda a, b, out: tp.save(a, out / "out.safetensors", dtype={"l.**": "f16"}),
}


@pytest.mark.parametrize("verb", REFUSED)
def test_verbs_that_write_refuse_codes_by_name(verb: str, file: str, tmp_path: Path) -> None:
    other = changed(file, tmp_path / "other.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NotReadable, match=r"safetensors: 'l\.\w+': (Holds codes of an unknown|Belongs to the codes)"):
        REFUSED[verb](file, other, tmp_path)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "adapter"] == before


def test_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotReadable) as caught:
        tp.convert(ENCODED["fp8"], tmp_path / "out.safetensors", dtype="bf16")
    assert str(caught.value) == (
        "dict: 'l.weight': Holds codes of an unknown encoding: their values need 'l.weight_global_scale'. "
        "The same applies to 1 other tensor. Omit the dtype, cast only tensors without codes (--dtype "
        "SELECTOR=TYPE), or decode the checkpoint first."
    )


def test_a_cast_of_a_selection_without_codes_goes_on(file: str, tmp_path: Path) -> None:
    tp.convert(file, tmp_path / "out.safetensors", dtype={"norm.**": "bf16"}).run()
    made = tp.of(tmp_path / "out.safetensors")
    assert made.info("norm.weight").dtype == "bfloat16"
    assert tp.diff(file, made, "l.**").same


def test_merging_what_is_not_encoded_goes_on(file: str, tmp_path: Path) -> None:
    tp.merge([file, file], tmp_path / "out.safetensors", "norm.**").run()
    assert tp.of(tmp_path / "out.safetensors").names == ["norm.weight"]


def test_merge_takes_codes_that_one_source_has_as_they_are(file: str, tmp_path: Path) -> None:
    other = {"norm.weight": tensor()}
    tp.merge([file, other], tmp_path / "out.safetensors", missing="keep").run()
    assert tp.diff(file, tmp_path / "out.safetensors").same
    with pytest.raises(NotReadable, match=r"l\.\w+"):
        tp.merge([file, other], tmp_path / "cast.safetensors", missing="keep", dtype="f16")


def test_a_fold_refuses_to_put_a_whole_tensor_where_codes_are(tmp_path: Path) -> None:
    base = {"l.weight": tensor(F8), "l.weight_global_scale": tensor(), "m.weight": tensor()}
    folder = adapter(tmp_path / "adapter", "m")
    weights = dict(tp.of(f"{folder}/adapter_model.safetensors").items())
    weights["base_model.model.l.weight"] = tensor()
    tp.convert(weights, f"{folder}/adapter_model.safetensors", overwrite=True).run()
    with pytest.raises(NotReadable, match=r"'l\.weight': Holds codes"):
        tp.fold_lora(base, folder, tmp_path / "folded.safetensors", fan_in_fan_out=False)


def test_a_fold_beside_codes_goes_on(file: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", "norm")
    tp.fold_lora(file, folder, tmp_path / "out.safetensors", fan_in_fan_out=False).run()
    assert tp.diff(file, tmp_path / "out.safetensors", "l.**").same
    assert tp.of(tmp_path / "out.safetensors").numpy("norm.weight")[0, 0] == 2


def test_stats_list_codes_as_unread_with_the_reason(file: str) -> None:
    found = tp.stats(file)
    assert [(each.name, each.reason.partition(":")[0]) for each in found.unread] == [
        ("l.weight", "Holds codes of an unknown encoding")
    ]
    assert {row.name for row in found} == set(tp.of(file).names) - {"l.weight"}
    assert [each["name"] for each in found.to_json()["unread"]] == ["l.weight"]
    assert [row.tensors for row in tp.stats(file, by="dtype") if row.dtype == "float32"] == [2]
    assert "l.weight" in str(found)


@pytest.mark.parametrize("known", [True, False])
def test_raw_codes_are_listed_as_stored_whether_their_encoding_is_known_or_not(
    known: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = "l.weight_scale" if known else "l.weight_global_scale"
    file = tmp_path / "model.safetensors"
    tp.convert({"l.weight": tensor(F8), scale: tensor(torch.float32, 1)}, file).run()
    line = f"  l.weight: Holds codes, listed as stored: their values need '{scale}'"
    ran = command(capsys, "stats", file, "--raw")
    assert line in ran.out.splitlines() and "unknown" not in ran.out
    assert f"l.weight      {line[12:]}" in command(capsys, "diff", file, file, "--raw", "--numeric").out.splitlines()
    for selector in (None, "l.weight"):
        reasons = [each.reason for each in tp.stats(file, selector).unread]
        assert reasons == ([] if known else [f"Holds codes of an unknown encoding: their values need '{scale}'"])
        reasons = [each.reason for each in tp.stats(tp.of(file, raw=True), selector).unread]
        assert reasons == [line.partition(": ")[2]]


def test_stats_of_codes_alone_know_the_companions_that_are_not_selected(file: str) -> None:
    found = tp.stats(file, "l.weight")
    assert not found.rows
    assert [each.name for each in found.unread] == ["l.weight"]


def test_a_comparison_of_values_lists_codes_as_unread(file: str, tmp_path: Path) -> None:
    other = changed(file, tmp_path / "other.safetensors")
    found = tp.diff(file, other, numeric=True)
    assert found["l.weight"].status == "unread"
    assert found["l.weight"].reason.startswith("Holds codes of an unknown encoding")
    assert found["norm.weight"].status == "changed"
    plain = {**ENCODED["int8"], "l.weight": tensor()}
    assert tp.diff(ENCODED["int8"], plain, numeric=True)["l.weight"].status == "unread"
    assert not tp.diff(file, file, numeric=True).same


def test_a_comparison_of_bits_counts_codes_and_says_nothing_of_their_size(file: str, tmp_path: Path) -> None:
    other = changed(file, tmp_path / "other.safetensors")
    row = tp.diff(file, other)["l.weight"]
    assert (row.status, row.changed, row.share) == ("changed", 4, 0.25)
    assert np.isnan([row.max, row.relative, row.cosine]).all()
    assert tp.diff(file, file).same
    alone = tp.diff(file, other, "l.weight", by="module")
    assert alone.to_json()["groups"][0]["max"] is None
    assert alone.to_json()["total"]["changed"] == 4
    assert tp.diff(file, other).total.compared.max == 2.5  # of the scales and norms


def test_listings_digests_and_copies_go_on(file: str, tmp_path: Path) -> None:
    assert len(tp.of(file)) == 3
    tp.convert(file, tmp_path / "copy.pt").run()
    assert tp.digest(file).digest == tp.digest(tmp_path / "copy.pt").digest
    assert tp.verify(tmp_path / "copy.pt", tp.digest(file))
    tp.save(changed(file, tmp_path / "other.safetensors"), tmp_path / "delta.safetensors", base=file)
    tp.apply_delta(file, tmp_path / "delta.safetensors", tmp_path / "tuned.safetensors").run()
    assert tp.diff(tmp_path / "tuned.safetensors", tmp_path / "other.safetensors").same


def test_the_commands_refuse_or_list_codes(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["convert", file, tmp_path / "out.safetensors", "--dtype", "f16"],
                      ["merge", file, file, tmp_path / "out.safetensors"]):  # fmt: skip
        ran = command(capsys, *arguments)
        assert (ran.status, ran.out) == (2, "")
        assert "the codes in 'l.weight'" in ran.err or "'l.weight': Holds codes" in ran.err
    assert [each["name"] for each in command(capsys, "stats", file, "--json").json["unread"]] == ["l.weight"]
    assert command(capsys, "diff", file, file).status == 0
    assert command(capsys, "diff", file, file, "--numeric").status == 1


# --- verbs on models ---------------------------------------------------------------------------


class Quantised(nn.Module):
    def __init__(self, dtype: torch.dtype = F8) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor(dtype), requires_grad=False)
        self.register_buffer("weight_scale", torch.full((1,), 0.5))


def model(dtype: torch.dtype = F8) -> nn.Module:
    return nn.ModuleDict({"l": Quantised(dtype), "head": nn.Linear(4, 4)})


@pytest.mark.parametrize("dtype", [F8, torch.int8])
def test_changes_of_a_model_refuse_codes_and_change_nothing(dtype: torch.dtype) -> None:
    net = model(dtype)
    before = tp.digest(net).digest
    rule = ("**", nn.init.zeros_)
    for change in (
        lambda: tp.apply_(net, None, lambda w: w * 2),
        lambda: tp.init(net, rule, seed=0),
        lambda: tp.penalty(net),
    ):
        with pytest.raises(NotReadable, match=r"l\.weight.*'l\.weight_scale'.*Leave it out of the selection"):
            change()
    assert tp.digest(net).digest == before
    assert tp.apply_(net, "head.**", lambda w: w * 2).names == ("head.weight", "head.bias")
    assert tp.penalty(net, "head.**").item() > 0


def test_a_penalty_refuses_to_pull_towards_codes() -> None:
    net = nn.Linear(4, 4, bias=False)
    with pytest.raises(NotReadable, match="'weight': Holds codes"):
        tp.penalty(net, toward={"weight": tensor(F8), "weight_global_scale": tensor()})


def test_statistics_of_a_model_see_scales_that_are_buffers() -> None:
    assert [each.name for each in tp.stats(model()).unread] == ["l.weight"]


def test_load_casts_no_codes_to_values() -> None:
    net = nn.ModuleDict({"l": nn.Linear(4, 4, bias=False)})
    given = {"l.weight": tensor(F8), "l.weight_global_scale": tensor()}
    with pytest.raises(MismatchError, match=r"Holds codes of an unknown .* their values need 'l\.weight_global_scale'"):
        tp.load(net, given)
    tp.load(net, {"l.weight": tensor(F8)})  # float8 values without a scale are numbers


def test_load_casts_no_values_to_codes_and_copies_codes_as_they_are() -> None:
    net = model()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(MismatchError, match=r"in the model: Holds codes"):
        tp.load(net, {**state, "l.weight": tensor()})
    state["l.weight"] = torch.zeros(4, 4).to(F8)
    assert tp.load(net, state).complete
    assert not net.get_parameter("l.weight").float().any()
    assert tp.load(net, {**state, "l.weight_scale": torch.ones(1, dtype=torch.float64)}).complete  # a number


class KeepsScales(nn.Parameter):
    """Stands for a parameter of bitsandbytes."""


def test_a_parameter_that_keeps_its_scales_as_attributes_holds_codes() -> None:
    for dtype, attribute in ((torch.int8, "SCB"), (torch.bfloat16, "quant_state")):
        net = nn.Linear(4, 4, bias=False)
        net.weight = KeepsScales(tensor(dtype), requires_grad=False)
        setattr(net.weight, attribute, torch.ones(4))
        found = tp.stats(net)
        assert [(each.name, each.reason) for each in found.unread] == [
            ("weight", f"Holds codes of an unknown encoding: their values need 'weight.{attribute}'")
        ]
        with pytest.raises(NotReadable, match="Holds codes"):
            tp.apply_(net, None, lambda w: w * 2)


def test_a_parameter_of_integers_and_a_class_of_its_own_holds_codes() -> None:
    net = nn.Linear(4, 4, bias=False)
    net.weight = KeepsScales(tensor(torch.int8), requires_grad=False)
    assert tp.stats(net).unread[0].reason.endswith("their values need the scales that KeepsScales keeps")
    net.weight = KeepsScales(tensor(), requires_grad=False)
    assert not tp.stats(net).unread


def test_the_errors_are_of_the_library() -> None:
    with pytest.raises(TorchParamsError):
        tp.apply_(model(), None, lambda w: w)
