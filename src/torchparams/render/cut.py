"""Shorten names and texts to the width of a column."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def width_of(text: str) -> int:
    """Width of a text in a terminal, in columns."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


def elide(text: str, width: int) -> str:
    """Shorten a text to `width` columns. A dotted name keeps its first and last component, and its numbers.

    >>> elide("encoder.layers.11.self_attention.output.weight", 34)
    'encoder.….11.sel…ion.output.weight'
    >>> elide("embedding", 6)
    'emb…ng'
    """
    return _elided(text, width, _from_left)


def elide_all(texts: Iterable[str], width: int) -> dict[str, str]:
    """Shorten each text to `width` columns, so that no two become equal.

    A text that cannot be shortened uniquely stays whole, wider than `width`.

    >>> list(elide_all(["model.encoder.norm.weight", "model.decoder.norm.weight"], 22).values())
    ['model.encoder.….weight', 'model.decoder.….weight']
    """
    shown = {text: elide(text, width) for text in texts}
    for how in (_from_right, _evenly, None):
        counts = Counter(shown.values())
        alike = [text for text, cut in shown.items() if cut != text and counts[cut] > 1]
        for text in alike:
            shown[text] = text if how is None else _elided(text, width, how)
    return shown


def _elided(text: str, width: int, how: Callable[[list[str], int], None]) -> str:
    if width_of(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    name = text.lstrip(" ")  # rows of a tree are indented
    if name != text:
        indent = len(text) - len(name)
        return " " * min(indent, width) + _elided(name, max(width - indent, 0), how)
    name, equals, others = text.partition(" = ")
    if equals:  # a tied tensor: its other names are shortened first
        if width_of(name) + 4 <= width:
            return f"{name} = {_elided(others, width - width_of(name) - 3, how)}"
        if width > 8:
            return f"{_elided(name, width - 4, how)} = …"
    if "." in text and " " not in text and len(text) <= _LONGEST_NAME:
        parts = re.split(_DOTS, text)
        how(parts, width)
        text = _joined(parts)
    return _middle(text, width)


_LONGEST_NAME = 500
_DOTS = r"\.(?![^{}]*\})"  # dots outside folded layers such as {0..23}; compiled at first use
_LEAST = 5


def _joined(parts: list[str]) -> str:
    """Join components with dots, and adjacent ellipses into one."""
    return ".".join(part for i, part in enumerate(parts) if part != "…" or parts[i - 1 : i] != ["…"])


def _inner(parts: list[str]) -> list[int]:
    """Indices of components that may be left out: not the ends, and no numbers, which tell equal layers apart."""
    return [i for i in range(1, len(parts) - 1) if not parts[i].isdecimal() and not parts[i].startswith("{")]


def _from_left(parts: list[str], width: int) -> None:
    _leave_out(parts, width, _inner(parts))


def _from_right(parts: list[str], width: int) -> None:
    _leave_out(parts, width, _inner(parts)[::-1])


def _leave_out(parts: list[str], width: int, order: list[int]) -> None:
    for i in order:
        over = width_of(_joined(parts)) - width
        if over <= 0:
            return
        left = width_of(parts[i]) - over
        parts[i] = _middle(parts[i], left) if left >= _LEAST else "…"


def _evenly(parts: list[str], width: int) -> None:
    inner = _inner(parts)
    sizes = {i: width_of(parts[i]) for i in inner}
    over = width_of(".".join(parts)) - width
    while over > 0 and inner and (widest := max(inner, key=sizes.__getitem__)) and sizes[widest] > 1:
        sizes[widest] -= 1
        over -= 1
    for i in inner:
        parts[i] = _middle(parts[i], sizes[i])


def _middle(text: str, width: int) -> str:
    """Shorten a text in the middle to `width` columns."""
    if width_of(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    tail = (width - 1) // 2
    return f"{_start(text, width - 1 - tail)}…{_start(text[::-1], tail)[::-1]}"


def _start(text: str, width: int) -> str:
    """Longest prefix of at most `width` columns."""
    count = 0
    for i, character in enumerate(text):
        count += width_of(character)
        if count > width:
            return text[:i]
    return text
