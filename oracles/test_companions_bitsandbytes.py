"""Layers quantised by bitsandbytes: files, state dicts and live layers are decoded like in the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes import functional
from torch import nn

import torchparams as tp
from torchparams.errors import NotReadable

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library

# Rows are whole blocks: of others, the library's own kernel for the CPU mixes up the scales.
LAYERS: dict[str, Any] = {
    "8 bits": lambda: bitsandbytes.nn.Linear8bitLt(192, 100, has_fp16_weights=False),
    "nf4": lambda: bitsandbytes.nn.Linear4bit(192, 100, quant_type="nf4", compress_statistics=False),
    "nf4, nested": lambda: bitsandbytes.nn.Linear4bit(192, 100, quant_type="nf4"),
    "fp4, nested": lambda: bitsandbytes.nn.Linear4bit(192, 100, quant_type="fp4", compress_statistics=True),
    "nf4 in bfloat16": lambda: bitsandbytes.nn.Linear4bit(192, 100, quant_type="nf4", quant_storage=torch.bfloat16),
}
ENCODINGS = {"8 bits": "int8-bnb", "fp4, nested": "fp4"}


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=list(LAYERS))
def net(request: pytest.FixtureRequest, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = nn.ModuleDict({"l": LAYERS[request.param]().to(dtype), "norm": nn.LayerNorm(192)})
    return made.to("cpu")  # which quantises


def values_of(net: nn.Module) -> torch.Tensor:
    weight: Any = net.get_parameter("l.weight")
    if weight.dtype == torch.int8:
        found: torch.Tensor = functional.int8_vectorwise_dequant(weight.data, net.state_dict()["l.SCB"])
    else:
        found = functional.dequantize_4bit(weight.data, weight.quant_state)
    return found


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}


def test_a_live_layer_has_the_values_of_the_library_before_and_after_it_runs(
    net: nn.Module, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    encoding = ENCODINGS.get(request.node.callspec.params["net"], "nf4")
    for _ in range(2):
        params = tp.of(net)
        info = params.info("l.weight")
        assert (info.encoding, info.shape, info.kind) == (encoding, (100, 192), "parameter")
        assert info == params.infos["l.weight"]
        assert set(info.raw_names) == {name for name in state_of(net) if name.startswith("l.") and name != "l.bias"}
        assert np.array_equal(params.numpy("l.weight"), tp.of(state_of(net)).numpy("l.weight"))
        assert params["l.weight"] is net.get_parameter("l.weight")
        assert not params.left_out
        assert not tp.stats(net).unread
        assert params.select(f"[encoding={encoding}]").names == ["l.weight"]
        assert set(tp.of(net, raw=True).names) == set(state_of(net))
        assert tp.digest(net).digest == tp.digest(tp.of(state_of(net), raw=True)).digest
        assert tp.diff(net, state_of(net)).same
        with pytest.raises(NotReadable, match=r"l\.weight.*Holds codes of an unknown encoding"):
            tp.apply_(net, None, lambda w: w * 2)
        net.get_submodule("l")(torch.ones(2, 192, dtype=dtype))
    tp.save(net, tmp_path / "model.safetensors")
    assert tp.diff(tp.of(net, raw=True), tp.of(tmp_path / "model.safetensors", raw=True)).same


def test_an_audit_has_the_values(net: nn.Module) -> None:
    found = tp.audit(net)
    assert not found.unread
    assert "M301" not in [each.id for each in found]
    weight: Any = net.get_parameter("l.weight")
    state = getattr(weight, "quant_state", None)
    scales = weight.SCB if state is None else state.absmax if state.state2 is None else state.state2.absmax
    scales[0] = float("nan")
    (finding,) = [each for each in tp.audit(net) if each.id == "M301"]
    assert finding.names == ("l.weight",)


def test_a_layout_for_the_cpu_alone_is_refused(net: nn.Module) -> None:
    state = getattr(net.get_parameter("l.weight"), "quant_state", None)
    if state is not None:
        state.packing_format_for_cpu = True
        assert [each.name for each in tp.stats(net).unread] == ["l.weight"]
        assert tp.audit(net).unread == ("l.weight",)
        assert [each.name for each in tp.of(net).left_out] == ["l"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_its_state_dict_and_files_of_that_have_the_values_of_the_library(
    net: nn.Module, suffix: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    state = state_of(net)
    path = tmp_path / f"model.{suffix}"
    tp.convert(state, path).run()
    encoding = ENCODINGS.get(request.node.callspec.params["net"], "nf4")
    for x in (state, path):
        params = tp.of(x)
        assert params.names == ["l.weight", "l.bias", "norm.weight", "norm.bias"]
        assert params.info("l.weight").encoding == encoding
        assert torch.equal(params["l.weight"], values_of(net))
        assert not tp.stats(x).unread
    assert tp.digest(path).digest == tp.digest(tp.of(state, raw=True)).digest
    tp.convert(path, tmp_path / "plain.safetensors", dtype="f32").run()
    assert torch.equal(tp.of(tmp_path / "plain.safetensors")["l.weight"], values_of(net).float())


@pytest.mark.parametrize("name", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_part_that_is_missing_is_named(net: nn.Module, name: str) -> None:
    state = state_of(net)
    if state.pop(f"l.weight.{name}", None) is None:
        return  # such a layer has no such part
    unread = {each.name: each.reason for each in tp.stats(state).unread}
    assert f"'l.weight.{name}' is missing" in unread["l.weight"]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"\xff", b"{" * 20000, b'{"quant_type": "nf4", "blocksize": 64, "shape": [1e9]}']
)
def test_a_state_that_is_none_is_refused(net: nn.Module, text: bytes) -> None:
    state = state_of(net)
    for name in state:
        if "quant_state" in name:
            state[name] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0)
            assert "l.weight" in {each.name for each in tp.stats(state).unread}


def test_a_layer_that_is_not_quantised_yet_holds_numbers() -> None:
    for make in LAYERS.values():
        assert not tp.stats(nn.ModuleDict({"l": make()})).unread
