"""Globs: patterns for whole dotted names.

A glob is a sequence of **components** separated by dots, like a name. `**` matches any number of components, including
none. Every other component is a sequence of pieces: text, `*`, `?`, `{a,b}` and `{0..5}`.

`matches` defines the meaning of a glob; `glob_regex` is the fast implementation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from torchparams import limits
from torchparams.errors import SelectorSyntaxError

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
        return Glob(tuple(_replaced(component, lambda found: _ANY_NUMBER) or () for component in self.components))

    def spells(self, component: str) -> bool:
        """Whether one of its components is exactly this text."""
        return (component,) in self.components


def counts_from_end(sequence: Sequence) -> bool:
    """Whether a number in the sequence counts from the end."""
    return any(
        (isinstance(piece, Range) and piece.from_end)
        or (isinstance(piece, Alternatives) and any(map(counts_from_end, piece.items)))
        for piece in sequence
    )


def _replaced(sequence: Sequence, change: Callable[[Range], Range | None]) -> Sequence | None:
    """Copy of a sequence with ranges from the end replaced; None if a replacement is empty."""
    found: list[Piece] = []
    for piece in sequence:
        if isinstance(piece, Range) and piece.from_end:
            other = change(piece)
            if other is None:
                return None
            found.append(other)
        elif isinstance(piece, Alternatives):
            items = tuple(new for item in piece.items if (new := _replaced(item, change)) is not None)
            if not items:
                return None
            found.append(Alternatives(items))
        else:
            found.append(piece)
    return tuple(found)


# --- text → glob ---------------------------------------------------------------------------------

_RESERVED = frozenset("|&~()[]:,;!=<>\"'`\\{}*?")


def is_bare(char: str) -> bool:
    """Whether a character needs no quotes in a glob."""
    return char not in _RESERVED and char.isprintable() and not char.isspace()


def starts_glob(char: str) -> bool:
    """Whether a glob can start with this character."""
    return char != "/" and _in_component(char)


def _in_component(char: str) -> bool:
    return char != "." and char != "" and (char in "*?{\"'\\" or is_bare(char))


def quote(name: str) -> str:
    """Glob that matches exactly `name`, with quotes if needed.

    >>> quote("encoder.layer.0.weight"), quote("my layer.weight")
    ('encoder.layer.0.weight', '"my layer".weight')
    """
    return str(literal_glob(name))


def literal_glob(name: str) -> Glob:
    """Parsed glob that matches exactly `name`."""
    return Glob(tuple((component,) if component else () for component in name.split(".")))


def read_glob(text: str, start: int) -> tuple[Glob, int]:
    """Parse a glob at `text[start]`; returns the glob and its end.

    Raises:
        SelectorSyntaxError: There is no glob, or it is malformed.
    """
    reader = _Reader(text, start)
    return reader.glob(), reader.at


class _Reader:
    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def peek(self, ahead: int = 0) -> str:
        return self.text[self.at + ahead : self.at + ahead + 1]

    def fail(self, expected: str, hint: str | None = None, at: int | None = None, found: str | None = None) -> NoReturn:
        raise SelectorSyntaxError(
            self.text, (self.at if at is None else at) + 1, expected, found=found, hint=hint
        ) from None

    def glob(self) -> Glob:
        components: list[Sequence] = []
        pieces: list[Piece] = []
        written = False  # a component may be empty only in quotes
        while True:
            char = self.peek()
            if char == "*" and self.peek(1) == "*":
                if written or _in_component(self.peek(2)):
                    self.fail(
                        "`**` to be a whole component, between dots",
                        "within a component, `*` is any characters",
                        found="other text beside it",
                    )
                pieces.append(Wild.COMPONENTS)
                self.at += 2
                written = True
            elif char in ("*", "?"):
                pieces.append(Wild(char))
                self.at += 1
                written = True
            elif char == ".":
                self._whole(written)
                components.append(merged(pieces))
                pieces, written = [], False
                self.at += 1
            elif char == "{":
                pieces.append(self.braces(1))
                written = True
            elif char and (char in "\"'\\" or is_bare(char)):
                first, *rest = self.literal().split(".")
                pieces.append(first)
                for component in rest:
                    components.append(merged(pieces))
                    pieces = [component]
                written = True
            else:
                self._whole(written, ended=bool(components))
                glob = Glob((*components, merged(pieces)))
                if any(map(_misplaced, glob.components)):
                    self.fail(
                        "a number that counts from the end to be a whole component",
                        "the last two layers are layers.{-2..-1}.**",
                        found="other text beside it",
                    )
                return glob

    def _whole(self, written: bool, ended: bool = False) -> None:
        if written:
            return
        if ended:
            self.fail("a component after the dot", f"`{self.text[: self.at]}**` is everything below a module")
        self.fail("a component of a name", 'components are joined by single dots; an empty one is written ""')

    def literal(self) -> str:
        """Literal text: unquoted up to a dot, quoted, or a character after a backslash."""
        opening = self.peek()
        if opening == "\\":
            if not self.peek(1):
                self.at += 1
                self.fail("a character after the backslash", "a backslash takes its meaning from the next character")
            self.at += 2
            return self.text[self.at - 1]
        if opening in ("'", '"'):
            return self.quoted()
        start = self.at
        while (char := self.peek()) and char != "." and is_bare(char):
            self.at += 1
        return self.text[start : self.at]

    def quoted(self) -> str:
        opening, start = self.peek(), self.at
        self.at += 1
        found = []
        while (char := self.peek()) != opening:
            if char == "\\":
                self.at += 1
                char = self.peek()
            if not char:
                self.fail(f"a closing {opening}", f"the quote at column {start + 1} is not closed")
            found.append(char)
            self.at += 1
        self.at += 1
        return "".join(found)

    def braces(self, depth: int) -> Piece:
        opening = self.at
        if depth > limits.SELECTOR_NESTING:
            self.fail(f"braces nested at most {limits.SELECTOR_NESTING} deep")
        self.at += 1
        items: list[Sequence] = []
        while True:
            items.append(self._item(depth, opening))
            if self.peek() == ",":
                self.at += 1
                continue
            if len(items) > 1:
                self.at += 1
                return Alternatives(tuple(items))
            if len(items[0]) == 1 and isinstance(items[0][0], Range):
                self.at += 1
                return items[0][0]
            self.fail("`,` or `..` in the braces", "alternatives are written {a,b}, a range {0..5}")

    def _item(self, depth: int, opening: int) -> Sequence:
        """One alternative, up to its `,` or `}`; surrounding spaces are ignored."""
        self._blanks()
        if (found := self._range()) is not None:
            self._blanks()
            if self.peek() not in (",", "}"):
                self._unclosed(opening)
            return (found,)
        pieces: list[Piece] = []
        while True:
            char = self.peek()
            if char == "*" and self.peek(1) == "*":
                self.fail("`*` for any characters of one component", "`**` cannot be inside braces", found="`**`")
            if char in ("*", "?"):
                pieces.append(Wild(char))
                self.at += 1
            elif char == "{":
                pieces.append(self.braces(depth + 1))
            elif char == ".":
                if self.peek(1) == ".":
                    self.fail("whole numbers on both sides of `..`", "a range is written {0..5}", found="`..`")
                self._dot()
            elif char and (char in "\"'\\" or is_bare(char)):
                start = self.at
                pieces.append(literal := self.literal())
                if "." in literal:
                    self._dot(start)
            else:
                self._blanks()
                if self.peek() in (",", "}") and self.peek():
                    return merged(pieces)
                self._unclosed(opening)

    def _range(self) -> Range | None:
        bounds = _BOUNDS.match(self.text, self.at)
        if bounds is None:
            one = _FROM_END.match(self.text, self.at)
            if one is None or len(one[1]) > RANGE_DIGITS:
                return None
            self.at = one.end()
            return Range(int(one[1]), int(one[1]))
        first, last = bounds.groups()
        for name in (first, last):
            if len(name.lstrip("-")) > RANGE_DIGITS:
                self.fail(f"a number of at most {RANGE_DIGITS} digits", found=f"one of {len(name)}")
        if first.startswith("-") != last.startswith("-"):
            self.at = bounds.end()
            return Range(int(first), int(last))
        width = 0
        if any(len(bound) > 1 and bound.startswith("0") for bound in (first, last)):
            width = len(first)
            if len(last) != width:
                most = max(width, len(last))
                self.fail(
                    "bounds of one width",
                    f"use leading zeros in both bounds or in neither: {{{first:0>{most}}..{last:0>{most}}}} or "
                    f"{{{int(first)}..{int(last)}}}",
                    found=f"`{first}..{last}`",
                )
        if int(first) > int(last):
            self.fail("a range that goes up", f"did you mean {{{last}..{first}}}?", found=f"`{first}..{last}`")
        self.at = bounds.end()
        return Range(int(first), int(last), width)

    def _blanks(self) -> None:
        while self.peek().isspace():
            self.at += 1

    def _dot(self, at: int | None = None) -> None:
        self.fail(
            "alternatives without a dot: braces stand within one component",
            "a union is written `a.b.** | c.**`",
            at=at,
            found="a dot",
        )

    def _unclosed(self, opening: int) -> None:
        self.fail("`,` or `}`", f"the brace at column {opening + 1} is not closed" if not self.peek() else None)


_NUMBER = r"([0-9]+|-[1-9][0-9]*)"
_BOUNDS = re.compile(rf"{_NUMBER}\.\.{_NUMBER}(?=\s*[,}}]|\s*$)")
_FROM_END = re.compile(r"(-[1-9][0-9]*)(?=\s*[,}])")
_ANY_NUMBER = Range(0, 10**RANGE_DIGITS - 1)


def _misplaced(component: Sequence) -> bool:
    """Whether a number from the end is not a whole component."""
    if len(component) == 1:
        (piece,) = component
        return isinstance(piece, Alternatives) and any(map(_misplaced, piece.items))
    return counts_from_end(component)


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


# --- meaning of globs ----------------------------------------------------------------------------


def matches(glob: Glob, name: str, numbers: Callable[[str], list[int]] | None = None) -> bool:
    """Whether `glob` matches the whole `name`. This is the reference for the fast matcher.

    Args:
        glob: Glob to match.
        name: Name to match.
        numbers: Function from a module to the numbers that occur in it, sorted; for globs with numbers from the end.
    """
    parts = name.split(".")
    reached = {0}
    for component in glob.components:
        if component == ANY_DEPTH:
            reached = set(range(min(reached), len(parts) + 1))
        elif numbers is not None and counts_from_end(component):
            wanted = {at: _among(component, numbers(".".join(parts[:at]))) for at in reached if at < len(parts)}
            reached = {at + 1 for at, there in wanted.items() if there is not None and _fits(there, parts[at])}
        else:
            reached = {at + 1 for at in reached if at < len(parts) and _fits(component, parts[at])}
        if not reached:
            return False
    return len(parts) in reached


def _among(component: Sequence, numbers: list[int]) -> Sequence | None:
    return _replaced(component, lambda found: found.among(numbers))


def _fits(component: Sequence, part: str) -> bool:
    return len(part) in _ends(component, part, {0})


def _ends(sequence: Sequence, part: str, starts: set[int]) -> set[int]:
    """Possible ends of `sequence` in `part`, from any of `starts`. Sets avoid exponential backtracking."""
    for piece in sequence:
        if not starts:
            break
        if isinstance(piece, str):
            starts = {at + len(piece) for at in starts if part.startswith(piece, at)}
        elif piece is Wild.CHARACTER:
            starts = {at + 1 for at in starts if at < len(part)}
        elif piece is Wild.CHARACTERS:
            starts = set(range(min(starts), len(part) + 1))
        elif isinstance(piece, Range):
            starts = {at + w for at in starts for w in piece.widths if _in_range(piece, part[at : at + w], w)}
        elif isinstance(piece, Alternatives):
            starts = set().union(*(_ends(item, part, starts) for item in piece.items))
    return starts


def _in_range(piece: Range, digits: str, width: int) -> bool:
    if len(digits) != width or not (digits.isascii() and digits.isdigit()):
        return False
    if width > 1 and not piece.width and digits.startswith("0"):
        return False
    return piece.first <= int(digits) <= piece.last
