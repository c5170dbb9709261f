"""Open the bytes of a file, local or remote."""

from __future__ import annotations

from torchparams.io.filebytes import FileBytes
from torchparams.io.paths import is_url


def bytes_of_file(path: str) -> FileBytes:
    """Bytes of a file by range, local or behind a URL.

    Raises:
        SourceError: The file does not exist, cannot be read, or is not a regular file.
    """
    if is_url(path):
        from torchparams.io.remote.file import RemoteBytes

        return RemoteBytes(path)
    return FileBytes(path)
