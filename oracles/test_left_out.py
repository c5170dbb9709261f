"""Layers of bitsandbytes and of torch's quantisation that keep state outside of parameters and buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: bnb.nn.LinearNF4(64, 64, bias=True),
    "fp4": lambda: bnb.nn.LinearFP4(64, 64, compress_statistics=False),
    "int8": lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
}


def net(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), LAYERS[kind]()).to("cpu")


def snapshot(model: nn.Module) -> Any:
    return [
        (id(p), p.data_ptr(), p._version, p.untyped_storage().resizable(), id(getattr(p, "quant_state", None)))
        for p in model.parameters()
    ]


@pytest.mark.parametrize("kind", LAYERS)
def test_their_state_is_in_the_table_and_reading_changes_nothing(kind: str, tmp_path: Path) -> None:
    model = net(kind)
    before = snapshot(model)
    assert not tp.of(model).left_out
    for result in (tp.ls(model), tp.stats(model), tp.diff(model, model), tp.audit(model)):
        assert "not in the table" not in str(result)
    assert tp.diff(model, model).same
    assert tp.digest(model).digest != tp.digest(net(kind, 1)).digest
    tp.save(model, tmp_path / "model.safetensors")
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", LAYERS)
def test_their_state_dict_is_saved_whole(kind: str, tmp_path: Path) -> None:
    state = net(kind).state_dict()
    path = tmp_path / "model.safetensors"
    tp.save(state, path)
    assert set(tp.of(path, raw=True).names) == set(state)
    assert tp.diff(state, path).same
    assert tp.digest(state).digest == tp.digest(path).digest
    assert tp.verify(path, tp.digest(state)).ok


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation() -> None:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 4), "fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    quantised = quantise(model, {nn.LSTM, nn.Linear})
    assert all(name.startswith("lstm") for name in [each.name for each in tp.of(quantised).left_out])
    assert tp.of(quantised).left_out
    assert tp.of(quantised).info("fc.weight").encoding == "qint8-tensor"
