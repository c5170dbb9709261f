"""torchao tensors in models, `.pt` files and safetensors files have the same values as in torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchao.quantization as ao
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchao.prototype.gptq.api import _int4_row_dequantize_zp, _int4_row_quantize_zp_precomputed_qparams
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

import torchparams as tp
from torchparams.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library

BF16, F32 = torch.bfloat16, torch.float32
INT3, INT4 = (getattr(torch, name) for name in ("int3", "int4"))
ASYMMETRIC = {"mapping_type": ao.MappingType.ASYMMETRIC}
CONFIGS: dict[str, tuple[Callable[[], Any], torch.dtype, str]] = {
    "int8": (lambda: ao.Int8WeightOnlyConfig(), BF16, "int8-channel"),
    "int8 float32": (lambda: ao.Int8WeightOnlyConfig(), F32, "int8-channel"),
    "int8 float16": (lambda: ao.Int8WeightOnlyConfig(), torch.float16, "int8-channel"),
    "int8 tensor": (lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()), BF16, "int8-tensor"),
    "int8 dynamic": (lambda: ao.Int8DynamicActivationInt8WeightConfig(), BF16, "int8-channel"),
    "fp8": (lambda: ao.Float8WeightOnlyConfig(), BF16, "fp8-channel"),
    "fp8 float32": (lambda: ao.Float8WeightOnlyConfig(), F32, "fp8-channel"),
    "int4": (lambda: ao.IntxWeightOnlyConfig(INT4, ao.PerGroup(16)), BF16, "int4-g16"),
    "int4 asymmetric": (lambda: ao.IntxWeightOnlyConfig(INT4, ao.PerGroup(16), **ASYMMETRIC), BF16, "int4-g16"),
    "int3": (lambda: ao.IntxWeightOnlyConfig(INT3, ao.PerAxis(0)), F32, "int3-channel"),
    "int4 dynamic": (
        lambda: ao.Int8DynamicActivationIntxWeightConfig(INT4, ao.PerGroup(16)), BF16, "int4-g16",
    ),
}  # fmt: skip


@pytest.fixture(params=list(CONFIGS))
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    config, dtype, encoding = CONFIGS[request.param]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ModuleDict({"fc": nn.Linear(48, 32, bias=False)})).to(dtype)
    ao.quantize_(model, config())
    return model, encoding


def files(model: nn.Module, folder: Path) -> tuple[Path, Path]:
    torch.save(model.state_dict(), folder / "model.pt")
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder / "model.pt", folder / "model.safetensors"


def back(path: Path) -> dict[str, Any]:
    """What torchao makes of a file."""
    with safe_open(path, "pt") as file:
        found = unflatten_tensor_state_dict({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118  # no mapping
    state: dict[str, Any] = found[0]
    return state


def test_values_are_those_of_torchao_wherever_they_are(made: tuple[nn.Module, str], tmp_path: Path) -> None:
    model, encoding = made
    state: dict[str, Any] = model.state_dict()
    for x in (model, state, dict(model.named_parameters()), *files(model, tmp_path)):
        params = tp.of(x)
        assert set(params.names) == {"0.weight", "0.bias", "1.fc.weight"}
        for name in ("0.weight", "1.fc.weight"):
            info = params.info(name)
            assert (info.encoding, info.shape) == (encoding, tuple(state[name].shape))
            assert f"torch.{info.dtype}" == str(state[name].dtype)
            assert info == params.infos[name]
            assert 8 < (info.bpw or 0) < 11
            expected = state[name].dequantize()
            assert torch.equal(torch.tensor(params.numpy(name).astype("f4")), expected.float())
        assert params.select(":quantized").names == ["0.weight", "1.fc.weight"]
        assert not tp.stats(x).unread
        raw = tp.of(x, raw=True).names
        assert set(raw) == {"0.bias", *(part for i in params.infos.values() if i.encoded for part in i.raw_names)}
        assert raw[:2] == ["0._weight_qdata", "0._weight_scale"] or not isinstance(x, nn.Module)
    assert tp.digest(model).digest == tp.digest(state).digest == tp.digest(tmp_path / "model.pt").digest


def test_parts_are_copied_with_their_description_or_not_at_all(made: tuple[nn.Module, str], tmp_path: Path) -> None:
    model, _ = made
    pickled, flat = files(model, tmp_path)
    out = tmp_path / "out.safetensors"
    for x in (model, model.state_dict(), pickled):
        with pytest.raises(PlanError, match=r"'0\.weight' is of the class \w+, whose description is not written here"):
            tp.convert(x, out)
    with pytest.raises(PlanError, match="description"):
        tp.convert(flat, tmp_path / "out.pt")
    with pytest.raises(PlanError, match="description"):
        tp.convert(flat, out, rename="0.=>9.")
    tp.convert(flat, out).run()
    assert torch.equal(back(out)["0.weight"].dequantize(), model.state_dict()["0.weight"].dequantize())
    tp.convert(flat, out, dtype={"0.weight": "f32"}, overwrite=True).run()
    found = back(out)
    assert type(found["0.weight"]) is torch.Tensor
    assert type(found["1.fc.weight"]) is type(model.state_dict()["1.fc.weight"])
    tp.convert(flat, out, dtype="f32", overwrite=True).run()
    assert dict(tp.of(out).metadata) == {}
    assert torch.equal(tp.of(out)["0.weight"], model.state_dict()["0.weight"].dequantize().float())


def test_reading_leaves_the_model_as_it_is(made: tuple[nn.Module, str]) -> None:
    model, _ = made
    before = [(id(p), {key: id(value) for key, value in vars(p).items()}) for p in model.parameters()]
    tp.stats(model), tp.digest(model), tp.diff(model, model), str(tp.of(model))
    assert before == [(id(p), {key: id(value) for key, value in vars(p).items()}) for p in model.parameters()]
    assert tp.of(model)["0.weight"] is model.get_parameter("0.weight")


def test_an_audit_has_the_values(made: tuple[nn.Module, str]) -> None:
    model, _ = made
    found = tp.audit(model)
    assert not found.unread
    assert "M301" not in [each.id for each in found]
    vars(model.get_parameter("1.fc.weight"))["scale"].fill_(float("nan"))
    (finding,) = [each for each in tp.audit(model) if each.id == "M301"]
    assert finding.names == ("1.fc.weight",)


def test_a_model_that_is_quantised_after_its_table_was_made() -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    params = tp.of(model)
    assert params.info("0.weight").encoding is None
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    assert params.info("0.weight").encoding == "int8-channel"


def test_tied_parameters_are_one_row(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    model[1].weight = model[0].weight
    state = model.state_dict()
    torch.save({"a": state["0.weight"], "b": state["0.weight"]}, tmp_path / "tied.pt")
    for x in ({"a": state["0.weight"], "b": state["0.weight"]}, tmp_path / "tied.pt"):
        params = tp.of(x)
        assert (params.names, params.info("a").aliases) == (["a"], ("b",))
        assert torch.equal(params["b"], state["0.weight"].dequantize())
    assert tp.of(model).info("0.weight").aliases == ("1.weight",)


def test_another_class_is_refused_by_name(tmp_path: Path) -> None:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    x = MXTensor.to_mx(torch.randn(64, 64), torch.float8_e4m3fn, 32)
    for target in ({"l.weight": x}, tmp_path / "mx.pt"):
        torch.save({"l.weight": x}, tmp_path / "mx.pt")
        unread = {each.name: each.reason for each in tp.stats(target).unread}
        assert "'l.weight' has the class MXTensor, which is not supported" in unread["l._weight_qdata"]


# --- int4 ----------------------------------------------------------------------------------------
# torchao makes an Int4Tensor on a GPU only, with kernels of another package. Its own functions for GPTQ quantise to the
# codes of one and back, in torch; the codes are packed here as `pack_int4` of that package does.


def int4(dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """An Int4Tensor, and the values that torchao's own function makes of its codes."""
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    blocks = w.view(48, -1, 16)
    scale = ((blocks.amax(-1) - blocks.amin(-1)) / 15).to(dtype).T.contiguous()
    zero = (blocks.amin(-1).to(dtype).T + scale * 8).contiguous()
    codes = _int4_row_quantize_zp_precomputed_qparams(w, scale.float(), zero.float(), 16)
    packed = torch.bitwise_or(codes[:, ::2] & 15, codes[:, 1::2] << 4).contiguous()
    expected = _int4_row_dequantize_zp(codes, scale.float(), zero.float(), 16)
    assert (expected - w).abs().max() < 0.3
    return ao.Int4Tensor(packed, scale, zero, [1, 16], torch.Size((48, 64))), expected


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_int4_has_the_values_of_torchao_wherever_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    weight, expected = int4(dtype)
    model = nn.Sequential(nn.Linear(64, 48))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    state = model.state_dict()
    for x in (model, state, *files(model, tmp_path)):
        params = tp.of(x)
        info = params.info("0.weight")
        assert (info.encoding, info.shape, info.dtype) == ("int4-g16", (48, 64), "float32")
        # torchao adds 8 to the codes and takes it off again, so its float32 values are rounded once more.
        values = torch.tensor(params.numpy("0.weight"))
        assert torch.allclose(values, expected, rtol=1e-5, atol=1e-6)
        assert not tp.stats(x).unread
    stored = {f"0._weight_{part}": getattr(weight, part) for part in ("qdata", "scale", "zero_point")}
    raw = tp.of(tmp_path / "model.safetensors", raw=True)
    assert all(torch.equal(raw[name], value) for name, value in stored.items())


