"""Patterns of paths: `run/step-*` and `s3://bucket/run/step-*`."""

from __future__ import annotations

import glob
import os
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torchparams.errors import SourceError
from torchparams.io.folders import entries
from torchparams.io.paths import is_http, is_url, join, split_inner
from torchparams.order import natural

if TYPE_CHECKING:
    from collections.abc import Iterable


def is_pattern(target: str) -> bool:
    """Whether a target is a pattern, and not the path of an existing file.

    >>> is_pattern("run/step-*"), is_pattern("model.safetensors"), is_pattern("https://host/a.pt?x=*")
    (True, False, False)
    """
    path = split_inner(target)[0]
    if is_url(path):
        return not is_http(path) and any(sign in path for sign in "*[")
    return glob.has_magic(path) and not os.path.exists(path)


def expanded(targets: Iterable[str]) -> list[str]:
    """Replace every pattern among targets by its matches, in natural order.

    Args:
        targets: Paths and URLs, also with `#inner`, which every match keeps.

    Raises:
        SourceError: A pattern matches nothing, or a store cannot be listed.

    >>> expanded(["model.safetensors#model"])
    ['model.safetensors#model']
    """
    found = []
    for target in targets:
        if not is_pattern(target):
            found.append(target)
            continue
        path, inner = split_inner(target)
        matches = _remote(path) if is_url(path) else glob.glob(path, recursive=True)
        if not matches:
            raise SourceError("the pattern matches nothing", where=target)
        suffix = "" if inner is None else f"#{inner}"
        found += [f"{match}{suffix}" for match in natural(matches)]
    return found


def _remote(path: str) -> list[str]:
    """URLs that match a pattern, found component by component."""
    scheme, _, rest = path.partition("://")
    first, *components = rest.split("/")
    found = [f"{scheme}://{first}"]
    for component in components:
        if not any(sign in component for sign in "*?["):
            found = [f"{folder}/{component}" for folder in found]
            continue
        try:
            found = [
                join(f"{folder}/", name)
                for folder in found
                for name in entries(f"{folder}/")
                if fnmatchcase(name, component)
            ]
        except OSError as error:
            raise SourceError(error.strerror or str(error), where=path) from None
    return found
