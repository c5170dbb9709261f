"""The record on disk: a directory of Parquet files that other tools read without this package.

| file | holds |
|---|---|
| `record.json` | the model and its parameters, the version of the format |
| `parameters-*.parquet` | a row for each step and parameter, or group of parameters |
| `numbers-*.parquet` | a row for each number that was logged: the loss, the learning rate |
| `findings-*.parquet` | a row for each finding of a watchdog |

Each flush writes new files under temporary names and renames them; a file is never changed later. So a killed process
loses only what it had not flushed. A resumed training writes a new *session*: rows of earlier sessions at its first
step or later are marked as overwritten, but kept.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, MissingDependency, WriteError
from torchparams.io.write import replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT = "torchparams.record"
VERSION = 1

HEAD = "record.json"

TABLES: dict[str, dict[str, str]] = {
    "parameters": {
        "step": "int64",
        "session": "int16",
        "kind": "name",
        "name": "name",
        "weight_norm": "float64",
        "mean": "float64",
        "std": "float64",
        "max_abs": "float64",
        "zeros": "float64",
        "nonfinite": "int64",
        "grad_norm": "float64",
        "grad_nonfinite": "int64",
        "update_norm": "float64",
        "update_ratio": "float64",
        "dead_rows": "int64",
        "exponent": "int16",
        "counts": "counts",
    },
    "numbers": {"step": "int64", "session": "int16", "name": "name", "value": "float64"},
    "findings": {
        "step": "int64",
        "session": "int16",
        "rule": "name",
        "name": "name",
        "value": "float64",
        "message": "text",
    },
}
"""Table → column → type. `counts` is a histogram of magnitudes with one bin per power of two, from 2^exponent on."""

_PIECE = re.compile(r"(parameters|numbers|findings)-(\d{6,})\.parquet")


def pyarrow() -> Any:
    """Import `pyarrow` and `pyarrow.parquet`.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise MissingDependency(
            "pyarrow is needed for records of a training", hint="pip install 'torchparams[record]'"
        ) from None


def _types(arrow: Any) -> dict[str, Any]:
    names = arrow.dictionary(arrow.int32(), arrow.utf8())
    return {
        "int64": arrow.int64(),
        "int16": arrow.int16(),
        "float64": arrow.float64(),
        "name": names,
        "text": arrow.utf8(),
        "counts": arrow.list_(arrow.int64()),
    }


def schema_of(table: str) -> Any:
    """The Arrow schema of a table."""
    arrow, _ = pyarrow()
    types = _types(arrow)
    return arrow.schema([(name, types[kind]) for name, kind in TABLES[table].items()])


