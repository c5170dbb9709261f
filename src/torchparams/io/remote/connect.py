"""Connect to a remote file: over HTTP, to S3, to the Hugging Face Hub, or through any other fsspec file system."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.io.remote.transfer import filesystem

if TYPE_CHECKING:
    from torchparams.io.remote.transfer import Connection


def connect(name: str) -> Connection:
    """Open the connection to a file.

    Args:
        name: Public name of the file.

    Raises:
        MissingDependency: fsspec, or a package that it needs for this kind of URL, is not installed.
        RemoteError: fsspec does not support this kind of URL.
    """
    if name.startswith("hf://"):
        from torchparams.io.remote.hub import hub_connection

        return hub_connection(name)
    fs, path = filesystem(name)
    from fsspec.implementations.http import HTTPFileSystem

    if isinstance(fs, HTTPFileSystem):
        from torchparams.io.remote.http import HttpConnection

        return HttpConnection(fs, path, name)
    from torchparams.io.remote.stores import S3Connection, StoreConnection

    return S3Connection(fs, path, name) if hasattr(fs, "_call_s3") else StoreConnection(fs, path, name)
