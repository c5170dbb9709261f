"""Directories of trainers: the weights are meant, and the rest follows `#`."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed import checkpoint

import torchparams as tp
from torchparams.errors import SourceError
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A layer and its optimizer after a step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return layer, optimizer


def arrays(layer: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in layer.state_dict().items()}


def trainer(folder: Path) -> torch.nn.Module:
    """What transformers' Trainer saves."""
    layer, optimizer = trained()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(arrays(layer), {"format": "pt"}))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 5, "base_lrs": [0.1]}, folder / "scheduler.pt")
    torch.save({"python": random.getstate(), "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text("{}")
    return layer


def test_a_trainers_directory(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    layer = trainer(folder)
    assert tp.diff(folder, layer).same
    assert "state.0.exp_avg" in tp.of(f"{folder}#optimizer").names
    assert tp.of(f"{folder}#optimizer.state.0").names == ["step", "exp_avg", "exp_avg_sq"]
    assert tp.of(f"{folder}#scheduler").metadata == {"last_epoch": 5, "base_lrs": [0.1]}
    assert tp.of(f"{folder}#scheduler").names == []
    assert "cpu" in tp.of(f"{folder}#rng_state").names
    with pytest.raises(SourceError, match="have no nested mappings"):
        tp.of(f"{folder}#other")


def test_a_directory_with_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    layer = trainer(folder)
    (folder / "model.safetensors").unlink()
    tp.convert(layer, folder / "shards", max_shard_size=10).run()
    for path in (folder / "shards").iterdir():
        path.rename(folder / path.name)
    assert tp.diff(folder, layer).same
    assert "state.0.exp_avg" in tp.of(f"{folder}#optimizer").names


def saved(state: Mapping[str, Any], folder: Path) -> None:
    save: Any = checkpoint
    save.save(dict(state), checkpoint_id=folder, no_dist=True)


def test_a_directory_of_accelerate_with_fsdp(tmp_path: Path) -> None:
    layer, optimizer = trained()
    saved({"model": layer.state_dict()}, tmp_path / "pytorch_model_fsdp_0")
    saved({"optimizer": {"state": {"weight": optimizer.state_dict()["state"][0]}}}, tmp_path / "optimizer_0")
    (tmp_path / "random_states_0.pkl").write_bytes(b"\x80\x04N.")
    params = tp.of(tmp_path)
    assert tp.diff(params, layer).same
    assert str(tp.ls(params)).startswith(f"{tmp_path} (distributed checkpoint)\n")
    assert set(tp.of(f"{tmp_path}#optimizer").names) == {
        "state.weight.exp_avg", "state.weight.exp_avg_sq", "state.weight.step"
    }  # fmt: skip
    assert tp.of(f"{tmp_path}#optimizer.state").names[0].startswith("weight.")


def test_a_directory_of_lightning_with_fsdp(tmp_path: Path) -> None:
    layer, optimizer = trained()
    state = {"weight": optimizer.state_dict()["state"][0]}
    saved({"model": layer.state_dict(), "optimizer_0": {"state": state}}, tmp_path)
    torch.save({"epoch": 3, "global_step": 30}, tmp_path / "meta.pt")
    assert tp.diff(tmp_path, layer).same
    assert "state.weight.exp_avg" in tp.of(f"{tmp_path}#optimizer_0").names
    assert tp.of(f"{tmp_path}#meta").metadata == {"epoch": 3, "global_step": 30}


@pytest.mark.parametrize("names", [("checkpoint-90", "checkpoint-100"), ("step-90", "step-100")])
def test_a_directory_of_steps_proposes_the_last(training: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        shutil.copytree(training / "dcp-2", tmp_path / name)
    with pytest.raises(SourceError) as caught:
        tp.of(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: There is no checkpoint in this directory. There are {names[1]}/, {names[0]}/. "
        f"Did you mean {tmp_path}/{names[1]}?"
    )


def test_a_file_called_latest_that_is_no_tag(tmp_path: Path) -> None:
    trainer(tmp_path / "step_5")
    (tmp_path / "latest").write_text("step_5")
    with pytest.raises(SourceError, match=r"There is no checkpoint in this directory.*Did you mean .*step_5\?"):
        tp.of(tmp_path)
