"""Files of tables are replaced as a whole, or not at all."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet
import pytest

from torchparams.errors import MissingDependency, UnsupportedSource, WriteError
from torchparams.render import parquet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OLD, NEW = pyarrow.table({"x": [1]}), pyarrow.table({"x": [2, 3]})


def fails(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_table_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for table in (OLD, NEW):
        parquet.write_parquet(table, str(path))
        assert pyarrow.parquet.read_table(path) == table
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("broken", [(pyarrow.parquet, "write_table"), (os, "fsync"), (os, "replace")])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failing_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[object, str], exists: bool
) -> None:
    path = tmp_path / "x.parquet"
    if exists:
        parquet.write_parquet(OLD, str(path))
    before = [*tmp_path.iterdir()]
    with monkeypatch.context() as patch, pytest.raises(WriteError, match=r"x\.parquet: No space left on device"):
        patch.setattr(*broken, fails)
        parquet.write_parquet(NEW, str(path))
    assert [*tmp_path.iterdir()] == before
    if exists:
        assert pyarrow.parquet.read_table(path) == OLD


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, lambda: UnsupportedSource("odd")])
def test_any_error_in_the_middle_leaves_the_old_file_and_is_raised(
    tmp_path: Path, error: Callable[[], BaseException]
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"old")
    raised = error()
    with pytest.raises(type(raised)) as found, parquet.replacing(str(path)) as file:
        file.write(b"half")
        raise raised
    assert found.value is raised
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"old"


def test_until_the_end_the_old_file_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"old")
    with parquet.replacing(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old" and len([*tmp_path.iterdir()]) == 2
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"new"


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    for name in ("a.parquet", f"a.parquet.0123abcd{parquet.UNFINISHED}", f"b.parquet{parquet.UNFINISHED}"):
        (tmp_path / name).touch()
    parquet.remove_unfinished(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency) as found:
        parquet.pyarrow("to write a catalog", extra="record")
    assert str(found.value) == "pyarrow is needed to write a catalog. pip install 'torchparams[record]'."
