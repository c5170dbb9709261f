"""`torchparams digest`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

import torchparams as tp
from command import command
from torch_files import saved
from torchparams.testing import safetensors_bytes, sample, to_torch

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]
ARRAYS = {"a.weight": sample("bfloat16", (2, 3)), "a.bias": sample("float32", (3,))}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(ARRAYS))
    (tmp_path / "model.pt").write_bytes(saved({name: to_torch(array) for name, array in ARRAYS.items()}))
    return tmp_path


def test_one(folder: Path, capsys: Captured) -> None:
    digests = tp.digest(ARRAYS)
    ran = command(capsys, "digest", "model.safetensors")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == (
        "model.safetensors (safetensors)\n"
        "name      shape   dtype     digest\n"
        f"a.weight  [2, 3]  bfloat16  {digests.tensors['a.weight'].digest}\n"
        f"a.bias    [3]     float32   {digests.tensors['a.bias'].digest}\n"
        "2 tensors · 24 B · digest of the set:\n"
        f"{digests.digest}\n"
    )
    assert command(capsys, "digest", "model.pt", "--json").json == tp.digest("model.pt").to_json()
    assert list(command(capsys, "digest", "model.pt", "--json", "-s", "**.bias").json["tensors"]) == [
        digests.tensors["a.bias"].to_json()
    ]


def test_several(folder: Path, capsys: Captured) -> None:
    ran = command(capsys, "digest", "model.safetensors", "model.pt")
    assert ran.status == 0
    assert ran.out.endswith(
        "\n\n"
        "same content                   names  copies  extra\n"
        "[2, 3] bfloat16, 12 B              2       2   12 B\n"
        "  model.safetensors: a.weight\n"
        "  model.pt: a.weight\n"
        "[3] float32, 12 B                  2       2   12 B\n"
        "  model.safetensors: a.bias\n"
        "  model.pt: a.bias\n"
        "2 tensors under several names; copies cost 24 B\n"
    )
    assert command(capsys, "digest", "model.safetensors", "model.pt", "--json").json["extra_bytes"] == 24


def test_a_manifest(folder: Path, capsys: Captured) -> None:
    digests = tp.digest("model.pt")
    ran = command(capsys, "digest", "model.pt", "-o", "manifest.json")
    assert (ran.status, ran.out) == (0, f"{digests.digest}  manifest.json\n")
    assert json.loads((folder / "manifest.json").read_text()) == digests.manifest()
    assert command(capsys, "digest", "model.pt", "-o", "manifest.json", "--json").json == digests.to_json()


def test_a_live_model(folder: Path, capsys: Captured) -> None:
    (folder / "net.py").write_text("import torch\ndef build():\n    return torch.nn.BatchNorm1d(3)\n")
    ran = command(capsys, "digest", "net:build", "--json")
    assert ran.json["digest"] == tp.digest(torch.nn.BatchNorm1d(3)).digest


def test_errors(folder: Path, capsys: Captured) -> None:
    for arguments, message in (
        (("nothing.pt",), "torchparams: nothing.pt: No such file or directory"),
        (
            ("model.pt", "-o", "model.safetensors"),
            "torchparams: model.safetensors: The file exists, and is not a manifest. Delete it, or choose "
            "another name.",
        ),
        (
            ("model.pt", "model.safetensors", "-o", "x"),
            "torchparams: Invalid value for -o: a manifest covers one target, but there are 2. "
            "See torchparams digest --help",
        ),
    ):
        ran = command(capsys, "digest", *arguments)
        assert (ran.status, ran.out) == (2, "")
        assert ran.err.split("\n")[0].startswith(message)
    assert command(capsys, "digest", "model.pt", "-s", "b.**").status == 2