class Writer:
    """Append to the record in a directory.

    Args:
        path: The directory; created if it does not exist.
        head: Contents of `record.json` besides the format.
        resume: Continue an existing record.

    Attributes:
        session: Number of this session, from 0.
        last: Last step of earlier sessions; None if there are none.

    Raises:
        WriteError: The directory already has a record, or cannot be written.
        FileFormatError: The existing files are not a record.
    """

    def __init__(self, path: str | os.PathLike[str], head: Mapping[str, Any], *, resume: bool = False) -> None:
        pyarrow()
        self.path = os.fspath(path)
        self.session, self.last = 0, None
        self._rows: dict[str, list[Any]] = {table: [] for table in TABLES}
        try:
            os.makedirs(self.path, exist_ok=True)
            names = os.listdir(self.path)
        except OSError as error:
            raise WriteError(error.strerror or str(error), where=self.path) from None
        sessions: list[dict[str, Any]] = []
        if HEAD in names:
            if not resume:
                raise WriteError(
                    "the directory already has a record",
                    where=self.path,
                    hint="use resume=True to continue it, or choose another directory",
                )
            sessions = read_head(self.path)["sessions"]
            self.session = len(sessions)
            self.last = last_step(self.path)
        for name in names:
            if name.endswith(".unfinished"):  # of a process that was killed
                with suppress(OSError):
                    os.unlink(os.path.join(self.path, name))
        self._next = 1 + max((int(found[2]) for name in names if (found := _PIECE.fullmatch(name))), default=-1)
        form = {"format": FORMAT, "version": VERSION, "sessions": [*sessions, dict(head)]}
        replace_file(os.path.join(self.path, HEAD), json.dumps(form, indent=1).encode())

    def add(self, table: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Buffer rows until the next flush.

        Args:
            table: One of `TABLES`.
            columns: Values by column; a missing column is null, and `session` is filled in.
        """
        arrow, _ = pyarrow()
        count = len(next(iter(columns.values())))
        schema = schema_of(table)
        arrays = []
        for field in schema:
            values = columns.get(field.name)
            if field.name == "session":
                values = [self.session] * count
            if values is None:
                arrays.append(arrow.nulls(count, field.type))
            elif isinstance(field.type, arrow.DictionaryType):
                arrays.append(arrow.array(values, arrow.utf8()).dictionary_encode())
            else:
                arrays.append(arrow.array(values, field.type, from_pandas=False))
        self._rows[table].append(arrow.Table.from_arrays(arrays, schema=schema))

    @property
    def nbytes(self) -> int:
        """Number of buffered bytes."""
        return sum(rows.nbytes for kept in self._rows.values() for rows in kept)

    def flush(self) -> None:
        """Write the buffered rows to new files.

        Raises:
            WriteError: Writing failed; the rows stay buffered for the next flush.
        """
        arrow, parquet = pyarrow()
        for table, kept in self._rows.items():
            if not kept:
                continue
            name = os.path.join(self.path, f"{table}-{self._next:06}.parquet")
            rows = arrow.concat_tables(kept).unify_dictionaries().combine_chunks()
            try:
                with open(f"{name}.unfinished", "wb") as file:
                    parquet.write_table(rows, file, compression="zstd")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(f"{name}.unfinished", name)
            except OSError as error:
                raise WriteError(error.strerror or str(error), where=name) from None
            kept.clear()
        self._next += 1


def is_record(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is a record."""
    return os.path.isfile(os.path.join(path, HEAD))


def read_head(path: str) -> dict[str, Any]:
    """Contents of `record.json`.

    Raises:
        FileFormatError: The file is not the head of a record.
    """
    name = os.path.join(path, HEAD)
    try:
        with open(name, "rb") as file:
            found = json.loads(file.read())
    except OSError as error:
        raise FileFormatError(f"no record of a training: {error.strerror or error}", where=name) from None
    except (ValueError, RecursionError):
        raise FileFormatError("not JSON", where=name) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("sessions"), list):
        raise FileFormatError("not the head of a record", where=name)
    if found.get("version") != VERSION:
        raise FileFormatError(
            f"a record of version {found.get('version')}",
            where=name,
            exists=f"this release reads version {VERSION}",
            hint="a newer release of torchparams reads it",
        )
    return found


def read_table(path: str, table: str) -> Any:
    """All rows of a table as a `pyarrow.Table`, in the order in which they were written.

    Raises:
        FileFormatError: A file of the record is damaged.
    """
    arrow, parquet = pyarrow()
    schema = schema_of(table)
    pieces = []
    for name in sorted(os.listdir(path), key=lambda name: (len(name), name)):
        found = _PIECE.fullmatch(name)
        if found is None or found[1] != table:
            continue
        try:
            pieces.append(parquet.read_table(os.path.join(path, name)).select(schema.names).cast(schema))
        except (OSError, arrow.ArrowException, KeyError) as error:
            text = str(error).splitlines()[0]
            raise FileFormatError(f"a damaged file of the record: {text}", where=os.path.join(path, name)) from None
    return arrow.concat_tables(pieces).unify_dictionaries() if pieces else schema.empty_table()


def last_step(path: str) -> int | None:
    """Last step of a record; None if it is empty."""
    steps = read_table(path, "parameters").column("step")
    return int(steps[-1].as_py()) if len(steps) else None
