"""Every error of the library, in one tree.

    TorchParamsError
    ├── SelectorError (ValueError)
    │   ├── SelectorSyntaxError      the text is not a selector; knows the column
    │   └── NoMatch (LookupError)    a part of the selector hits nothing
    ├── UnknownName (KeyError)       a name that the table does not hold
    ├── SourceError
    │   ├── UnsupportedSource (TypeError)   nothing here lists the parameters of such a thing
    │   ├── FileFormatError (ValueError)    the file is not what its format says
    │   │   ├── TruncatedFile               it ends before its own description does
    │   │   ├── TrailingBytes               it goes on after its own description ends
    │   │   └── SizeMismatch                two statements of one size disagree
    │   ├── LimitExceeded (ValueError)      legal, and beyond a limit of `torchparams.limits`
    │   ├── NotReadable (ValueError)        listed, but its values cannot be read here
    │   ├── RemoteError (OSError)           a server or the connection to it failed; knows the status
    │   └── HalfBuilt (AttributeError)      a module whose __init__ has not called that of nn.Module
    ├── NameTaken (KeyError)                a module's parameter cannot have the name of its table
    ├── ReadOnlyTable (TypeError)           a table is looked at; what it shows is changed elsewhere
    ├── MissingDependency (ImportError)     an optional package is needed for this
    ├── PlanError (ValueError)              what is to be written would collide, lose or not fit
    ├── WriteError (OSError)                the disk said no; the target is as it was
    ├── RenameError (ValueError)            what should rename parameters cannot
    ├── OptionError (ValueError)            options that mean nothing, or not together
    ├── RanksError (RuntimeError)           ranks of a process group did not make the same call
    └── MismatchError (ValueError)          two sets of parameters do not fit each other

A message says what is wrong, where, what exists instead, and what to do, in that order and in
one line. Paths and names in it are escaped where they are not printable, so a terminal can show it.
"""

from __future__ import annotations

import difflib
import heapq
import re
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class TorchParamsError(Exception):
    """The root of the tree.

    Args:
        what: What is wrong, without a full stop.
        where: The file, byte offset, tensor or column it is wrong at.
        exists: What there is instead.
        hint: What to do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        exists: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.exists = exists
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        tail = [part.rstrip(".") for part in (self.exists, self.hint) if part]
        if not tail:
            return printable(head.rstrip("."))
        return printable(" ".join(part if part.endswith("?") else f"{part}." for part in (head.rstrip("."), *tail)))


class SelectorError(TorchParamsError, ValueError):
    """A selector that cannot be used."""


class SelectorSyntaxError(SelectorError):
    """The text is not a selector; `column` (from 1) is where it stops being one.

    Args:
        text: The whole selector.
        column: Where it is wrong, from 1; one past its length where it ends too soon.
        expected: What could stand there.
        found: What stands there, where that is more than the one character.
        hint: What to write.
    """

    def __init__(
        self, text: str, column: int, expected: str, *, found: str | None = None, hint: str | None = None
    ) -> None:
        if found is None:
            found = repr(text[column - 1]) if column <= len(text) else "the end"
        super().__init__(
            f"expected {expected}, found {found}",
            where=f"selector {shorten(repr(text), 160)}, column {column}",
            hint=hint,
        )
        self.text, self.column, self.expected = text, column, expected
        # The caret stands below its character: only the line that holds it is shown, and of a long one a window.
        line = text.rfind("\n", 0, column - 1) + 1
        left = max(line, column - 60)
        shown = shorten(text[left : column + 60].partition("\n")[0], 120)
        before = shorten(text[left : column - 1], 120)
        self.add_note(f"    {shown}\n    {' ' * len(before)}^")


class NoMatch(SelectorError, LookupError):
    """A branch of the selector hits nothing."""


_PLAIN = re.compile(r"\w+(\.\w+)*")
_WILD = re.compile(r"[*?{|&~\[:]|^/")


class UnknownName(TorchParamsError, KeyError):
    """A name that the table does not hold."""

    @classmethod
    def among(
        cls, name: str, names: Iterable[str], where: str | None = None, *, aliases: Iterable[str] = ()
    ) -> UnknownName:
        """The error for `name`, with the nearest of `names` and of their `aliases`."""
        known = list(names)
        spellings = [*known, *aliases]
        what = f"no parameter is named {shorten(repr(name), 160)}"
        below = sum(other.startswith(name + ".") for other in spellings)
        if below:
            hint = f"the selector `{name}.**` takes them" if _PLAIN.fullmatch(name) else None
            return cls(what, where=where, exists=f"it names a module, with {below:,} of them below it", hint=hint)
        near = nearest(name, spellings)
        return cls(
            what,
            where=where,
            exists=f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {len(known)} names",
            hint="this takes one name: a selector goes to select" if _WILD.search(name) else None,
        )

    __str__ = TorchParamsError.__str__  # KeyError would print the repr


class SourceError(TorchParamsError):
    """Something whose parameters cannot be listed or read."""


class UnsupportedSource(SourceError, TypeError):
    """Nothing here lists the parameters of such a thing."""


class FileFormatError(SourceError, ValueError):
    """The file is not what its format says."""


class TruncatedFile(FileFormatError):
    """The file ends before its own description does."""


class TrailingBytes(FileFormatError):
    """The file goes on after its own description ends."""


class SizeMismatch(FileFormatError):
    """Two statements of one size disagree."""


class LimitExceeded(SourceError, ValueError):
    """Legal, and beyond a limit of `torchparams.limits`."""


class NotReadable(SourceError, ValueError):
    """A tensor that is listed, but whose values cannot be read here."""


class RemoteError(SourceError, OSError):
    """A server, or the connection to it, failed.

    Args:
        what, where, exists, hint: See `TorchParamsError`.
        status: The HTTP status of the answer; None where there was none.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        exists: str | None = None,
        hint: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(what, where=where, exists=exists, hint=hint)
        self.status = status


