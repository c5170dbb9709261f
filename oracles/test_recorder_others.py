"""The recorder and histories where other libraries hold the parameters or the files."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import bitsandbytes
import fsspec
import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch import nn

import torchparams as tp
from torchparams.errors import UnsupportedSource

if TYPE_CHECKING:
    from pathlib import Path


def test_quantised_parameters_are_left_out_by_name(tmp_path: Path) -> None:
    model: Any = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64), nn.Linear(64, 2))
    model[0].weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        model[1](torch.randn(3, 64)).sum().backward()
        optimizer.step()
        recorder.step()
    assert tp.history(tmp_path).names == ("0.bias", "1.weight", "1.bias")
    assert "1 quantised parameter not recorded" in str(recorder)
    assert json.loads((tmp_path / "record.json").read_text())["sessions"][0]["quantised"] == ["0.weight"]
    with pytest.raises(UnsupportedSource, match="no parameters to record"):
        tp.Recorder(nn.Identity(), optimizer, tmp_path / "none")


def test_checkpoints_behind_urls(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for step in (2, 10):
        contents = save({"w": np.full(3, step, np.float32)})
        store.pipe(f"/{tmp_path.name}/step-{step}.safetensors", contents)
        store.pipe(f"/{tmp_path.name}/runs/checkpoint-{step}/model.safetensors", contents)
    for target in ("step-*", "runs/", "runs/checkpoint-*"):
        found = tp.history(f"memory://{tmp_path.name}/{target}")
        assert found.steps == (2, 10), target
        assert found["w"]["update_norm"][1] == pytest.approx(8 * math.sqrt(3))
        assert found.label == f"memory://{tmp_path.name}/{'runs/' if 'runs' in target else ''}"
