r"""Renames: rules that map names of one set of parameters to another.

A **rename** has one of these forms; all verbs that rename (`diff`, `load`, `convert`) accept them:

| form | effect on each name |
|---|---|
| `{"old.name": "new.name"}` | a key becomes its value; every key must exist |
| `r"^model\.=encoder."` | `re.sub`; the pattern is the text before the **last** `=` |
| `(r"^model\.", "encoder.")` | `re.sub`; a pair may contain `=` anywhere |
| a function | becomes the result of the function |
| `Renames.strip_prefix("model.")` | loses the prefix, if it has it |
| a list of these | goes through all, in order |

A pattern, prefix or key without a match is an error, and so is a collision of two names. Text without `=` is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torchparams._selector.bounded import SIMPLER, Bounded, TooSlow
from torchparams.errors import MismatchError, NoMatch, RenameError, UnknownName, shorten

if TYPE_CHECKING:
    from torchparams.info import ParameterInfo

    Infos = Mapping[str, ParameterInfo]

SPELLINGS = "a mapping old → new, 'regex=replacement', a pair of these, a function of a name, or a list of them"
"""Forms of a rename, for messages."""


class _Renaming(Protocol):
    def rename(self, names: list[str], strict: bool, where: str | None) -> list[str]: ...

    def to_json(self) -> Any: ...


class Renames:
    r"""Renaming rules: immutable, printable, and applied to a whole list of names at once.

    Created by `Renames.of`, `strip_prefix`, `add_prefix` and `propose`.

    >>> renames = Renames.of([r"^model\.=", ("weight$", "kernel")])
    >>> renames.apply(["model.fc.weight", "model.fc.bias"])
    {'model.fc.weight': 'fc.kernel', 'model.fc.bias': 'fc.bias'}
    >>> print(renames)
    '^model\\.' → '', 'weight$' → 'kernel'
    """

    __slots__ = ("_rules",)

    def __init__(self, *rules: _Renaming) -> None:
        self._rules = rules

    @classmethod
    def of(cls, spec: object) -> Renames:
        """Create renames from any form above; None changes nothing.

        Raises:
            RenameError: The form is unknown, or a pattern is not a regular expression.

        >>> Renames.of({"a": "b"}).apply(["a", "c"])
        {'a': 'b', 'c': 'c'}
        """
        if spec is None:
            return cls()
        if isinstance(spec, Renames):
            return spec
        if isinstance(spec, Mapping):
            return cls(_Exact.of(spec))
        if isinstance(spec, str):
            return cls(_Regex.parse(spec))
        if callable(spec) and not isinstance(spec, type):
            return cls(_Function(spec))
        if isinstance(spec, Iterable) and not isinstance(spec, bytes | type):
            rules: list[_Renaming] = []
            for item in spec:
                if isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):
                    rules.append(_Regex.of(*item))
                elif item is None or isinstance(item, tuple | list):
                    raise _refused(item)
                else:
                    rules.extend(cls.of(item)._rules)
            return cls(*rules)
        raise _refused(spec)

    @classmethod
    def strip_prefix(cls, prefix: str) -> Renames:
        """Remove a prefix from the names that have it.

        >>> Renames.strip_prefix("model.").apply(["model.fc.weight", "epoch"])
        {'model.fc.weight': 'fc.weight', 'epoch': 'epoch'}
        """
        return cls(_Prefix(prefix, ""))

    @classmethod
    def add_prefix(cls, prefix: str) -> Renames:
        """Add a prefix to every name.

        >>> Renames.add_prefix("model.").apply(["fc.weight"])
        {'fc.weight': 'model.fc.weight'}
        """
        return cls(_Prefix("", prefix))

    def apply(self, names: Iterable[str], *, strict: bool = True, where: str | None = None) -> dict[str, str]:
        """Map each old name to its new name, in order; linear in the number of names.

        Args:
            names: Names to rename.
            strict: Raise if a pattern, prefix or key matches nothing.
            where: Label of the source, for errors.

        Raises:
            MismatchError: Two names become one; the message names both.
            NoMatch: With `strict`, a pattern or prefix matches nothing.
            UnknownName: With `strict`, a key of a mapping is not a name.
            RenameError: A name becomes empty, a function returns something other than a name, or a pattern takes too
                long.
        """
        old = list(names)
        new = old
        for rule in self._rules:
            new = rule.rename(new, strict, where)
        taken: dict[str, str] = {}
        for before, after in zip(old, new, strict=True):
            if not after:
                raise RenameError(f"{before!r} would have an empty name", where=where)
            if taken.setdefault(after, before) is not before:
                raise MismatchError(f"{taken[after]!r} and {before!r} would both be named {after!r}", where=where)
        return dict(zip(old, new, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The rename as JSON data: text and rules."""
        return {"text": str(self), "rules": [rule.to_json() for rule in self._rules]}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def __str__(self) -> str:
        return ", ".join(map(str, self._rules)) or "no name changes"

    def __repr__(self) -> str:
        return f"<Renames: {self}>"


