"""Paths of files and directories, local or URLs.

A path is a text. If it starts with `scheme://`, it is a URL: `https://…`, `s3://…`, `gs://…`, `hf://owner/repo/file`. A
URL may contain a password or signature, so tables, messages and infos only contain its public name, made by `public`:
`https://me:secret@host/model.pt?sig=…` becomes `https://host/model.pt?…`. Opening a file by its public name uses the
full URL.
"""

from __future__ import annotations

import os
import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*://")
_USER = re.compile(r"(?<=://)[^/?#@]*@")
_QUERY = re.compile(r"\?(?:…\d*)?")
_WITH_QUERY = ("http://", "https://")  # in other schemes, a question mark is part of the name
_REVISIONS = "hf://"  # here, @ starts a revision

_behind: dict[str, str] = {}
"""Full URL of each public name that differs from it."""

_below: dict[str, tuple[str, str]] = {}
"""User and query of the last file below the public name of a directory, for opening its neighbours."""


def is_url(path: str) -> bool:
    r"""Whether a path is a URL.

    >>> is_url("s3://bucket/model.pt"), is_url("model.pt"), is_url("C:\\model.pt"), is_url("package.module:build")
    (True, False, False, False)
    """
    return "://" in path and _URL.match(path) is not None


def is_http(path: str) -> bool:
    """Whether a path is an HTTP or HTTPS URL."""
    return path.startswith(_WITH_QUERY)


def public(target: str) -> str:
    """Public name of a URL, without user, password and query. Other paths and public names are returned unchanged.

    Args:
        target: Path or URL, optionally with `#inner` at the end.

    >>> public("https://me:secret@host/run.pt?X-Amz-Signature=abc#model")
    'https://host/run.pt?…#model'
    >>> public("hf://owner/repo@main/model.safetensors")
    'hf://owner/repo@main/model.safetensors'
    """
    if not is_url(target):
        return target
    if target.startswith("file://"):
        from urllib.parse import unquote

        return unquote(target.removeprefix("file://"))
    url, mark, inner = target.partition("#")
    user = "" if url.startswith(_REVISIONS) else "".join(_USER.findall(url)[:1])
    name = url if url.startswith(_REVISIONS) else _USER.sub("", url)
    query = ""
    if is_http(name) and "?" in name:
        base, _, query = name.partition("?")
        if _QUERY.fullmatch("?" + query):
            return target  # already a public name
        name = f"{base}?…"
        number = 1
        while _behind.get(name, url) != url:  # same path with another query
            number += 1
            name = f"{base}?…{number}"
    if name != url:
        _behind[name] = url
        _below[folder_of(name)] = user, query
    return name + mark + inner


def full(name: str) -> str:
    """Full URL of a public name, with user and query. Use it only to connect, never for output."""
    url = _behind.get(name)
    if url is None and is_http(name):
        user, query = _below.get(folder_of(name), ("", ""))
        url = name.replace("://", f"://{user}", 1) + (f"?{query}" if query and "?" not in name else "")
    return name if url is None else url


def split_inner(target: str) -> tuple[str, str | None]:
    """Split a URL at its `#`, if there is one."""
    url, mark, inner = target.partition("#")
    return url, inner if mark else None


def join(folder: str, name: str) -> str:
    """Join a directory and a file name.

    >>> join("https://host/model", "config.json"), join("s3://bucket/", "model.pt")
    ('https://host/model/config.json', 's3://bucket/model.pt')
    """
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def folder_of(path: str) -> str:
    """Directory of a file.

    >>> folder_of("https://host/model/a.pt?…"), folder_of("hf://owner/repo@main/a.pt")
    ('https://host/model', 'hf://owner/repo@main')
    """
    return _plain(path).rpartition("/")[0] if is_url(path) else os.path.dirname(path)


def name_of(path: str) -> str:
    """Last component of a path.

    >>> name_of("https://host/model/a.pt?…")
    'a.pt'
    """
    return _plain(path).rstrip("/").rpartition("/")[2] if is_url(path) else os.path.basename(path)


def _plain(url: str) -> str:
    return url.partition("?")[0] if is_http(url) else url
