"""The record on disk: a directory of Parquet files that other tools read without this package.

| file | holds |
|---|---|
| `record.json` | the model and its parameters in each session, the version of the format |
| `last_step.json` | the last step of the training at the last flush, recorded or not |
| `parameters-*.parquet` | a row for each step and parameter, or group of parameters |
| `numbers-*.parquet` | a row for each number that was logged: the loss, the learning rate |
| `findings-*.parquet` | a row for each finding of a watchdog |

Each flush writes new files under temporary names and renames them; those of the tables are never changed later. So a
killed process loses only what it had not flushed. A resumed training writes a new *session*: rows of earlier sessions
at its first step or later are marked as overwritten, but kept.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.errors import FileFormatError, WriteError
from torchparams.io.write import replace_file
from torchparams.record.columns import Lists
from torchparams.render import parquet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT = "torchparams.record"
VERSION = 1

HEAD = "record.json"
LAST = "last_step.json"

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


def pyarrow() -> tuple[Any, Any]:
    """Import `pyarrow` and `pyarrow.parquet`.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    return parquet.pyarrow("for records of a training", extra="record")


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
        last: Last step of the record; None if there is none.
        nbytes: Number of buffered bytes.

    Raises:
        WriteError: The directory already has a record, or cannot be written.
        FileFormatError: The existing files are not a record.
    """

    def __init__(self, path: str | os.PathLike[str], head: Mapping[str, Any], *, resume: bool = False) -> None:
        pyarrow()
        self.path = os.fspath(path)
        self.session, self.last, self.nbytes = 0, None, 0
        self._rows: dict[str, list[Any]] = {table: [] for table in TABLES}
        self._schemas = {table: schema_of(table) for table in TABLES}
        try:
            os.makedirs(self.path, exist_ok=True)
            names = os.listdir(self.path)
        except OSError as error:
            raise WriteError(error.strerror or str(error), where=self.path) from None
        form: dict[str, Any] = {"format": FORMAT, "version": VERSION, "sessions": []}
        if HEAD in names:
            if not resume:
                raise WriteError(
                    "the directory already has a record",
                    where=self.path,
                    hint="use resume=True to continue it, or choose another directory",
                )
            form = read_head(self.path)
            self.session = len(form["sessions"])
            self.last = last_step(self.path)
            parquet.remove_unfinished(self.path)
        self._next = 1 + max((int(found[2]) for name in names if (found := _PIECE.fullmatch(name))), default=-1)
        form["sessions"].append(dict(head))
        self._replace(HEAD, form)

    def add(self, table: str, columns: Mapping[str, Any]) -> None:
        """Buffer rows until the next flush.

        Args:
            table: One of `TABLES`.
            columns: Values by column: a list, an array in which NaN is null, `Lists`, or one value for all rows. A
                missing column is null, and `session` is filled in.
        """
        arrow, _ = pyarrow()
        count = max(len(values) for values in columns.values() if isinstance(values, list | np.ndarray))
        schema = self._schemas[table]
        given = {**columns, "session": self.session}
        arrays = [_array(arrow, given.get(field.name), field.type, count) for field in schema]
        rows = arrow.Table.from_arrays(arrays, schema=schema)
        self._rows[table].append(rows)
        self.nbytes += rows.nbytes

    def flush(self, last: int | None = None) -> None:
        """Write the buffered rows to new files.

        Args:
            last: Last step of the training so far, recorded or not.

        Raises:
            WriteError: Writing failed; the rows stay buffered for the next flush.
        """
        arrow, _ = pyarrow()
        number, self._next = self._next, self._next + 1  # also after an error: a file is never written twice
        for table, kept in self._rows.items():
            if not kept:
                continue
            name = os.path.join(self.path, f"{table}-{number:06}.parquet")
            rows = arrow.concat_tables(kept).unify_dictionaries().combine_chunks()
            parquet.write_parquet(rows, name)
            kept.clear()
        self.nbytes = 0
        if last is not None:
            self._replace(LAST, {"session": self.session, "step": last})

    def _replace(self, name: str, form: Mapping[str, Any]) -> None:
        path = os.path.join(self.path, name)
        try:
            replace_file(path, json.dumps(form, indent=1).encode())
        except OSError as error:
            raise WriteError(error.strerror or str(error), where=path) from None


def _array(arrow: Any, values: Any, kind: Any, count: int) -> Any:
    """An Arrow array of a column, see `Writer.add`.

    It is made from buffers: `pyarrow.array` would import pandas in the middle of a training.
    """
    if values is None:
        return arrow.nulls(count, kind)
    if isinstance(values, Lists):
        elements = _array(arrow, values.values, kind.value_type, len(values.values))
        return arrow.ListArray.from_arrays(_array(arrow, values.offsets, arrow.int32(), len(values.offsets)), elements)
    if arrow.types.is_dictionary(kind):
        texts = [values] if isinstance(values, str) else list(dict.fromkeys(values))
        place = {text: i for i, text in enumerate(texts)}
        indices = np.zeros(count, np.int32) if isinstance(values, str) else [place[text] for text in values]
        return arrow.DictionaryArray.from_arrays(_array(arrow, indices, arrow.int32(), count), _texts(arrow, texts))
    if arrow.types.is_string(kind):
        return _texts(arrow, values)
    numbers = np.broadcast_to(np.asarray(values), count)
    validity = None
    if isinstance(values, np.ndarray) and values.dtype.kind == "f" and (missing := np.isnan(values)).any():
        validity = arrow.py_buffer(np.packbits(~missing, bitorder="little").tobytes())
        numbers = np.where(missing, 0, numbers)
    data = np.ascontiguousarray(numbers, np.dtype(str(kind).replace("double", "float64"))).tobytes()
    return arrow.Array.from_buffers(kind, count, [validity, arrow.py_buffer(data)])


def _texts(arrow: Any, texts: Sequence[str]) -> Any:
    data = [text.encode(errors="surrogatepass") for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in data])]).astype(np.int32)
    buffers = [None, arrow.py_buffer(offsets.tobytes()), arrow.py_buffer(b"".join(data))]
    return arrow.Array.from_buffers(arrow.utf8(), len(data), buffers)


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
    arrow, _ = pyarrow()
    schema = schema_of(table)
    pieces = [read_piece(path, name, schema) for name in pieces_of(path, table)]
    return arrow.concat_tables(pieces).unify_dictionaries() if pieces else schema.empty_table()


def pieces_of(path: str, table: str) -> list[str]:
    """Names of the files of a table, oldest first."""
    found = filter(None, map(_PIECE.fullmatch, os.listdir(path)))
    return [match[0] for match in sorted(found, key=lambda match: int(match[2])) if match[1] == table]


def read_piece(path: str, name: str, schema: Any) -> Any:
    """The columns of a schema from one file of a record.

    Raises:
        FileFormatError: The file is damaged.
    """
    arrow, reader = pyarrow()
    where = os.path.join(path, name)
    try:
        return reader.read_table(where, columns=schema.names).select(schema.names).cast(schema)
    except (OSError, arrow.ArrowException, KeyError) as error:
        text = str(error).splitlines()[0]
        raise FileFormatError(f"a damaged file of the record: {text}", where=where) from None


def last_step(path: str) -> int | None:
    """Last step of the newest session that has steps, from the last flush and the newest file; None without steps."""
    arrow, _ = pyarrow()
    found: list[tuple[int, int]] = []
    with suppress(OSError, ValueError, KeyError, TypeError), open(os.path.join(path, LAST), "rb") as file:
        form = json.loads(file.read())
        found.append((int(form["session"]), int(form["step"])))
    schema = arrow.schema([("step", arrow.int64()), ("session", arrow.int16())])
    for name in pieces_of(path, "parameters")[-1:]:
        found += [(row["session"], row["step"]) for row in read_piece(path, name, schema).to_pylist()]
    return max(found)[1] if found else None
