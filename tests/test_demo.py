"""`make demo` and `make demo-file` print the expected output within 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import demo
import demo_file
import pytest
from run_docs import CHECKPOINT

if TYPE_CHECKING:
    from pathlib import Path


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if len(line) > 80] == []
    return shown


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


def test_the_live_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo.main(tmp_path)
    shown = lines(capsys)
    for line in (
        "   named_parameters()        6    131  the same, with their names",
        "model[2]: ReLU has no parameters.",
        "51 of 131 parameters are trainable, 38.9%",
        "2 changed · 7 equal in value",
        "9 tensors · 164 parameters · 660 B",
    ):
        assert line in shown
    assert any(line.startswith("no findings") for line in shown)
    assert (tmp_path / "trained.safetensors").exists()
    losses = [float(line.split()[3]) for line in shown if line.startswith("step ")]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 2


def test_the_demo_of_a_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKPOINT.parents[1])
    demo_file.main(f"demo/{CHECKPOINT.name}")
    assert "15 tensors · 310 K parameters · 1.18 MiB" in lines(capsys)
