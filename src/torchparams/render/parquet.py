"""Write files of tables atomically, Parquet by pyarrow."""

from __future__ import annotations

import importlib
import os
import secrets
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from torchparams.errors import MissingDependency, TorchParamsError, WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator

UNFINISHED = ".unfinished"
"""Suffix of temporary names; a killed process leaves such a file behind."""


def pyarrow(purpose: str, extra: str = "parquet") -> tuple[Any, Any]:
    """Import `pyarrow` and `pyarrow.parquet`.

    Args:
        purpose: End of the message: `pyarrow is needed …`.
        extra: Extra of this package that installs it.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise MissingDependency(f"pyarrow is needed {purpose}", hint=f"pip install 'torchparams[{extra}]'") from None


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Context that opens a new file, which replaces `path` at the end if there is no error.

    It is written under a temporary name beside the target, and synchronised before it is renamed.

    Raises:
        WriteError: Writing failed; an existing file is unchanged, and the temporary one is removed.
    """
    unfinished = f"{path}.{secrets.token_hex(4)}{UNFINISHED}"
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except TorchParamsError:
        raise
    except OSError as error:
        raise WriteError(error.strerror or str(error), where=path) from None
    finally:
        with suppress(OSError):
            os.unlink(unfinished)


def write_parquet(table: Any, path: str, *, compression: str = "zstd") -> None:
    """Write a `pyarrow.Table` to a file, atomically.

    Args:
        table: The table.
        path: Path of the file.
        compression: A compression of Parquet, by its name in pyarrow.

    Raises:
        WriteError: Writing failed; an existing file is unchanged.
    """
    parquet = importlib.import_module("pyarrow.parquet")
    with replacing(path) as file:
        parquet.write_table(table, file, compression=compression)


def remove_unfinished(folder: str) -> None:
    """Remove the temporary files that killed processes left in a directory, where that is possible."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.endswith(UNFINISHED):
                with suppress(OSError):
                    os.unlink(os.path.join(folder, name))
