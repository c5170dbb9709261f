"""The hooks for pre-commit: their entries run, pass sound files, and fail bad ones."""

from __future__ import annotations

import os
import pickle
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

import torchparams as tp
from command import command
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    Captured = pytest.CaptureFixture[str]

HOOKS: dict[str, dict[str, Any]] = {
    hook["id"]: hook for hook in yaml.safe_load((Path(__file__).parents[1] / ".pre-commit-hooks.yaml").read_text())
}


class Attack:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("true",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.safetensors").write_bytes(safetensors_bytes({"w": np.array([1.0, 2.0], np.float32)}))
    tp.save({"w": np.array([1.0, 2.0], np.float32)}, "good.pt")
    Path("nan.safetensors").write_bytes(safetensors_bytes({"w": np.array([1.0, np.nan], np.float32)}))
    Path("attack.ckpt").write_bytes(pickle.dumps({"w": Attack()}))
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:-1])
    Path("large.safetensors").write_bytes(safetensors_bytes({"w": np.ones(2000, np.float32)}))
    return tmp_path


def ran(capsys: Captured, hook: str, *files: str, args: list[str] | None = None) -> int:
    """Exit status of a hook, run as pre-commit runs it: the entry, the arguments, the files that match."""
    about = HOOKS[hook]
    assert all(re.search(about["files"], name) for name in files)
    program, *entry = shlex.split(about["entry"])
    assert program == "torchparams"
    return command(capsys, *entry, *(about.get("args", []) if args is None else args), *files).status


@pytest.mark.parametrize("hook", HOOKS)
def test_sound_files_pass(folder: Path, capsys: Captured, hook: str) -> None:
    assert ran(capsys, hook, "good.safetensors") == 0
    assert ran(capsys, hook, "good.safetensors", "good.pt") == 0


@pytest.mark.parametrize(
    ("hook", "bad", "args"),
    [
        ("torchparams-verify", "attack.ckpt", None),
        ("torchparams-verify", "cut.safetensors", None),
        ("torchparams-values", "nan.safetensors", None),
        ("torchparams-size", "large.safetensors", ["--max-size", "1KB"]),
    ],
)
def test_a_bad_file_fails_alone_and_among_others(
    folder: Path, capsys: Captured, hook: str, bad: str, args: list[str] | None
) -> None:
    assert ran(capsys, hook, bad, args=args) != 0
    assert ran(capsys, hook, "good.safetensors", bad, args=args) != 0


def test_the_hooks_take_checkpoints_and_leave_other_files() -> None:
    for hook in HOOKS.values():
        assert hook["language"] == "python"
        taken = re.compile(hook["files"]).search
        assert taken("a/model.safetensors") and taken("a/pytorch_model-00001-of-00002.bin") and taken("x.pt")
        assert not taken("firmware.bin") and not taken("notes.pt.txt") and not taken("setup.py")
