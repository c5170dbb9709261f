"""The directory of Parquet files that holds a catalog."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from torchparams.errors import WriteError
from torchparams.io.paths import is_url, split_inner
from torchparams.render import parquet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_KEY = b"torchparams.catalog"
VERSION = 1


def fingerprint(target: str) -> str:
    """What changes if a checkpoint does: sizes and times of its files. A URL has none."""
    path = split_inner(target)[0]
    if is_url(path):
        return ""
    try:
        if not os.path.isdir(path):
            status = os.stat(path)
            return f"{status.st_size}-{status.st_mtime_ns}"
        names = sorted(os.listdir(path))
        marks = [(name, status.st_size, status.st_mtime_ns) for name in names for status in [os.stat(f"{path}/{name}")]]
    except OSError:
        return "unreadable"
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


class Pieces:
    """The files of a catalog. Each names in its metadata the checkpoints whose rows it holds.

    Args:
        path: The directory.
        asked: What was asked for beside the listing: rows without it are made again.

    Raises:
        MissingDependency: pyarrow is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], asked: Sequence[str] = ()) -> None:
        self.path = os.fspath(path)
        self._asked = list(asked)
        self._arrow, self._parquet = parquet.pyarrow("to write a catalog")

    def open(self, targets: Iterable[str]) -> dict[str, str]:
        """Make the directory, or read which checkpoints it holds: name → fingerprint.

        Rows of `targets` that changed are removed.

        Raises:
            WriteError: It cannot be made, or holds other files.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
            names = os.listdir(self.path)
        except OSError as error:
            raise WriteError(error.strerror or str(error), where=self.path) from None
        if any(not name.endswith((".parquet", parquet.UNFINISHED)) for name in names):
            raise WriteError("the directory holds other files than a catalog's", where=self.path)
        wanted = set(targets)
        found: dict[str, str] = {}
        for name in self.names():
            head = self._head(name)
            marks: dict[str, str] = head["targets"]
            stale = {each for each, mark in marks.items() if each in wanted and mark != fingerprint(each)}
            if head["asked"] != self._asked:
                stale |= wanted & set(marks)
            if stale:
                self._drop(name, stale)
            found |= {each: mark for each, mark in marks.items() if each not in stale}
        parquet.remove_unfinished(self.path)  # nothing is removed from a directory that is no catalog's
        return found

    def names(self) -> list[str]:
        """The files, in order."""
        return sorted(name for name in os.listdir(self.path) if name.endswith(".parquet"))

    def _head(self, name: str) -> dict[str, Any]:
        path = os.path.join(self.path, name)
        try:
            form: dict[str, Any] = json.loads((self._parquet.read_schema(path).metadata or {})[_KEY])
        except (OSError, KeyError, ValueError, self._arrow.ArrowException):
            raise WriteError(
                "not a file of a catalog", where=path, hint="remove it, or use another directory"
            ) from None
        return form

    def _drop(self, name: str, stale: set[str]) -> None:
        path = os.path.join(self.path, name)
        table = self._parquet.read_table(path)
        keep = [file not in stale for file in table.column("file").to_pylist()]
        marks = {each: mark for each, mark in self._head(name)["targets"].items() if each not in stale}
        if marks:
            self._put(table.filter(self._arrow.array(keep)), marks)
        os.unlink(path)

    def write(self, rows: Sequence[Any], marks: Mapping[str, str]) -> None:
        """Write rows to a new file.

        Args:
            rows: `CatalogRow`s.
            marks: The checkpoints whose rows they are, and their fingerprints.

        Raises:
            WriteError: The disk is full, or cannot be written.
        """
        arrow = self._arrow
        schema = self.schema()
        columns = list(zip(*rows, strict=True)) or [()] * len(schema)
        places = [
            None if place is None else {"file": place.file, "start": place.start, "stop": place.stop}
            for place in columns[schema.get_field_index("location")]
        ]
        arrays = [
            arrow.array(places if field.name == "location" else column, field.type)
            for field, column in zip(schema, columns, strict=True)
        ]
        self._put(arrow.Table.from_arrays(arrays, schema=schema), marks)

    def _put(self, table: Any, marks: Mapping[str, str]) -> None:
        head = json.dumps({"version": VERSION, "asked": self._asked, "targets": dict(marks)}).encode()
        name = hashlib.sha256(head).hexdigest()[:16]
        parquet.write_parquet(table.replace_schema_metadata({_KEY: head}), os.path.join(self.path, f"{name}.parquet"))

    def schema(self) -> Any:
        """The Arrow schema of the table."""
        arrow = self._arrow
        text, whole, real = arrow.utf8(), arrow.int64(), arrow.float64()
        place = arrow.struct([("file", text), ("start", whole), ("stop", whole)])
        return arrow.schema(
            [
                *((name, text) for name in ("file", "name")),
                ("shape", arrow.list_(whole)),
                *((name, text) for name in ("dtype", "encoding")),
                *((name, whole) for name in ("numel", "nbytes")),
                ("location", place),
                ("digest", text),
                *((name, real) for name in ("mean", "std", "min", "max", "l2")),
                *((name, whole) for name in ("zeros", "nonfinite")),
                ("error", text),
            ]
        )

    def rows(self) -> list[Any]:
        """All rows, as objects with the columns as attributes."""
        from types import SimpleNamespace

        from torchparams.info import Location

        found = []
        for name in self.names():
            for row in self._parquet.read_table(os.path.join(self.path, name)).to_pylist():
                place = row.pop("location")
                found.append(SimpleNamespace(**row, location=None if place is None else Location(**place)))
        return found

    def stream(self) -> object:
        """All rows as an Arrow C stream, file by file."""
        schema = self.schema()

        def batches() -> Iterator[Any]:
            for name in self.names():
                table = self._parquet.read_table(os.path.join(self.path, name)).replace_schema_metadata(None)
                yield from table.cast(schema).to_batches()

        reader = self._arrow.RecordBatchReader.from_batches(schema, batches())
        return reader.__arrow_c_stream__()
