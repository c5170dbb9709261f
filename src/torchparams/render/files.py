"""Write tables to CSV, JSON and Parquet files."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args, get_origin

from torchparams.errors import OptionError, WriteError
from torchparams.render.parquet import pyarrow, replacing, write_parquet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.render.tabular import Tabular


def write_table(result: Tabular, path: str) -> None:
    """Write the rows of a result to a file, atomically. An existing table is replaced.

    The columns are the attributes of the rows, starting with the name. Non-finite numbers and None are written so:

    - CSV: `nan`, `inf` and `-inf`; None is an empty cell. Shapes and other lists are JSON.
    - JSON (a list of objects): the texts `"nan"`, `"inf"` and `"-inf"`; None is `null`. `pandas.read_json` reads
      such a column as numbers.
    - Parquet: NaN, ±Inf and null.

    Args:
        result: Result with rows.
        path: Target with the suffix `.csv`, `.json` or `.parquet`.

    Raises:
        OptionError: The suffix is not supported.
        WriteError: Writing failed, or the existing file is not a table.
        MissingDependency: Parquet needs pyarrow, which is not installed.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> import torchparams as tp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(tp.stats({"w": np.array([1.0, np.nan])}), f"{folder}/stats.csv")
    ...     print(Path(folder, "stats.csv").read_text()[:37])
    name,tensors,shape,dtype,numel,values
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _WRITERS:
        raise OptionError(f"{path!r} has the suffix {suffix or 'none'}", hint=f"use the suffix {_listed()}")
    path = os.path.realpath(path)  # keep symbolic links
    _refuse_other(path, suffix)
    _WRITERS[suffix](result, path)


def _listed() -> str:
    *most, last = _WRITERS
    return f"{', '.join(most)} or {last}"


def _refuse_other(path: str, suffix: str) -> None:
    """Refuse to replace a file that is not a table: a JSON file may be an index or a configuration."""
    try:
        with open(path, "rb") as file:
            head = file.read(16).lstrip()
    except FileNotFoundError:
        return
    except OSError as error:
        raise WriteError(error.strerror or str(error), where=path) from None
    if head and not head.startswith(_HEADS[suffix]):
        raise WriteError(
            f"the existing file is not a {suffix[1:].upper()} table",
            where=path,
            hint="delete it, or choose another name",
        )


_HEADS = {".csv": b"name", ".json": b"[", ".parquet": b"PAR1"}


def _plain(value: Any, kind: Any) -> Any:
    """Value as JSON data."""
    if value is None:
        return None
    if isinstance(kind, Mapping):
        return {name: _plain(getattr(value, name), each) for name, each in kind.items()}
    if get_origin(kind) is list:
        return [_plain(item, get_args(kind)[0]) for item in value]
    if get_origin(kind) is dict:
        return {f"{key:.15g}": _plain(item, get_args(kind)[1]) for key, item in dict(value).items()}
    if kind is float and not (float("-inf") < value < float("inf")):
        return str(float(value))
    return value if isinstance(value, int) else kind(value)


@contextmanager
def _replacing_text(path: str) -> Iterator[io.TextIOWrapper]:
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        yield text
        text.detach()  # flushes; `replacing` closes the file


def _write_csv(result: Tabular, path: str) -> None:
    import csv

    with _replacing_text(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(result.columns)
        for row in result.table_rows():
            cells = (_plain(getattr(row, name), kind) for name, kind in result.columns.items())
            writer.writerow(
                json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell for cell in cells
            )


def _write_json(result: Tabular, path: str) -> None:
    with _replacing_text(path) as file:
        rows = (_plain(row, result.columns) for row in result.table_rows())
        lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        file.write(f"[\n{lines}\n]\n" if lines else "[]\n")


def _write_parquet(result: Tabular, path: str) -> None:
    arrow, _ = pyarrow("to write Parquet")
    write_parquet(arrow.RecordBatchReader.from_stream(result).read_all(), path, compression="snappy")


_WRITERS = {".csv": _write_csv, ".json": _write_json, ".parquet": _write_parquet}
