"""Layers that bitsandbytes quantises are recognised: in the model, in its state dict and in files of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import NotReadable

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the library

LAYERS: dict[str, Any] = {
    "8 bits": lambda: bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    "nf4": lambda: bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4"),
    "fp4, nested": lambda: bitsandbytes.nn.Linear4bit(64, 64, quant_type="fp4", compress_statistics=True),
    "nf4 in bfloat16": lambda: bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", quant_storage=torch.bfloat16),
}


@pytest.fixture(params=list(LAYERS))
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = nn.ModuleDict({"l": LAYERS[request.param](), "norm": nn.LayerNorm(64)})
    return made.to("cpu")  # which quantises


def test_a_layer_holds_codes_before_and_after_it_runs(net: nn.Module) -> None:
    for _ in range(2):
        assert [each.name for each in tp.stats(net).unread] == ["l.weight"]
        with pytest.raises(NotReadable, match=r"l\.weight.*Holds codes of an unknown encoding"):
            tp.apply_(net, None, lambda w: w * 2)
        net.get_submodule("l")(torch.ones(2, 64))


def test_its_state_dict_and_a_file_of_that_hold_codes(net: nn.Module, tmp_path: Path) -> None:
    state = {name: value for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}
    path = tmp_path / "model.safetensors"
    tp.convert(state, path).run()
    for x in (state, path):
        found = tp.of(x).source.coded()
        assert [name for name, each in found.items() if each.codes] == ["l.weight"]
        assert found.keys() == state.keys() - {"l.bias", "norm.weight", "norm.bias"}
        assert "l.weight" in {each.name for each in tp.stats(x).unread}
        with pytest.raises(NotReadable, match=r"l\.weight"):
            tp.merge([x, x], tmp_path / "merged.safetensors")
        with pytest.raises(NotReadable, match=r"l\.\w+"):
            tp.convert(x, tmp_path / "cast.safetensors", dtype="f16")


def test_a_layer_that_is_not_quantised_yet_holds_numbers() -> None:
    for make in LAYERS.values():
        assert not tp.stats(nn.ModuleDict({"l": make()})).unread
