"""Parser of globs: text → glob."""

from __future__ import annotations

import re
from typing import NoReturn

from torchparams import limits
from torchparams._selector.globs import (
    RANGE_DIGITS,
    Alternatives,
    Glob,
    Piece,
    Range,
    Sequence,
    Wild,
    counts_from_end,
    is_bare,
    merged,
)
from torchparams.errors import SelectorSyntaxError


def starts_glob(char: str) -> bool:
    """Whether a glob can start with this character."""
    return char != "/" and _in_component(char)


def _in_component(char: str) -> bool:
    return char != "." and char != "" and (char in "*?{\"'\\" or is_bare(char))


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


def _misplaced(component: Sequence) -> bool:
    """Whether a number from the end is not a whole component."""
    if len(component) == 1:
        (piece,) = component
        return isinstance(piece, Alternatives) and any(map(_misplaced, piece.items))
    return counts_from_end(component)
