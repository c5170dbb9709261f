"""`torchparams verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

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
    tp.digest(ARRAYS).write("manifest.json")
    return tmp_path


def test_as_the_manifest_says(folder: Path, capsys: Captured) -> None:
    ran = command(capsys, "verify", "model.safetensors", "manifest.json")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == (
        "model.safetensors (safetensors)\n"
        "check          result\n"
        "digests    ok  2 of 2 tensors as in the manifest\n"
        "structure  ok  sizes and byte ranges of the safetensors file are consistent\n"
        "2 tensors, 24 B: matches the manifest.\n"
    )
    assert command(capsys, "verify", "model.pt", "manifest.json", "--json").json["ok"] is True


def test_a_difference(folder: Path, capsys: Captured) -> None:
    contents = bytearray((folder / "model.safetensors").read_bytes())
    contents[-1] ^= 1
    (folder / "model.safetensors").write_bytes(contents)
    ran = command(capsys, "verify", "model.safetensors", "manifest.json", "--json")
    assert (ran.status, ran.err) == (1, "")
    assert [(d["name"], d["kind"]) for d in ran.json["differences"]] == [("a.bias", "content")]
    assert command(capsys, "verify", "model.safetensors", "manifest.json", "-s", "**.weight").status == 0
    assert command(capsys, "verify", "model.safetensors", "manifest.json").out.endswith(
        "\n2 tensors, 24 B: 1 with different content.\n"
    )


def test_without_a_manifest(folder: Path, capsys: Captured) -> None:
    assert command(capsys, "verify", "model.pt").status == 0
    contents = bytearray((folder / "model.pt").read_bytes())
    at = tp.of("model.pt").info("a.bias").location
    assert at is not None
    contents[at.start] ^= 1
    (folder / "model.pt").write_bytes(contents)
    ran = command(capsys, "verify", "model.pt")
    assert ran.status == 1
    assert "CRC-32 of archive/data/1  failed" in ran.out
    assert ": a.bias\n" in ran.out
    (folder / "model.pt").write_bytes(contents[:-1])
    ran = command(capsys, "verify", "model.pt")
    assert (ran.status, ran.err) == (1, "")
    assert ran.out.startswith("model.pt\ncheck              result\nstructure  failed  The zip is cut off")


def test_errors(folder: Path, capsys: Captured) -> None:
    for arguments, message in (
        (("nothing.pt",), "torchparams: nothing.pt: No such file or directory"),
        (("model.pt", "nothing.json"), "torchparams: nothing.json: No such file or directory\n"),
        (
            ("model.pt", "--manifest", "model.safetensors"),
            "torchparams: model.safetensors: Not a manifest: it starts with b'",
        ),
        (("model.pt", "manifest.json", "-s", "b.**"), "torchparams: model.pt: "),
    ):
        ran = command(capsys, "verify", *arguments)
        assert (ran.status, ran.out) == (2, "")
        assert ran.err.startswith(message)


def test_a_size_limit(folder: Path, capsys: Captured) -> None:
    size = (folder / "model.safetensors").stat().st_size
    ran = command(capsys, "verify", "model.safetensors", "--max-size", size)
    assert ran.status == 0
    ran = command(capsys, "verify", "model.safetensors", "--max-size", size - 1)
    assert (ran.status, ran.err) == (1, "")
    assert f"size       failed        {size} B; the limit is {size - 1} B\n" in ran.out
    assert command(capsys, "verify", "model.safetensors", "--max-size", "much").status == 2
    assert [check.outcome for check in tp.verify(ARRAYS, max_nbytes=1).checks if check.what == "size"] == [
        "not possible"
    ]
