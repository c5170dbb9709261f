"""torchao tensors in models, `.pt` files and safetensors files have the same values as in torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchao.quantization as ao
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
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
