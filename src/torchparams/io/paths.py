"""Paths of files and directories, here or behind a URL.

A path is a text. One that begins with `scheme://` is a URL: `https://…`, `s3://…`, `gs://…`, `hf://owner/repo/file`.
A URL may hold a password or a signature. Tables, messages and records only ever hold its public name, which
`public` makes: `https://me:secret@host/model.pt?sig=…` is called `https://host/model.pt?…`. Whoever opens a file by
that name gets the URL behind it.
"""

from __future__ import annotations

import os
import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*://")
_USER = re.compile(r"(?<=://)[^/?#@]*@")
_QUERY = re.compile(r"\?(?:…\d*)?")
_WITH_QUERY = ("http://", "https://")  # of other schemes, a question mark belongs to the name
_REVISIONS = "hf://"  # there, an @ stands before a revision

_behind: dict[str, str] = {}
"""Public name → URL, where the two differ."""

_below: dict[str, tuple[str, str]] = {}
"""Public name of a directory → user and query of the last file there: its neighbours are opened with them too."""


def is_url(path: str) -> bool:
    r"""Whether a path is a URL.

    >>> is_url("s3://bucket/model.pt"), is_url("model.pt"), is_url("C:\\model.pt"), is_url("package.module:build")
    (True, False, False, False)
    """
    return "://" in path and _URL.match(path) is not None


def is_http(path: str) -> bool:
    """Whether a path is a URL of the web."""
    return path.startswith(_WITH_QUERY)


def public(target: str) -> str:
    """The name of a URL without user, password and query; any other path, or a public name, as it is.

    Args:
        target: A path or a URL, also one with `#inner` at its end.

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
            return target  # it is a public name already
        name = f"{base}?…"
        number = 1
        while _behind.get(name, url) != url:  # another query of the same path
            number += 1
            name = f"{base}?…{number}"
    if name != url:
        _behind[name] = url
        _below[folder_of(name)] = user, query
    return name + mark + inner


def full(name: str) -> str:
    """The URL behind a public name, with user and query: for whoever connects, and for nothing that is shown."""
    url = _behind.get(name)
    if url is None and is_http(name):
        user, query = _below.get(folder_of(name), ("", ""))
        url = name.replace("://", f"://{user}", 1) + (f"?{query}" if query and "?" not in name else "")
    return name if url is None else url


def split_inner(target: str) -> tuple[str, str | None]:
    """A URL and the text after its `#`, if there is one."""
    url, mark, inner = target.partition("#")
    return url, inner if mark else None


def join(folder: str, name: str) -> str:
    """The path of a file in a directory.

    >>> join("https://host/model", "config.json"), join("s3://bucket/", "model.pt")
    ('https://host/model/config.json', 's3://bucket/model.pt')
    """
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def folder_of(path: str) -> str:
    """The directory of a file.

    >>> folder_of("https://host/model/a.pt?…"), folder_of("hf://owner/repo@main/a.pt")
    ('https://host/model', 'hf://owner/repo@main')
    """
    return _plain(path).rpartition("/")[0] if is_url(path) else os.path.dirname(path)


def name_of(path: str) -> str:
    """The last part of a path.

    >>> name_of("https://host/model/a.pt?…")
    'a.pt'
    """
    return _plain(path).rstrip("/").rpartition("/")[2] if is_url(path) else os.path.basename(path)


def _plain(url: str) -> str:
    return url.partition("?")[0] if is_http(url) else url
