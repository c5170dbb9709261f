"""Tables written to files: CSV, JSON and Parquet."""

from __future__ import annotations

import importlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, get_args, get_origin

from torchparams.errors import MissingDependency, OptionError, WriteError

if TYPE_CHECKING:
    from torchparams.render.tabular import Tabular


def write_table(result: Tabular, path: str) -> None:
    """Write a result's rows to a file, as a whole or not at all; an earlier table is replaced.

    The columns are the attributes of the rows, and the first is the name. Numbers that are not finite:

    - In CSV, `nan`, `inf` and `-inf`; None is an empty cell. Shapes and other lists are JSON.
    - In JSON, a list of objects, the texts `"nan"`, `"inf"` and `"-inf"`; None is `null`. `pandas.read_json` reads
      a column of these as numbers.
    - In Parquet, as they are.

    Args:
        result: A result with rows.
        path: A file that ends in `.csv`, `.json` or `.parquet`.

    Raises:
        OptionError: The path ends otherwise.
        WriteError: Writing failed, or the file that is there is no table.
        MissingDependency: pyarrow, for Parquet, is not installed.

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
        raise OptionError(f"{path} ends in {suffix or 'nothing'}", hint=f"Name a file that ends in {_listed()}")
    path = os.path.realpath(path)  # a link stays one
    _refuse_other(path, suffix)
    unfinished = f"{path}.{secrets.token_hex(4)}.unfinished"
    try:
        _WRITERS[suffix](result, unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        raise WriteError(error.strerror or str(error), where=path) from None
    finally:
        with suppress(OSError):
            os.unlink(unfinished)


def _listed() -> str:
    *most, last = _WRITERS
    return f"{', '.join(most)} or {last}"


def _refuse_other(path: str, suffix: str) -> None:
    """Refuse to replace a file that is no table: a JSON file may be a checkpoint's index, or its configuration."""
    try:
        with open(path, "rb") as file:
            head = file.read(16).lstrip()
    except FileNotFoundError:
        return
    except OSError as error:
        raise WriteError(error.strerror or str(error), where=path) from None
    if head and not head.startswith(_HEADS[suffix]):
        raise WriteError(
            f"the file there is not a table in {suffix[1:].upper()}", where=path, hint="Delete it, or name another"
        )


_HEADS = {".csv": b"name", ".json": b"[", ".parquet": b"PAR1"}


def _plain(value: Any, kind: Any) -> Any:
    """A value as JSON takes it."""
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


def _write_csv(result: Tabular, path: str) -> None:
    import csv

    with open(path, "x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(result.columns)
        for row in result.table_rows():
            cells = (_plain(getattr(row, name), kind) for name, kind in result.columns.items())
            writer.writerow(
                json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell for cell in cells
            )


def _write_json(result: Tabular, path: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        rows = (_plain(row, result.columns) for row in result.table_rows())
        lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        file.write(f"[\n{lines}\n]\n" if lines else "[]\n")


def _write_parquet(result: Tabular, path: str) -> None:
    try:
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise MissingDependency(
            "pyarrow is needed to write Parquet", hint="pip install 'torchparams[parquet]'"
        ) from None
    parquet.write_table(pyarrow.RecordBatchReader.from_stream(result).read_all(), path)


_WRITERS = {".csv": _write_csv, ".json": _write_json, ".parquet": _write_parquet}