def test_inputs_that_are_scaled_first_are_refused() -> None:
    weight, _ = int4(BF16)
    weight.act_pre_scale = torch.full((64,), 2.0)
    unread = {each.name: each.reason for each in tp.stats({"l.weight": weight}).unread}
    assert "multiplies its inputs by 'l._weight_act_pre_scale'" in unread["l._weight_qdata"]


def opaque() -> Any:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    return Int4OpaqueTensor.from_hp(w, [1, 32])


SCALES = (torch.zeros(4, 64, dtype=BF16), torch.zeros(4, 64, dtype=BF16))
PACKED: dict[str, tuple[Callable[[], Any], str]] = {
    "Int4OpaqueTensor": (opaque, "packed in an order that depends on the CPU that made it"),
    # The constructors run on a CPU; packing does not.
    "Int4TilePackedTo4dTensor": (
        lambda: ao.Int4TilePackedTo4dTensor(
            torch.zeros(8, 1, 32, 4, dtype=torch.int32), torch.zeros(4, 64, 2, dtype=BF16), [1, 32], (64, 128)
        ),
        "packed for the tensor cores of a GPU",
    ),
    "Int4PreshuffledTensor": (
        lambda: ao.Int4PreshuffledTensor(
            torch.zeros(64, 64, dtype=torch.int8), SCALES[0], [1, 32], (64, 128), SCALES[1]
        ),
        "packed for one kernel of a GPU",
    ),
    "Int4PlainInt32Tensor": (
        lambda: ao.Int4PlainInt32Tensor(
            torch.zeros(64, 16, dtype=torch.int32), SCALES[0], torch.zeros(4, 64, dtype=torch.int8), [1, 32], (64, 128)
        ),
        "packed in an order that depends on the device that made it",
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_int4_packed_for_a_kernel_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, reason = PACKED[kind]
    weight = make()
    torch.save({"l.weight": weight}, tmp_path / "m.pt")
    targets: list[Any] = [{"l.weight": weight}, tmp_path / "m.pt"]
    if kind in ("Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor"):  # those that torchao writes to safetensors
        tensors, metadata = flatten_tensor_state_dict({"l.weight": weight})
        save_file(tensors, tmp_path / "m.safetensors", metadata=metadata)
        targets.append(tmp_path / "m.safetensors")
    for target in targets:
        stats = tp.stats(target)
        unread = {each.name: each.reason for each in stats.unread}
        assert f"'l.weight' has the class {kind}, {reason}" in unread["l._weight_qdata"]
        assert "l._weight_qdata" not in {row.name for row in stats.rows}
    live = nn.Module()
    live.weight = nn.Parameter(weight, requires_grad=False)
    assert [each.name for each in tp.stats(live).unread] == ["weight"]
    assert tp.audit(live).unread == ("weight",)


def other_classes() -> dict[str, Any]:
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return {"NF4Tensor": to_nf4(torch.randn(512, 512), 64, 256), "OptimState8bit": OptimState8bit.zeros((64, 64))}


def test_tensors_of_other_classes_are_never_numbers(tmp_path: Path) -> None:
    for kind, weight in other_classes().items():
        torch.save({"l.weight": weight}, tmp_path / "m.pt")
        codes = {"NF4Tensor": "l._weight_quantized_data", "OptimState8bit": "l._weight_codes"}[kind]
        for raw in (False, True):
            stats = tp.stats(tp.of(tmp_path / "m.pt", raw=raw))
            assert codes in {each.name for each in stats.unread}
            assert codes not in {row.name for row in stats.rows}
