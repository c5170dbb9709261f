"""The bytes of a file, wherever it lies."""

from __future__ import annotations

from torchparams.io.filebytes import FileBytes
from torchparams.io.paths import is_url


def bytes_of_file(path: str) -> FileBytes:
    """The bytes of a file, by range, here or behind a URL.

    Raises:
        SourceError: There is no such file, it may not be read, or it is not a regular file.
    """
    if is_url(path):
        from torchparams.io.remote.file import RemoteBytes

        return RemoteBytes(path)
    return FileBytes(path)
