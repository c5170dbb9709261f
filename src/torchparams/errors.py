"""Exceptions of torchparams.

    TorchParamsError
    ├── SelectorError (ValueError)
    │   ├── SelectorSyntaxError      the text is not a selector; has the column
    │   └── NoMatch (LookupError)    a part of the selector matches nothing
    ├── UnknownName (KeyError)       a name that is not in the table
    ├── SourceError
    │   ├── UnsupportedSource (TypeError)   an object or file of an unsupported type
    │   ├── FileFormatError (ValueError)    the file breaks the rules of its format
    │   │   ├── TruncatedFile               it is shorter than its header says
    │   │   ├── TrailingBytes               it is longer than its header says
    │   │   └── SizeMismatch                two sizes in it disagree
    │   ├── LimitExceeded (ValueError)      valid, but over a limit of `torchparams.limits`
    │   ├── NotReadable (ValueError)        a listed tensor without readable values
    │   ├── RemoteError (OSError)           a server or connection failed; has the status
    │   └── HalfBuilt (AttributeError)      a module whose __init__ did not call super().__init__()
    ├── NameTaken (KeyError)                a name that a module already uses
    ├── ReadOnlyTable (TypeError)           an assignment to a read-only table
    ├── MissingDependency (ImportError)     an optional package is not installed
    ├── PlanError (ValueError)              a plan that cannot be carried out
    ├── WriteError (OSError)                writing failed; the target is unchanged
    ├── RenameError (ValueError)            an invalid rename
    ├── OptionError (ValueError)            an invalid option, or invalid together
    ├── RanksError (RuntimeError)           ranks of a process group made different calls
    ├── EngineError (RuntimeError)          a cluster cannot be reached, or its workers died
    └── MismatchError (ValueError)          two sets of parameters that do not match

A message says where something is wrong, what is wrong, what exists instead, and what to do, in that order, in one
line. Its parts are written in lower case; each becomes a sentence with a capital letter. Unprintable characters in
paths and names are escaped, so messages are safe to print in a terminal.
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
    """Base class of all exceptions of torchparams.

    Args:
        what: What is wrong, in lower case and without a full stop, like `exists` and `hint`. Quote a name that begins
            it, and put an identifier in backticks.
        where: File, byte offset, tensor or column.
        exists: What exists instead.
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
        what = sentence(self.what)
        head = f"{self.where}: {what}" if self.where else what
        tail = [sentence(part).rstrip(".") for part in (self.exists, self.hint) if part]
        if not tail:
            return printable(head.rstrip("."))
        return printable(" ".join(part if part.endswith("?") else f"{part}." for part in (head.rstrip("."), *tail)))


class SelectorError(TorchParamsError, ValueError):
    """A selector cannot be used."""


class SelectorSyntaxError(SelectorError):
    """A text is not a selector; `column`, counted from 1, is the position of the error.

    Args:
        text: The whole selector.
        column: Position of the error, from 1; length plus one if the text ends too early.
        expected: Expected syntax.
        found: Text found, if longer than one character.
        hint: What to write instead.
    """

    def __init__(
        self, text: str, column: int, expected: str, *, found: str | None = None, hint: str | None = None
    ) -> None:
        if found is None:
            found = repr(text[column - 1]) if column <= len(text) else "the end"
        super().__init__(
            f"expected {expected}, found {found}",
            where=f"Selector {shorten(repr(text), 160)}, column {column}",
            hint=hint,
        )
        self.text, self.column, self.expected = text, column, expected
        # The caret is below its character; only that line is shown, and a part of it if it is long.
        line = text.rfind("\n", 0, column - 1) + 1
        left = max(line, column - 60)
        shown = shorten(text[left : column + 60].partition("\n")[0], 120)
        before = shorten(text[left : column - 1], 120)
        self.add_note(f"    {shown}\n    {' ' * len(before)}^")


class NoMatch(SelectorError, LookupError):
    """A branch of a selector matches nothing."""


_PLAIN = re.compile(r"\w+(\.\w+)*")
_WILD = re.compile(r"[*?{|&~\[:]|^/")


