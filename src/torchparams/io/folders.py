"""List directories, local or behind a URL."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torchparams.io.paths import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator


def is_directory(path: str) -> bool:
    """Whether a path is a directory. A URL is one if it ends in `/`, or names a whole repository."""
    if not is_url(path):
        return os.path.isdir(path)
    return path.partition("?")[0].endswith("/") or (path.startswith("hf://") and path.count("/") == 3)


def entries(path: str) -> dict[str, bool]:
    """Names in a directory, and whether each is a directory.

    Raises:
        OSError: The directory does not exist, or cannot be listed.
        SourceError: The server cannot list it.
    """
    if is_url(path):
        from torchparams.io.remote.listing import entries as remote_entries

        return remote_entries(path)
    return {name: os.path.isdir(os.path.join(path, name)) for name in os.listdir(path or ".")}


def among(folder: str, names: list[str]) -> Iterator[str]:
    """Filter names to those of files in a directory; links to files count.

    If a server cannot list a directory, all names are returned; opening the file will tell.
    """
    if not is_url(folder):
        yield from (name for name in names if os.path.isfile(os.path.join(folder, name)))
        return
    from torchparams.io.remote.listing import entries_if_listed

    there = entries_if_listed(folder)
    yield from (name for name in names if there is None or there.get(name) is False)
