"""Entries of a checkpoint that are not tensors: in listings, by name, and in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import torchparams as tp
from command import command
from torchparams.errors import MismatchError
from torchparams.testing import safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 3)
    checkpoint = {
        "epoch": 3,
        "best": float("inf"),
        "config": {"dims": [64, 32], "act": "gelu", "a.b": None},
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    torch.save(checkpoint, "run.ckpt")
    return "run.ckpt"


def test_a_listing_ends_with_what_is_beside_the_tensors(run: str, capsys: Captured) -> None:
    expected = [
        "parts that can be listed separately: run.ckpt#model (2 tensors), run.ckpt#optimizer (1 tensor)",
        "beside the tensors: 4 entries",
        "  epoch = 3",
        "  best = inf",
        "  config = {'dims': [64, 32], 'act': 'gelu', 'a.b': None}",
        "  optimizer.param_groups = [{'lr': 0.1, 'params': [0]}]",
    ]
    for options in ((), ("--tree",)):
        assert command(capsys, "ls", run, *options).out.splitlines()[-6:] == expected
    assert "epoch" not in command(capsys, "ls", run, "-s", "model.**").out
    inner = command(capsys, "ls", f"{run}#optimizer").out.splitlines()
    assert inner[-3] == "parts that can be listed separately: run.ckpt#optimizer.state (1 tensor)"


def test_few_lines_of_many_entries(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"w": sample("float32", (2,))}, {f"k{i}": "v" * 500 for i in range(9)}))
    lines = command(capsys, "ls", path).out.splitlines()
    assert lines[-8] == "beside the tensors: 9 entries"
    assert lines[-1] == "  … 3 more; --json has all"
    assert max(map(len, lines[-8:])) <= 80


def test_json_keeps_numbers_lists_and_dicts(run: str, capsys: Captured) -> None:
    assert command(capsys, "ls", run, "--json").json["metadata"] == {
        "epoch": 3,
        "best": "inf",
        "config": {"dims": [64, 32], "act": "gelu", "a.b": None},
        "optimizer.param_groups": [{"lr": 0.1, "params": [0]}],
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epoch", 3),
        ("best", "inf"),
        ("config", {"dims": [64, 32], "act": "gelu", "a.b": None}),
        ("config.dims", [64, 32]),
        ("config.dims.1", 32),
        ("config.a.b", None),
        ("optimizer.param_groups.0.lr", 0.1),
    ],
)
def test_an_entry_is_shown(run: str, capsys: Captured, name: str, value: object) -> None:
    ran = command(capsys, "show", run, name, "--json")
    assert (ran.status, ran.json) == (0, {"source": run, "format": "torch zip", "name": name, "value": value})
    ran = command(capsys, "show", run, name)
    assert ran.status == 0
    assert ran.out.startswith(f"{name}\nrun.ckpt (torch zip), not a tensor\n")


def test_what_is_neither_is_an_error(run: str, capsys: Captured) -> None:
    for name in ("epochs", "config.dims.2", "config.dims.x", "epoch.3"):
        ran = command(capsys, "show", run, name)
        assert ran.status == 2
        assert f"No parameter is named '{name}'" in ran.err


def test_the_part_that_holds_the_model_is_proposed(run: str, capsys: Captured) -> None:
    with pytest.raises(MismatchError, match=r"Load 'run\.ckpt#model'"):
        tp.load(nn.Linear(2, 3), run)
    tp.save(tp.of(f"{run}#model"), "weights.safetensors")
    for mine, yours in ((run, "weights.safetensors"), ("weights.safetensors", run)):
        ran = command(capsys, "diff", mine, yours)
        assert ran.status == 1
        assert "compare run.ckpt#model: it has the tensors of the other source" in ran.out
        assert command(capsys, "diff", mine, yours, "--json").json["part"] == "run.ckpt#model"
    assert command(capsys, "diff", f"{run}#model", "weights.safetensors").status == 0


def test_files_of_lightning(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 1, "pytorch-lightning_version": "2", "state_dict": nn.Linear(2, 2).state_dict()}, path)
    out = command(capsys, "ls", path).out
    assert f"parts that can be listed separately: {path}#state_dict (2 tensors)" in out
    with pytest.raises(MismatchError, match=r"Load '.*last\.ckpt#state_dict'"):
        tp.load(nn.Linear(2, 2), path)