class UnknownName(TorchParamsError, KeyError):
    """A name is not in the table."""

    @classmethod
    def among(
        cls, name: str, names: Iterable[str], where: str | None = None, *, aliases: Iterable[str] = ()
    ) -> UnknownName:
        """Create the error for `name`, with the nearest of `names` and `aliases`."""
        known = list(names)
        spellings = [*known, *aliases]
        what = f"no parameter is named {shorten(repr(name), 160)}"
        below = sum(other.startswith(name + ".") for other in spellings)
        if below:
            hint = f"the selector `{name}.**` selects them" if _PLAIN.fullmatch(name) else None
            return cls(what, where=where, exists=f"it is a module with {below:,} parameters", hint=hint)
        near = nearest(name, spellings)
        return cls(
            what,
            where=where,
            exists=f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {len(known)} names",
            hint="for a selector, use select" if _WILD.search(name) else None,
        )

    __str__ = TorchParamsError.__str__  # KeyError prints the repr


class SourceError(TorchParamsError):
    """Parameters cannot be listed or read."""


class UnsupportedSource(SourceError, TypeError):
    """The type of an object or file is not supported."""


class FileFormatError(SourceError, ValueError):
    """A file breaks the rules of its format."""


class TruncatedFile(FileFormatError):
    """A file is shorter than its header says."""


class TrailingBytes(FileFormatError):
    """A file is longer than its header says."""


class SizeMismatch(FileFormatError):
    """Two sizes in a file disagree."""


class LimitExceeded(SourceError, ValueError):
    """A file is valid, but exceeds a limit of `torchparams.limits`."""


class NotReadable(SourceError, ValueError):
    """A tensor is listed, but its values cannot be read."""


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
    """A module cannot hold parameters yet, because its `__init__` did not call `super().__init__()`."""


class NameTaken(TorchParamsError, KeyError):
    """A name of a module is already in use, such as the attribute `parameters`."""

    __str__ = TorchParamsError.__str__  # KeyError prints the repr


class ReadOnlyTable(TorchParamsError, TypeError):
    """A table is read-only; change the model or file instead."""


class MissingDependency(TorchParamsError, ImportError):
    """An optional package is not installed."""


class PlanError(TorchParamsError, ValueError):
    """A plan has colliding names, cannot store a tensor, or does not fit."""


class WriteError(TorchParamsError, OSError):
    """Writing failed; the target is unchanged."""


class RenameError(TorchParamsError, ValueError):
    """A rename is invalid, or produces invalid names."""


class OptionError(TorchParamsError, ValueError):
    """An option is invalid, or cannot be combined with another."""


class RanksError(TorchParamsError, RuntimeError):
    """Ranks of a process group did not make the same call, or one of them failed in it."""


class EngineError(TorchParamsError, RuntimeError):
    """A cluster cannot be reached, or its workers died more often than their work is done again."""


class MismatchError(TorchParamsError, ValueError):
    """Two sets of parameters do not match."""


_COMPARED = 500
"""Maximum number of names that `nearest` compares in full."""


def nearest(name: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Names most similar to `name`, best first; empty if none is similar. Linear in the number of names.

    >>> nearest("bais", [f"layer{i}" for i in range(5000)] + ["bias"])
    ['bias']
    """
    # difflib takes tens of microseconds per name. With many names, only those are compared that share most letters and
    # pairs of letters with the requested name.
    if len(names) > 4 * _COMPARED:
        wanted = {*name, *pairwise(name)}

        def alike(other: str) -> float:
            shared = len(wanted.intersection(other)) + len(wanted.intersection(pairwise(other)))
            return shared / (len(wanted) + 2 * len(other) or 1)

        names = heapq.nlargest(_COMPARED, names, key=alike)
    return difflib.get_close_matches(name, names, n=count, cutoff=0.6)


_FIRST_WORD = re.compile(r"([a-z]+)(?:['-][a-z]+)*(?=[\s,;:?]|$)")
_LOWER_CASE = frozenset(
    ("git", "numpy", "nanoarrow", "pip", "pyarrow", "safetensors", "torch", "torchparams", "transformers")
)
"""Names of libraries and commands, which keep their spelling at the beginning of a sentence."""


def sentence(text: str) -> str:
    """`text` with a capital letter, unless it begins with a quoted name, a path, an identifier or a command.

    >>> sentence("the file ends early"), sentence("torch.save writes it"), sentence("'fc.bias' is lazy")
    ('The file ends early', 'torch.save writes it', "'fc.bias' is lazy")
    """
    word = _FIRST_WORD.match(text)
    return text if word is None or word[1] in _LOWER_CASE else text[0].upper() + text[1:]


def shorten(text: str, width: int = 80) -> str:
    """Shorten a text to one line of at most `width` characters, for messages."""
    line = printable(text if len(text) <= width else text[:width])
    return line if len(line) <= width and len(text) <= width else line[: width - 1] + "…"


def printable(text: str) -> str:
    r"""Escape unprintable characters, so that a name cannot control a terminal.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
