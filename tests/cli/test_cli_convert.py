"""`torchparams convert`, `delta` and `apply`."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]
WEIGHTS = {
    "model.fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model.norm.weight": np.ones(2, np.float32),
    "step": np.array(3),
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(WEIGHTS, {"format": "pt"}))
    return "model.safetensors"


def test_to_a_torch_file(model: str, capsys: Captured) -> None:
    ran = command(capsys, "convert", model, "model.pt")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("model.pt: 3 tensors, ")
    loaded = torch.load("model.pt", weights_only=True)
    assert loaded["model.fc.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_dry_run_writes_nothing(model: str, tmp_path: Path, capsys: Captured) -> None:
    ran = command(
        capsys, "convert", model, "out.safetensors", "-s", "model.**", "--strip-prefix", "model.",
        "--rename", "^norm=ln", "--dtype", "bf16", "--dtype", "model.norm.*=f32", "--metadata", "by=me=you", "-n",
    )  # fmt: skip
    assert ran.out == (
        "plan: out.safetensors (safetensors)\n"
        "name       shape   dtype     size  from\n"
        "fc.weight  [2, 3]  bfloat16  12 B  model.fc.weight as bfloat16\n"
        "ln.weight  [2]     float32    8 B  model.norm.weight\n"
        "2 tensors · 204 B · 8 B copied unchanged · 12 B computed\n"
        "selected: 2 of 3 tensors\n"
    )
    assert (ran.status, ran.err, [path.name for path in tmp_path.iterdir()]) == (0, "", [model])
    told = command(capsys, "convert", model, "out.safetensors", "--metadata", "by=me=you", "-n", "--json").json
    assert told["metadata"] == {"format": "pt", "by": "me=you"}


def test_in_shards_and_joined(model: str, capsys: Captured) -> None:
    told = command(capsys, "convert", model, "out/", "--max-shard-size", "24", "--json").json
    assert [file["name"] for file in told["files"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    command(capsys, "convert", "out", "joined.safetensors")
    assert tp.digest("joined.safetensors").digest == tp.digest(model).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["model.safetensors"],
            "model.safetensors: The target is a source. Write elsewhere; or, to replace it once the new one is "
            "complete, pass overwrite=True (--force).",
        ),
        (
            ["x.safetensors", "--dtype", "step=i8", "--dtype", "f17"],
            "Unknown dtype 'f17'. Use a spelling of torch, numpy or safetensors, such as bfloat16, bf16, float32, F32, "
            "float8_e4m3fn, int64.",
        ),
        (
            ["x.safetensors", "-s", "norm.**"],
            "model.safetensors: `norm.**` matches nothing. A glob matches whole names; this is only the end of "
            "1 parameter. Did you mean `**.norm.**`?",
        ),
        (
            ["x.gguf"],
            "x.gguf: The suffix '.gguf' does not name a format. Known suffixes are .safetensors .pt .pth .bin .ckpt. "
            "For a directory of safetensors, write x.gguf/.",
        ),
        (
            ["x.safetensors", "--metadata", "me"],
            "Invalid value for --metadata: 'me' is not KEY=TEXT. See torchparams convert --help",
        ),
        ([], "Invalid value for TARGET: TARGET is missing: name a file or a directory. See torchparams convert --help"),
        (
            ["x", "--repair-index"],
            "Invalid value for TARGET: an index is repaired in place: omit TARGET. See torchparams convert --help",
        ),
    ],
)
def test_errors(arguments: list[str], message: str, model: str, tmp_path: Path, capsys: Captured) -> None:
    ran = command(capsys, "convert", model, *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == f"torchparams: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == [model]


def test_overflow(model: str, capsys: Captured) -> None:
    tp.save({"w": np.array([1e9], np.float32)}, "large.safetensors")
    ran = command(capsys, "convert", "large.safetensors", "x.safetensors", "--dtype", "f16")
    assert (ran.status, ran.err) == (
        2,
        "torchparams: x.safetensors: 1 value of 'w' is too large for float16. Nothing was written. Choose a wider "
        "dtype, or pass allow_overflow=True (--allow-overflow).\n",
    )
    ran = command(capsys, "convert", "large.safetensors", "x.safetensors", "--dtype", "f16", "--allow-overflow")
    assert ran.out.splitlines()[1:] == [
        "name  from     to       numel  overflow  underflow  changed",
        "w     float32  float16      1         1          0        1",
    ]


def test_tensors_that_were_only_rounded_are_one_row(model: str, capsys: Captured) -> None:
    weights = {f"layers.{i}.weight": np.full(4, 1.1, np.float32) for i in range(219)}
    weights["layers.7.weight"][0] = 1e-30
    tp.save(weights, "layers.safetensors")
    ran = command(capsys, "convert", "layers.safetensors", "x.safetensors", "--dtype", "f16")
    assert ran.out.splitlines()[1:] == [
        "name                  from     to       numel  overflow  underflow  changed",
        "layers.7.weight       float32  float16      4         0          1        4",
        "218 tensors, rounded  float32  float16    872         0          0      872",
    ]


def test_in_place_by_force(model: str, capsys: Captured) -> None:
    assert command(capsys, "convert", model, model, "--dtype", "bf16", "--force").status == 0
    assert str(tp.of(model).info("model.fc.weight").dtype) == "bfloat16"


def test_an_index(model: str, tmp_path: Path, capsys: Captured) -> None:
    command(capsys, "convert", model, "out/", "--max-shard-size", "24")
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.unlink()
    assert command(capsys, "convert", "--repair-index", "out", "--dry-run").out == (
        "out/model.safetensors.index.json: 3 tensors in 2 shards, 40 B\nthere was no index\n"
    )
    assert not index.exists()
    assert command(capsys, "convert", "--repair-index", "out", "--json").json["tensors"] == 3
    assert index.exists()


def test_a_delta_and_back(model: str, capsys: Captured) -> None:
    tp.save({**WEIGHTS, "step": np.array(4)}, "tuned.safetensors")
    ran = command(capsys, "delta", model, "tuned.safetensors", "delta.safetensors")
    assert ran.out.splitlines()[1] == "a delta: 1 tensor differs, 0 are new, 0 are gone"
    assert command(capsys, "apply", model, "delta.safetensors", "again.safetensors", "--dry-run").out == (
        "plan: again.safetensors (safetensors)\n"
        "name               shape   dtype    size  from\n"
        "model.fc.weight    [2, 3]  float32  24 B  unchanged from model.safetensors\n"
        "model.norm.weight  [2]     float32   8 B  unchanged from model.safetensors\n"
        "step               []      int64     8 B  unchanged from delta.safetensors\n"
        "3 tensors · 280 B · 40 B copied unchanged\n"
        "1 tensor from the delta, 2 tensors from the base\n"
    )
    command(capsys, "apply", model, "delta.safetensors", "again.safetensors")
    assert tp.digest("again.safetensors").digest == tp.digest("tuned.safetensors").digest
    ran = command(capsys, "apply", "tuned.safetensors", "delta.safetensors", "no.safetensors")
    assert ran.status == 2
    assert "The delta belongs to another base" in ran.err
    assert command(capsys, "delta", model, "tuned.safetensors", "delta.safetensors", "-n", "-f", "--json").json[
        "tensors"
    ][0]["name"] == "step"  # fmt: skip


def test_it_never_imports_torch(model: str) -> None:
    code = "import sys; from torchparams.cli.app import run; run(sys.argv[1:]); print('torch' in sys.modules)"
    for arguments in (["convert", model, "x.pt", "--dtype", "bf16"], ["convert", "x.pt", "out/"]):
        ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert ran.stdout.endswith("False\n")
