"""`torchparams merge`, `lora fold` and `lora extract`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import torchparams as tp
from command import command
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, value in (("base", 0.0), ("a", 1.0), ("b", 3.0), ("c", 5.0)):
        arrays = {f"layers.{i}.w.weight": np.full((2, 2), value, np.float32) for i in range(3)}
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes(arrays))
    return tmp_path


A, B, C, BASE, OUT = (f"{name}.safetensors" for name in ("a", "b", "c", "base", "out"))


def values(path: str = OUT) -> list[float]:
    return [float(tp.of(path).numpy(name)[0, 0]) for name in tp.of(path).names]


def test_merging_two(folder: Path, capsys: Captured) -> None:
    ran = command(capsys, "merge", A, B, OUT, "-w", "0.25")
    assert (ran.status, ran.err) == (0, "")
    assert values() == [1.5, 1.5, 1.5]
    first, *notes = ran.out.splitlines()
    assert first.startswith("out.safetensors: 3 tensors, ")
    assert notes == [
        "method: weighted sum (model soup, Wortsman et al. 2022, arXiv:2203.05482); computed in float32, rounded once",
        "weights 0.75 a.safetensors, 0.25 b.safetensors, of 3 tensors",
        "memory: at most 256 MiB for tensors",
    ]
    ran = command(capsys, "merge", A, B, OUT)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == (
        "torchparams: out.safetensors: It exists already. "
        "To replace it once the new one is complete, pass overwrite=True (--force).\n"
    )
    assert command(capsys, "merge", A, B, A, "--force", "--json").json["tensors"] == 3
    assert values(A) == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([A, B, C], [3, 3, 3]),
        ([A, B, C, "-w", "0.5,0.25,0.5"], [3.75] * 3),
        ([A, B, C, "-w", "0.5", "-w", "0.25", "-w", "0.5"], [3.75] * 3),
        ([A, B, "-w", "layers.{0..1}.**=0.25"], [1.5, 1.5, 2]),
        ([A, B, "-w", "[name=layers.0.w.weight]=0,2", "-w", "0.25"], [6, 1.5, 1.5]),
        ([A, B, "-w", "**=0", "-w", "layers.1.**=1"], [1, 3, 1]),
        ([A, B, "-w", "layers.1.**=1", "-w", "**=0", "-w", "layers.1.**=0.5"], [1, 2, 1]),
        ([A, B, "-w", "2,2", "--normalize"], [2, 2, 2]),
        ([A, B, "-m", "slerp", "-w", "0.5"], [2, 2, 2]),
        ([A, B, "-m", "task_arithmetic", "--base", BASE, "--scale", "0.5"], [2, 2, 2]),
        ([A, B, "-m", "ties", "-b", BASE, "-d", "0.5"], [2, 2, 2]),
        ([A, "-m", "dare", "-b", BASE, "-w", "-2", "--seed", "3", "-d", "layers.0.**=1", "-d", "1"], [-2, -2, -2]),
    ],
)
def test_weights(arguments: list[str], expected: list[float], folder: Path, capsys: Captured) -> None:
    count = sum(argument in (A, B, C) for argument in arguments)
    ran = command(capsys, "merge", *arguments[:count], OUT, *arguments[count:])
    assert (ran.status, ran.err) == (0, "")
    assert values() == expected


def test_a_dry_run_writes_nothing(folder: Path, capsys: Captured) -> None:
    ran = command(capsys, "merge", A, B, OUT, "-m", "slerp", "-w", "0.3", "--dry-run")
    assert ran.status == 0
    assert "layers.0.w.weight  [2, 2]  float32  16 B  slerp(layers.0.w.weight, t=0.3)" in ran.out
    told = command(capsys, "merge", A, B, OUT, "-n", "--json", "--dtype", "bf16", "-s", "layers.0.**").json
    assert [(tensor["name"], tensor["dtype"]) for tensor in told["tensors"]] == [("layers.0.w.weight", "bfloat16")]
    assert not (folder / OUT).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([A], "Invalid value for SOURCE... TARGET: name the sources, and the output last."),
        ([A, OUT], "Method 'linear' takes 2 or more sources, but there is 1"),
        (
            [A, B, OUT, "-w", "x"],
            "Invalid value for --weight: 'x' is not a number, or several separated by commas.",
        ),
        (
            [A, B, OUT, "-d", "0.5,"],
            "Invalid value for --density: '0.5,' is not a number, or several separated by commas.",
        ),
        (
            [A, B, OUT, "-w", "1,2,3"],
            "3 numbers for 2 sources: weights=[1.0, 2.0, 3.0]. Pass one number per source, or a single number.",
        ),
        ([A, B, OUT, "-w", "nan"], "Weights must be finite numbers, not nan"),
        (
            [A, B, OUT, "-m", "ties"],
            "Method 'ties' needs the base that the sources were tuned from. Pass base=… (--base BASE).",
        ),
        ([A, B, OUT, "--seed", "1"], "Method 'linear' does not take seed. Methods with seed are dare, dare_ties."),
        ([A, "nothing.pt", OUT], "nothing.pt: No such file or directory"),
        (
            [A, B, OUT, "-w", "layer.0.**=0.5"],
            "a.safetensors: `layer.0.**` matches nothing. No name has the component 'layer'. "
            "Did you mean `layers.0.**` (1 parameter)?",
        ),
    ],
)
def test_errors(arguments: list[str], message: str, folder: Path, capsys: Captured) -> None:
    ran = command(capsys, "merge", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.removeprefix("torchparams: ").removesuffix("\n").removesuffix(" See torchparams merge --help") == (
        message
    )
    assert not (folder / OUT).exists()


def test_a_lora_adapter_there_and_back(folder: Path, capsys: Captured) -> None:
    ran = command(capsys, "lora", "extract", BASE, A, "adapter", "--rank", "1", "-s", "layers.{0,1}.**")
    assert (ran.status, ran.err) == (0, "")
    head, first = (line.split() for line in ran.out.splitlines()[1:3])
    assert head == ["name", "shape", "rank", "norm", "relative", "error"]
    assert first[1:5] == ["[2,", "2]", "1", "2"]
    assert float(first[5]) < 1e-6
    ran = command(capsys, "lora", "fold", BASE, "adapter/", OUT, "--scale", "2", "--no-fan-in-fan-out")
    assert (ran.status, ran.err) == (0, "")
    assert values() == pytest.approx([2, 2, 0], abs=1e-6)
    told = command(capsys, "lora", "extract", BASE, A, "adapter", "-r", "1", "-f", "--json", "--base-name", "x").json
    assert [change["rank"] for change in told["changes"]] == [1, 1, 1]
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "x"
    ran = command(capsys, "lora", "fold", BASE, "adapter", "more.safetensors", "-n", "--json", "--no-fan-in-fan-out")
    dry: dict[str, Any] = ran.json
    assert dry["tensors"][0]["from"]["operation"] == "folded"
    assert command(capsys, "lora", "extract", BASE, A, "other", "-r", "1", "-n").out.startswith(
        "plan: other/adapter_model.safetensors (safetensors)\n"
    )
    assert not (folder / "other").exists()


def test_help_of_the_group(capsys: Captured) -> None:
    plain = command(capsys, "lora")
    assert plain.status == 0
    assert plain.out == command(capsys, "lora", "--help").out
    for name in ("fold", "extract"):
        assert f"  Examples:\n    torchparams lora {name} " in command(capsys, "lora", name, "-h").out


def test_errors_of_lora(folder: Path, capsys: Captured) -> None:
    ran = command(capsys, "lora", "fold", BASE, "nowhere", OUT)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == (
        "torchparams: nowhere/adapter_config.json: No such file or directory. "
        "An adapter is a directory saved by PEFT.\n"
    )
    ran = command(capsys, "lora", "extract", BASE, BASE, "adapter", "-r", "1")
    assert ran.err == "torchparams: base.safetensors and base.safetensors: The checkpoints do not differ\n"