def _refused(spec: object) -> RenameError:
    return RenameError(f"{shorten(repr(spec))} is not a rename", exists=f"a rename is {SPELLINGS}")


# --- rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Exact:
    names: Mapping[str, str]
    text: str = ""

    @staticmethod
    def of(names: Mapping[Any, Any]) -> _Exact:
        for old, new in names.items():
            if not (isinstance(old, str) and isinstance(new, str)):
                raise RenameError(f"a mapping for renaming must map names to names, but contains {old!r}: {new!r}")
        return _Exact(dict(names))

    def rename(self, names: list[str], strict: bool, where: str | None) -> list[str]:
        if strict:
            known = set(names)
            for old in self.names:
                if old not in known:
                    raise UnknownName.among(old, names, where)
        return [self.names.get(name, name) for name in names]

    def to_json(self) -> Any:
        return {"names": dict(self.names)}

    def __str__(self) -> str:
        if self.text:
            return self.text
        shown = [f"{old!r} → {new!r}" for old, new in list(self.names.items())[:3]]
        more = len(self.names) - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more else "")


@dataclass(frozen=True, slots=True)
class _Regex:
    bounded: Bounded
    replacement: str

    @property
    def pattern(self) -> re.Pattern[str]:
        return self.bounded.compiled

    @staticmethod
    def parse(text: str) -> _Regex:
        pattern, equals, replacement = text.rpartition("=")
        if not equals:
            raise RenameError(
                f"{shorten(repr(text))} is not a rename",
                exists="as text, a rename is 'regex=replacement'",
                hint=f"to remove it, write {shorten(repr(text + '='))}",
            )
        return _Regex.of(pattern, replacement)

    @staticmethod
    def of(pattern: str, replacement: str) -> _Regex:
        try:
            bounded = Bounded(pattern)
        except re.error as error:
            raise RenameError(f"{shorten(repr(pattern))} is not a regular expression: {error}") from None
        try:
            bounded.compiled.sub(replacement, "")  # also parses an unused replacement
        except (re.error, IndexError) as error:
            raise RenameError(f"{shorten(repr(replacement))} cannot replace {pattern!r}: {error}") from None
        return _Regex(bounded, replacement)

    def rename(self, names: list[str], strict: bool, where: str | None) -> list[str]:
        try:
            found = self.bounded.replace(names, self.replacement)
        except TooSlow as error:
            what = f"the pattern {shorten(repr(self.pattern.pattern))} of a rename {error}"
            raise RenameError(what, where=where, hint=SIMPLER) from None
        if strict and names and not any(count for _, count in found):
            raise NoMatch(f"the rename pattern {self.pattern.pattern!r} matches no name", where=where)
        return [name for name, _ in found]

    def to_json(self) -> Any:
        return {"pattern": self.pattern.pattern, "replacement": self.replacement}

    def __str__(self) -> str:
        return f"{self.pattern.pattern!r} → {self.replacement!r}"


@dataclass(frozen=True, slots=True)
class _Prefix:
    old: str
    new: str

    def rename(self, names: list[str], strict: bool, where: str | None) -> list[str]:
        found = [self.new + name[len(self.old) :] if name.startswith(self.old) else name for name in names]
        if strict and names and not any(name.startswith(self.old) for name in names):
            raise NoMatch(f"no name starts with the prefix {self.old!r} to strip", where=where)
        return found

    def to_json(self) -> Any:
        return {"strip": self.old} if self.old else {"add": self.new}

    def __str__(self) -> str:
        return f"strip {self.old!r}" if self.old else f"add {self.new!r}"


@dataclass(frozen=True, slots=True)
class _Function:
    function: Callable[..., Any]

    def rename(self, names: list[str], strict: bool, where: str | None) -> list[str]:
        found = []
        for name in names:
            new = self.function(name)
            if not isinstance(new, str):
                raise RenameError(
                    f"a rename function returned {shorten(repr(new))} for {name!r}, which is not a name", where=where
                )
            found.append(new)
        return found

    def to_json(self) -> Any:
        return {"function": str(self)}

    def __str__(self) -> str:
        return getattr(self.function, "__qualname__", None) or type(self.function).__name__


def renamed(names: Mapping[str, str], text: str) -> Renames:
    """Rename of some names, with a custom text; other names stay.

    >>> print(renamed({"model.a": "a"}, "strip 'model.'"))
    strip 'model.'
    """
    return Renames(_Exact(dict(names), text))
