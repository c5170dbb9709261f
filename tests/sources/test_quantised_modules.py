"""Layers of `torch.ao.quantization`: their packed weights are rows with the same values as in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # torch will let go of these layers
ao: Any = torch.ao.quantization


def dynamic(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Sequential(nn.ReLU(), nn.Linear(16, 8, bias=False)))
    quantised: nn.Module = ao.quantize_dynamic(model, {nn.Linear})
    return quantised


def static() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)]
    model: Any = nn.Sequential(ao.QuantStub(), *layers, ao.DeQuantStub()).eval()
    model.qconfig = ao.get_default_qconfig("x86")
    ao.prepare(model, inplace=True)
    model(torch.randn(4, 3, 6, 6))
    made: nn.Module = ao.convert(model)
    return made


def layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name.rpartition(".")[0])


@pytest.mark.parametrize(
    ("make", "encodings"),
    [
        (dynamic, {"0.weight": "qint8-tensor", "2.1.weight": "qint8-tensor"}),
        (static, {"1.weight": "qint8-channel", "4.weight": "qint8-channel"}),
    ],
)
def test_a_packed_weight_is_a_row(make: Any, encodings: dict[str, str]) -> None:
    model = make()
    params = tp.of(model)
    assert {name: info.encoding for name, info in params.infos.items() if info.encoding} == encodings
    assert len(params) == len(params.names) == len(params.infos) == len(dict(params.items()))
    for name in encodings:
        weight = layer(model, name).weight()
        info = params.info(name)
        assert (info.shape, info.dtype, info.kind) == (tuple(weight.shape), "float32", "tensor")
        assert 8 < (info.bpw or 0) < 16
        assert torch.equal(torch.tensor(params.numpy(name)), weight.dequantize())
        assert torch.equal(params[name], weight)
        assert name in params
    assert not tp.stats(model).unread
    stored = tp.of(model, raw=True)
    assert all(set(params.info(name).raw_names) <= set(stored.names) for name in encodings)


def test_rows_stand_where_their_layers_stand() -> None:
    params = tp.of(dynamic())
    assert params.names == ["0.weight", "0.bias", "1.weight", "1.bias", "2.1.weight"]
    assert [params.info(name).kind for name in ("0.bias", "1.bias")] == ["tensor", "parameter"]
    assert params.select(":quantized").names == ["0.weight", "2.1.weight"]
    assert [name for name, _ in params.named_parameters()] == ["1.weight", "1.bias"]  # as PyTorch has it
    assert not params.left_out


def test_a_module_within_a_wrapper_and_alone() -> None:
    wrapped = nn.DataParallel(dynamic())
    params = tp.of(wrapped)
    assert params.info("0.weight").raw_name == "module.0.weight"
    expected = layer(wrapped.module, "0.weight").weight().dequantize()
    assert torch.equal(torch.tensor(params.numpy("module.0.weight")), expected)
    assert tp.of(dynamic().get_submodule("0")).names == ["weight", "bias"]


def test_what_a_layer_keeps_beside_is_named() -> None:
    found = tp.of(static()).left_out
    assert {(each.name, each.reason) for each in found} == {
        ("1", "keeps the scale and the zero point of its output"),
        ("4", "keeps the scale and the zero point of its output"),
    }


def test_a_subclass_with_state_of_its_own_is_named() -> None:
    model: Any = dynamic()

    class Counting(type(model[0])):  # type: ignore[misc]
        def get_extra_state(self) -> int:
            return 3

    model[0].__class__ = Counting
    assert [each.name for each in tp.of(model).left_out] == ["0", "0._packed_params"]


def test_values_are_compared_digested_and_written(tmp_path: Path) -> None:
    model, other = dynamic(), dynamic(1)
    assert tp.diff(model, dynamic(), numeric=True).same
    assert not tp.diff(model, other).same
    assert tp.digest(model).digest == tp.digest(dynamic()).digest != tp.digest(other).digest
    with pytest.raises(PlanError, match=r"'0\.weight' is of the class qint8, whose description is not written"):
        tp.save(model, tmp_path / "model.safetensors")
    tp.convert(model, tmp_path / "model.safetensors", dtype="f32").run()
    written = tp.of(tmp_path / "model.safetensors")
    assert torch.equal(written["0.weight"], layer(model, "0.weight").weight().dequantize())


def test_functions_that_change_a_model_take_what_modules_hold() -> None:
    model = dynamic()
    tp.freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tp.load(model, {"1.weight": torch.ones(16), "1.bias": torch.ones(16)})
    assert torch.equal(model.get_parameter("1.weight"), torch.ones(16))


@pytest.mark.parametrize("zero", [0, 100])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
def test_quantised_tensors_in_a_mapping(dtype: torch.dtype, axis: int | None, zero: int) -> None:
    w = torch.randn(7, 33)
    if axis is None:
        x = torch.quantize_per_tensor(w, 0.037, zero, dtype)
    else:
        x = torch.quantize_per_channel(w, torch.rand(7) / 20 + 0.01, torch.full((7,), zero), axis, dtype)
    for mapping in ({"a.w": x}, {"a": {"w": x if axis is not None else x.t().contiguous().t()}}):
        assert torch.equal(tp.of(mapping)["a.w"], x.dequantize())
    tied = tp.of({"a": x, "b": x})
    assert (tied.names, tied.info("a").aliases) == (["a"], ("b",))
    assert tp.of({"w": x}).info("w").encoding == f"{str(dtype)[6:]}-{'tensor' if axis is None else 'channel'}"


def test_scales_along_another_dimension_are_refused_by_name() -> None:
    flat = torch.quantize_per_channel(torch.randn(2, 3), torch.rand(3), torch.zeros(3), 1, torch.qint8)
    assert torch.equal(tp.of({"w": flat})["w"], flat.dequantize())
    x = torch.quantize_per_channel(torch.ones(2, 2, 3), torch.ones(3), torch.zeros(3), 2, torch.qint8)
    assert "'w' has scales along dimension 2" in tp.stats({"w": x}).unread[0].reason
