"""Several targets in one command: a line each and one exit status, also where one cannot be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from command import command
from torchparams.errors import SourceError
from torchparams.io.patterns import expanded, is_pattern

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for step in (5, 10, 100):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        weight = np.full((2, 3), step, np.float32) + np.arange(6, dtype=np.float32).reshape(2, 3)
        save_file({"w": weight, "b": np.arange(2, dtype=np.float32)}, folder / "model.safetensors")
    return tmp_path


def spoil(run: Path) -> None:
    save_file({"w": np.array([1, np.nan], np.float32)}, run / "step-10" / "model.safetensors")
    (run / "step-100" / "model.safetensors").write_bytes(b"junk")


def test_patterns_are_in_natural_order(run: Path) -> None:
    assert expanded(["step-*"]) == ["step-5", "step-10", "step-100"]
    assert expanded(["step-5", "step-1*/model.safetensors#x"]) == [
        "step-5",
        "step-10/model.safetensors#x",
        "step-100/model.safetensors#x",
    ]
    (run / "odd[1]").mkdir()
    assert not is_pattern("odd[1]") and expanded(["odd[1]"]) == ["odd[1]"]
    with pytest.raises(SourceError, match="matches nothing"):
        expanded(["epoch-*"])


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "ls", "step-*")
    assert (ran.status, ran.err) == (0, "")
    assert [line.split()[0] for line in ran.out.splitlines()] == ["target", "step-5", "step-10", "step-100", "3"]
    form = command(capsys, "ls", "step-5", "step-10", "-s", "w", "--json").json
    assert form["outcome"] == "fine"
    assert [(each["target"], len(each["parameters"])) for each in form["targets"]] == [("step-5", 1), ("step-10", 1)]
    assert command(capsys, "ls", "step-*", "--tree").status == 2
    assert command(capsys, "ls", "epoch-*").status == 2
    one = command(capsys, "ls", "step-5*")
    assert one.out == command(capsys, "ls", "step-5").out  # a pattern that matches one is that one


def test_one_status_is_the_worst(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "stats", "--check", "step-*").status == 0
    spoil(run)
    ran = command(capsys, "stats", "--check", "step-5", "step-10")
    assert ran.status == 1
    assert "1 non-finite (w)" in ran.out and "2 targets: 1 fine, 1 with findings" in ran.out
    ran = command(capsys, "stats", "--check", "step-*")
    assert ran.status == 2 and "3 targets: 1 fine, 1 with findings, 1 not read" in ran.out
    form = command(capsys, "stats", "--check", "step-*", "--json").json
    assert [each["outcome"] for each in form["targets"]] == ["fine", "finding", "error"]
    assert "The file ends after 4 bytes" in form["targets"][2]["error"]
    assert command(capsys, "stats", "--check", "--rules", "zero", "step-5", "step-10").status == 0
    assert command(capsys, "stats", "step-*").status == 2


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "verify", "step-*").status == 0
    assert command(capsys, "digest", "step-5", "-o", "m.json").status == 0
    alone = command(capsys, "verify", "step-5", "m.json")
    assert alone.status == 0 and alone.out == command(capsys, "verify", "step-5", "--manifest", "m.json").out
    for arguments in (["step-5", "step-10", "m.json"], ["step-5", "step-10", "--manifest", "m.json"]):
        ran = command(capsys, "verify", *arguments)
        assert ran.status == 1 and "1 difference, first w" in ran.out
    spoil(run)
    ran = command(capsys, "verify", "step-5", "step-100")
    assert ran.status == 1 and "structure" in ran.out
    assert command(capsys, "verify", "step-5", "nothing.json").status == 2


def test_digest_keeps_the_table_of_what_is_shared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "digest", "step-5", "step-10")
    assert ran.status == 0
    assert "step-10/model.safetensors: b" in ran.out and "copies cost 8 B" in ran.out
    spoil(run)
    ran = command(capsys, "digest", "step-*")
    assert ran.status == 2 and "3 targets: 2 fine, 1 not read" in ran.out
    form = command(capsys, "digest", "step-*", "--json").json
    assert len(form["sources"]) == 2 and set(form["errors"]) == {"step-100"}
    assert command(capsys, "digest", "step-*", "-o", "m.json").status == 2


def test_stats_check_names_the_first_tensor_of_each_kind(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "a": np.full((3, 4), 2, np.float32),
        "b": np.full(3, np.nan, np.float32),
        "c": np.full(3, np.inf, np.float32),
    }
    save_file(tensors, run / "step-5" / "model.safetensors")
    ran = command(capsys, "stats", "--check", "step-5", "step-10")
    assert ran.status == 1
    assert ran.out.splitlines()[1].endswith("2 non-finite (b, …), 1 constant (a)")
    ran = command(capsys, "stats", "--check", "--rules", "constant", "step-5", "step-10")
    assert [line.split(maxsplit=2)[2] for line in ran.out.splitlines()[1:3]] == ["1 constant (a)", "none"]


def test_several_targets_have_no_table_of_statistics(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "stats", str(run / "step-1.safetensors"), str(run / "step-1.safetensors"), "-q", "0.5")
    assert ran.status == 2
    assert "Several targets need --check, which shows a line for each; name one target for its table" in ran.err
