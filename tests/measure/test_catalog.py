"""Catalogs: rows of many checkpoints, resumed after an interruption, in memory that does not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

import torchparams as tp
from command import command
from torchparams.errors import OptionError, SourceError, WriteError
from torchparams.measure import catalog as module
from torchparams.measure.catalog_files import Pieces

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for step in range(6):
        save_file(
            {"w": np.full((2, 3), step, np.float32), "b": np.array([0, np.nan], np.float16)},
            tmp_path / f"step-{step}.safetensors",
        )
    return tmp_path


def table(path: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return sorted(rows, key=lambda row: (row["file"], row["name"] or ""))


def test_rows_are_those_of_the_verbs(run: Path) -> None:
    found = tp.catalog("step-*", digest=True, stats=True)
    assert (found.targets, found.tensors, found.skipped) == (6, 12, 0)
    for row in found.table_rows():
        info, stats = tp.of(row.file).info(row.name), tp.stats(row.file)[row.name]
        assert (row.shape, row.dtype, row.numel, row.nbytes) == (info.shape, info.dtype, info.numel, info.nbytes)
        assert row.location == info.location
        assert row.digest == tp.digest(row.file).tensors[row.name].digest
        assert (row.mean, row.min, row.max, row.l2) == (stats.mean, stats.min, stats.max, stats.l2)
        assert (row.zeros, row.nonfinite) == (stats.zeros, stats.nonfinite)
    plain = tp.catalog(["step-1.safetensors"]).table_rows()[0]
    assert (plain.digest, plain.mean, plain.zeros) == (None, None, None)


def test_files_and_memory_hold_the_same(run: Path) -> None:
    written = tp.catalog("step-*", "c.parquet", digest=True, stats=True)
    kept = tp.catalog("step-*", digest=True, stats=True)
    for a, b in zip(written.table_rows(), kept.table_rows(), strict=True):
        for column in module.COLUMNS:
            x, y = getattr(a, column), getattr(b, column)
            assert (list(x) if isinstance(x, list | tuple) and column == "shape" else x) == pytest.approx(
                list(y) if column == "shape" else y, nan_ok=True
            ), column
    assert pyarrow.table(written).num_rows == 12
    assert pyarrow.table(kept).num_rows == 12


def test_a_call_that_was_interrupted_is_resumed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    opened: list[str] = []
    original = tp.of

    def of(file: Any) -> Any:
        opened.append(str(file))
        if len(opened) == 6:
            raise KeyboardInterrupt
        return original(file)

    monkeypatch.setattr(module, "of", of)
    with pytest.raises(KeyboardInterrupt):
        tp.catalog("step-*", "c.parquet")
    assert len(list((run / "c.parquet").iterdir())) == 2
    found = tp.catalog("step-*", "c.parquet")
    assert (found.skipped, found.tensors) == (4, 4)
    assert opened[6:] == ["step-4.safetensors", "step-5.safetensors"]
    assert [(row["file"], row["name"]) for row in table("c.parquet")] == [
        (f"step-{step}.safetensors", name) for step in range(6) for name in ("b", "w")
    ]


def test_a_checkpoint_that_changed_is_read_again(run: Path) -> None:
    tp.catalog("step-*", "c.parquet", stats=True)
    save_file({"other": np.ones(3, np.float32)}, run / "step-3.safetensors")
    found = tp.catalog("step-*", "c.parquet", stats=True)
    assert found.skipped == 5
    rows = table("c.parquet")
    assert [row["name"] for row in rows if row["file"] == "step-3.safetensors"] == ["other"]
    assert len(rows) == 11


def test_asking_for_more_reads_again(run: Path) -> None:
    tp.catalog("step-*", "c.parquet")
    assert tp.catalog("step-*", "c.parquet", digest=True).skipped == 0
    rows = table("c.parquet")
    assert len(rows) == 12 and all(row["digest"] for row in rows)


def test_what_cannot_be_read_is_a_row_with_the_reason_and_tried_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (run / "step-2.safetensors").read_bytes()
    (run / "step-2.safetensors").write_bytes(b"junk")
    ran = command(capsys, "catalog", "step-*", "-o", "c.parquet")
    assert ran.status == 2 and "not read: 1 checkpoint" in ran.out
    (row,) = [row for row in table("c.parquet") if row["file"] == "step-2.safetensors"]
    assert row["name"] is None and "the file ends after 4 bytes" in row["error"].lower()
    assert command(capsys, "catalog", "step-*", "-o", "c.parquet").status == 2
    assert len(table("c.parquet")) == 11
    (run / "step-2.safetensors").write_bytes(good)
    assert command(capsys, "catalog", "step-*", "-o", "c.parquet").status == 0
    rows = table("c.parquet")
    assert len(rows) == 12 and not any(row["error"] for row in rows)


def test_a_selector_limits_the_rows(run: Path) -> None:
    save_file({"only": np.ones(1, np.float32)}, run / "step-9.safetensors")
    found = tp.catalog("step-*", "c.parquet", selector="w")
    assert (found.tensors, found.errors) == (6, {})
    assert tp.catalog("step-*", "c.parquet", selector="w").skipped == 7


def test_rows_do_not_wait_in_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 4)
    waiting: list[int] = []
    write = Pieces.write

    def counted(self: Any, rows: Any, marks: Any) -> None:
        waiting.append(len(rows))
        write(self, rows, marks)

    monkeypatch.setattr(Pieces, "write", counted)
    found = tp.catalog("step-*", "c.parquet")
    assert waiting == [4, 4, 4] and found.kept == ()


def test_a_directory_of_other_files_is_refused(run: Path) -> None:
    (run / "c").mkdir()
    (run / "c" / "notes.txt").write_text("mine")
    (run / "c" / "draft.unfinished").write_text("mine too")
    with pytest.raises(WriteError, match="other files"):
        tp.catalog("step-*", "c")
    (run / "d").mkdir()
    (run / "d" / "x.parquet").write_bytes(b"none")
    with pytest.raises(WriteError, match="Not a file of a catalog"):
        tp.catalog("step-*", "d")
    with pytest.raises(SourceError):
        tp.catalog("epoch-*")
    with pytest.raises(OptionError):
        tp.catalog([])
    assert (run / "c" / "draft.unfinished").exists()


def test_a_full_disk_leaves_complete_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    import os

    replace, calls = os.replace, []

    def full(a: str, b: str) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WriteError, match="No space left on device"):
        tp.catalog("step-*", "c.parquet")
    assert len(table("c.parquet")) == 4 and len(list((run / "c.parquet").iterdir())) == 1
