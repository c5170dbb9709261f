"""Layers of `torch.ao.quantization`: their packed weights are rows with the same values as in torch."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from command import command
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


def test_an_audit_has_the_values_of_packed_weights() -> None:
    model: Any = dynamic()
    found = tp.audit(model)
    assert not found.unread
    assert "M301" not in [each.id for each in found]
    scales = torch.full((16,), 0.1)
    scales[3] = float("nan")
    weight = torch.quantize_per_channel(torch.ones(16, 24), scales, torch.zeros(16, dtype=torch.int64), 0, torch.qint8)
    model[0].set_weight_bias(weight, None)
    (finding,) = [each for each in tp.audit(model) if each.id == "M301"]
    assert finding.names == ("0.weight",)
    assert tp.audit(embeddings("float_qparams_weight_only_qconfig_4bit")).unread == ("0.weight", "1.weight")


def embeddings(config: str = "float_qparams_weight_only_qconfig") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 12), nn.EmbeddingBag(10, 6)).eval()
    for each in model:
        each.qconfig = getattr(ao, config)
    made: nn.Module = ao.convert(ao.prepare(model))
    return made


def test_embeddings_are_rows() -> None:
    model = embeddings()
    params = tp.of(model)
    assert {name: info.encoding for name, info in params.infos.items()} == {
        "0.weight": "quint8-channel", "1.weight": "quint8-channel",
    }  # fmt: skip
    for name in params.names:
        assert torch.equal(torch.tensor(params.numpy(name)), layer(model, name).weight().dequantize())
    assert not params.left_out
    narrow = embeddings("float_qparams_weight_only_qconfig_4bit")
    assert {each.name: "quint4x2" in each.reason for each in tp.stats(narrow).unread} == {
        "0.weight": True, "1.weight": True,
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("make", [dynamic, static, embeddings])
def test_a_state_dict_has_the_names_and_values_of_the_layers(make: Any, zipped: bool, tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    live = tp.of(model)
    for x in (model.state_dict(), path):
        params = tp.of(x)
        own = {name for name in params.names if not name.endswith((".scale", ".zero_point"))}  # of outputs
        assert own == set(live.names)
        for name in own:
            info, expected = params.info(name), live.info(name)
            assert (info.encoding, info.shape, info.dtype) == (expected.encoding, expected.shape, expected.dtype)
            assert np.array_equal(params.numpy(name), live.numpy(name))
        assert not tp.stats(x).unread
    assert tp.digest(tp.of(path, raw=True)).digest == tp.digest(tp.of(model.state_dict(), raw=True)).digest


def test_a_file_of_codes_becomes_one_of_numbers_that_the_layers_load(tmp_path: Path) -> None:
    model = dynamic()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(PlanError, match=r"'0\.weight' is of the class qint8, whose description is not written"):
        tp.convert(tmp_path / "model.pt", tmp_path / "copy.pt")
    found = tp.of(tmp_path / "model.pt")
    kept = found.select("**.{weight,bias}")
    tp.convert(kept, tmp_path / "plain.pt", dtype="f32").run()
    whole = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16), nn.Sequential(nn.ReLU(), nn.Linear(16, 8, bias=False)))
    whole.load_state_dict(torch.load(tmp_path / "plain.pt"))
    assert torch.equal(whole.get_parameter("0.bias"), layer(model, "0.weight").bias())
    assert torch.equal(whole.get_parameter("2.1.weight"), layer(model, "2.1.weight").weight().dequantize())


def test_the_weights_of_recurrent_layers_have_their_values_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ao.quantize_dynamic(nn.ModuleDict({"l": nn.LSTM(8, 4)}), {nn.LSTM})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    found = tp.of(tmp_path / "model.pt")
    codes = found.select(":quantized")
    assert [found.info(name).encoding for name in codes.names] == ["qint8-tensor"] * 2
    layer_ = model["l"]._all_weight_values[0].param.__getstate__()[0][4]
    for name, packed in zip(codes.names, layer_, strict=True):
        expected = packed.__getstate__()[0][0].dequantize()
        assert torch.equal(found[name], expected)


@pytest.mark.parametrize("scheme", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
def test_quantised_tensors_in_a_file(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    w = torch.randn(7, 33)
    if scheme == "tensor":
        x = torch.quantize_per_tensor(w, 0.037, 5, dtype)
    else:
        x = torch.quantize_per_channel(w, torch.rand(7) / 20 + 0.01, torch.arange(7), 0, dtype)
    torch.save({"w": x, "turned": x.t() if scheme == "tensor" else x, "part": x[2:5]}, tmp_path / "m.pt")
    found = tp.of(tmp_path / "m.pt")
    theirs = torch.load(tmp_path / "m.pt", weights_only=False)
    for name in found.names:
        assert torch.equal(found[name], theirs[name].dequantize()), name
    assert found.info("w").encoding == f"{str(dtype)[6:]}-{scheme}"


REFUSED: dict[str, Any] = {
    "a scale beyond float32": lambda x: x.replace(struct.pack(">d", 0.25), struct.pack(">d", 1e300)),
    "another scheme": lambda x: x.replace(b"per_tensor_affine", b"per_tensor_unknown"[:17]),
    "a dtype as the scheme": lambda x: x.replace(b"per_tensor_affine", b"float32".ljust(17, b"x")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_scheme_that_is_not_understood_is_refused_by_name(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.pt"
    x = torch.quantize_per_tensor(torch.ones(3, 4), 0.25, 0, torch.qint8)
    torch.save({"w": x}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    changed = REFUSED[case](whole)
    assert changed != whole and len(changed) == len(whole)
    path.write_bytes(changed)
    assert [each.name for each in tp.stats(path).unread] == ["w"]
    done = command(capsys, "convert", path, tmp_path / "out.safetensors", "--dtype", "f32")
    assert done.status == 2
    assert "'w'" in done.err


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
