"""Globs: patterns for whole dotted names.

A glob is a sequence of **components** separated by dots, like a name. `**` matches any number of components, including
none. Every other component is a sequence of pieces: text, `*`, `?`, `{a,b}` and `{0..5}`.

`glob_reader` parses them, and `str` writes them. `glob_match` defines their meaning; `glob_regex` is the fast
implementation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable


class Wild(Enum):
    """Wildcards: one character, any characters of a component, any number of components."""

    CHARACTER = "?"
    CHARACTERS = "*"
    COMPONENTS = "**"


@dataclass(frozen=True, slots=True)
class Range:
    """Integers from `first` to `last`, inclusive.

    Numbers have no leading zeros; if `width` is not 0, they are padded with zeros to that width. A negative bound
    counts from the end of the numbers that occur in the same module: -1 is the last.
    """

    first: int
    last: int
    width: int = 0

    def __str__(self) -> str:
        if self.from_end and self.first == self.last:
            return str(self.first)
        return f"{self.first:0{self.width}}..{self.last:0{self.width}}"

    @property
    def from_end(self) -> bool:
        """Whether a bound counts from the end."""
        return self.first < 0 or self.last < 0

    def among(self, numbers: list[int]) -> Range | None:
        """Range with bounds counted from the start, or None if it is empty.

        Args:
            numbers: Occurring numbers, sorted.
        """
        first, last = self.first, self.last
        if first < 0:
            first = numbers[max(first, -len(numbers))] if numbers else last + 1
        if last < 0:
            last = numbers[last] if -last <= len(numbers) else -1
        return Range(first, last) if first <= last else None

    @property
    def widths(self) -> range:
        """Possible numbers of digits."""
        if self.width:
            return range(self.width, self.width + 1)
        return range(len(str(self.first)), len(str(self.last)) + 1)

    def of_width(self, width: int) -> Range:
        """Part of the range with numbers of `width` digits."""
        if self.width:
            return self
        return Range(max(self.first, 10 ** (width - 1) if width > 1 else 0), min(self.last, 10**width - 1))


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Alternative sequences of pieces."""

    items: tuple[Sequence, ...]


Piece: TypeAlias = "str | Wild | Range | Alternatives"
Sequence: TypeAlias = tuple[Piece, ...]

ANY_DEPTH: Sequence = (Wild.COMPONENTS,)
"""The component `**`."""

RANGE_DIGITS = 18
"""Maximum number of digits of a range bound, for 64-bit numbers."""


@dataclass(frozen=True, slots=True)
class Glob:
    """Parsed glob: a sequence of components, each a sequence of pieces; `**` is `ANY_DEPTH`."""

    components: tuple[Sequence, ...]

    def __str__(self) -> str:
        text = ".".join(map(_write, self.components))
        if not text.startswith("/"):
            return text
        first = str(self.components[0][0])  # an unquoted leading slash would start a regular expression
        return _quote(first) + text[len(first) :]

    @property
    def literal(self) -> str | None:
        """The only name that it matches, if it has no wildcards."""
        if all(isinstance(piece, str) for component in self.components for piece in component):
            return ".".join("".join(map(str, component)) for component in self.components)
        return None

    @property
    def from_end(self) -> bool:
        """Whether a number counts from the end, so that matches depend on other names."""
        return any(map(counts_from_end, self.components))

    def of_any_number(self) -> Glob:
        """Copy in which numbers from the end match any number."""
        return Glob(tuple(replaced(component, lambda found: _ANY_NUMBER) or () for component in self.components))

    def spells(self, component: str) -> bool:
        """Whether one of its components is exactly this text."""
        return (component,) in self.components


_ANY_NUMBER = Range(0, 10**RANGE_DIGITS - 1)


def counts_from_end(sequence: Sequence) -> bool:
    """Whether a number in the sequence counts from the end."""
    return any(
        (isinstance(piece, Range) and piece.from_end)
        or (isinstance(piece, Alternatives) and any(map(counts_from_end, piece.items)))
        for piece in sequence
    )


def replaced(sequence: Sequence, change: Callable[[Range], Range | None]) -> Sequence | None:
    """Copy of a sequence with ranges from the end replaced; None if a replacement is empty."""
    found: list[Piece] = []
    for piece in sequence:
        if isinstance(piece, Range) and piece.from_end:
            other = change(piece)
            if other is None:
                return None
            found.append(other)
        elif isinstance(piece, Alternatives):
            items = tuple(new for item in piece.items if (new := replaced(item, change)) is not None)
            if not items:
                return None
            found.append(Alternatives(items))
        else:
            found.append(piece)
    return tuple(found)


_RESERVED = frozenset("|&~()[]:,;!=<>\"'`\\{}*?")


def is_bare(char: str) -> bool:
    """Whether a character needs no quotes in a glob."""
    return char not in _RESERVED and char.isprintable() and not char.isspace()


def quote(name: str) -> str:
    """Glob that matches exactly `name`, with quotes if needed.

    >>> quote("encoder.layer.0.weight"), quote("my layer.weight")
    ('encoder.layer.0.weight', '"my layer".weight')
    """
    return str(literal_glob(name))


def literal_glob(name: str) -> Glob:
    """Parsed glob that matches exactly `name`."""
    return Glob(tuple((component,) if component else () for component in name.split(".")))


def merged(pieces: list[Piece]) -> Sequence:
    """Copy with adjacent texts joined, empty texts removed, and repeated `*` reduced to one."""
    found: list[Piece] = []
    for piece in pieces:
        if piece == "":
            continue
        last = found[-1] if found else None
        if isinstance(piece, str) and isinstance(last, str):
            found[-1] = last + piece
        elif not (piece is Wild.CHARACTERS and last is Wild.CHARACTERS):
            found.append(piece)
    return tuple(found)


# --- glob → text ---------------------------------------------------------------------------------


def _write(component: Sequence) -> str:
    return "".join(map(_write_piece, component)) or '""'


def _write_piece(piece: Piece) -> str:
    if isinstance(piece, str):
        return piece if all(map(is_bare, piece)) else _quote(piece)
    if isinstance(piece, Wild):
        return piece.value
    if isinstance(piece, Range):
        return f"{{{piece}}}"
    return "{" + ",".join(map(_write_item, piece.items)) + "}"


def _write_item(item: Sequence) -> str:
    if len(item) == 1 and isinstance(item[0], Range):
        return str(item[0])
    if len(item) == 1 and isinstance(item[0], str) and re.fullmatch("-[1-9][0-9]*", item[0]):
        return _quote(item[0])  # unquoted, it would count from the end
    return "".join(map(_write_piece, item))


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
