"""The names in a directory, here or behind a URL."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torchparams.io.paths import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator


def is_directory(path: str) -> bool:
    """Whether a path is known to be a directory; a URL where it ends in `/`, or names a whole repository."""
    if not is_url(path):
        return os.path.isdir(path)
    return path.partition("?")[0].endswith("/") or (path.startswith("hf://") and path.count("/") == 3)


def entries(path: str) -> dict[str, bool]:
    """The names in a directory, and whether each is a directory itself.

    Raises:
        OSError: There is no such directory, or it cannot be listed.
        SourceError: The server does not list it.
    """
    if is_url(path):
        from torchparams.io.remote.listing import entries as remote_entries

        return remote_entries(path)
    return {name: os.path.isdir(os.path.join(path, name)) for name in os.listdir(path or ".")}


def among(folder: str, names: list[str]) -> Iterator[str]:
    """Those of some names that are files in a directory; links count that lead to one.

    Where a server does not list a directory, every name counts: opening the file tells.
    """
    if not is_url(folder):
        yield from (name for name in names if os.path.isfile(os.path.join(folder, name)))
        return
    from torchparams.io.remote.listing import entries_if_listed

    there = entries_if_listed(folder)
    yield from (name for name in names if there is None or there.get(name) is False)