class HalfBuilt(SourceError, AttributeError):
    """A module whose `__init__` has not called that of `nn.Module`, so that it cannot hold parameters yet."""


class NameTaken(TorchParamsError, KeyError):
    """A name that is in use for something else, the attribute `parameters` above all."""

    __str__ = TorchParamsError.__str__  # KeyError would print the repr


class ReadOnlyTable(TorchParamsError, TypeError):
    """A table is looked at; what it shows is changed elsewhere."""


class MissingDependency(TorchParamsError, ImportError):
    """An optional package is needed for this."""


class PlanError(TorchParamsError, ValueError):
    """What is to be written would collide, lose something, or not fit."""


class WriteError(TorchParamsError, OSError):
    """Writing failed; the target is as it was before."""


class RenameError(TorchParamsError, ValueError):
    """What should rename parameters cannot: it is not a rename, or makes no names."""


class OptionError(TorchParamsError, ValueError):
    """Options that mean nothing, or not together."""


class RanksError(TorchParamsError, RuntimeError):
    """Ranks of a process group did not make the same call, or one of them failed in it."""


class MismatchError(TorchParamsError, ValueError):
    """Two sets of parameters do not fit each other."""


_COMPARED = 500
"""How many names `nearest` compares letter by letter."""


def nearest(name: str, names: Sequence[str], count: int = 3) -> list[str]:
    """The `count` names most like `name`, best first; empty when none is like it. Linear in the count of names.

    >>> nearest("bais", [f"layer{i}" for i in range(5000)] + ["bias"])
    ['bias']
    """
    # difflib takes some tens of microseconds a name: of very many, those are compared that share the largest part of
    # their letters and pairs of letters with what was asked for.
    if len(names) > 4 * _COMPARED:
        wanted = {*name, *pairwise(name)}

        def alike(other: str) -> float:
            shared = len(wanted.intersection(other)) + len(wanted.intersection(pairwise(other)))
            return shared / (len(wanted) + 2 * len(other) or 1)

        names = heapq.nlargest(_COMPARED, names, key=alike)
    return difflib.get_close_matches(name, names, n=count, cutoff=0.6)


def shorten(text: str, width: int = 80) -> str:
    """`text` in at most `width` characters and on one line, for a message."""
    line = printable(text if len(text) <= width else text[:width])
    return line if len(line) <= width and len(text) <= width else line[: width - 1] + "…"


def printable(text: str) -> str:
    r"""`text` on one line and without control characters, so that a name cannot drive a terminal.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
