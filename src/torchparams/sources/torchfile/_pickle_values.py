"""What a pickle's machine puts on its stack, beside plain values of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torchparams.errors import shorten

Buffer = bytes | memoryview

LONG_TEXT = 1024
"""Texts longer than this are interned, so that equal ones are one object."""

_SHORT_INT = 1 << 64  # the text of a longer integer takes time to make, and a key may be used again and again


class Malformed(Exception):
    """What is wrong with the pickle; the machine adds where."""


class Cut(Malformed):
    """The pickle ends in the middle of something."""


class Global:
    """The name of something that Python would import.

    Attributes:
        module: As the file spells it.
        name: As the file spells it; dotted for nested classes.
        build: Our own stand-in for calling it, or None.
        called: Whether the pickle calls it with arguments that no stand-in of ours understands.
    """

    __slots__ = ("build", "called", "module", "name")

    def __init__(self, module: str, name: str, build: Constructor | None = None) -> None:
        self.module, self.name, self.build, self.called = module, name, build, False

    def __repr__(self) -> str:
        if not self.module:
            return self.name
        return shorten(f"{self.module[:160]}.{self.name[:160]}", 160)


class Reduced:
    """A call or an object that was not made: what was to be called, and everything given to it.

    Attributes:
        func: The class or function, a `Global`; a hostile file may put anything here.
        args: Its arguments: a tuple, as a rule.
        state: What `__setstate__` or the object's `__dict__` was to be given, or None.
        items: Values that were to be appended, or None.
        pairs: Values that were to be set by key, or None.
    """

    __slots__ = ("args", "func", "items", "pairs", "state")

    def __init__(self, func: Any, args: Any) -> None:
        self.func, self.args = func, args
        self.state: Any = None
        self.items: list[Any] | None = None
        self.pairs: dict[Any, Any] | None = None


class Blob:
    """A long byte string, left where it lies: bytes `[start, stop)` of `data`, or of the file if that is None."""

    __slots__ = ("data", "start", "stop")

    def __init__(self, data: Buffer | None, start: int, stop: int) -> None:
        self.data, self.start, self.stop = data, start, stop

    def __len__(self) -> int:
        return self.stop - self.start


class OddKey:
    """A dictionary key that hashes by identity, whatever it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class NumberKey:
    """A dictionary key that is a number: equal numbers are one key, as in Python.

    Python's hash of a number is known to everybody, so a file could choose numbers that collide. This one hashes its
    text, of which the hash is a secret of the process.
    """

    __slots__ = ("_text", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._text = str(int(value)) if value == value // 1 else repr(value)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return type(other) is NumberKey and self._text == other._text


class Services(Protocol):
    """What of the machine is there for constructors and for what they make.

    Attributes:
        data: The buffer that it runs.
        label: What messages call that.
        left: Operations that it may still run.
        imported: Every global that was named, once.
    """

    data: Buffer
    label: str
    left: int
    imported: list[Global]

    def charge(self, cost: int) -> None:
        """Count `cost` more operations.

        Raises:
            LimitExceeded: Together they are too many.
        """

    def note_call(self, func: Any) -> None:
        """Note that `func` would be called, and nothing here stands in for that."""

    def encoded(self, text: str, codec: str) -> bytes:
        """`text` in `codec`, made once."""

    def set_items(self, target: Any, items: Sequence[Any]) -> None:
        """Put keys and values, one after the other, into a dict."""


class Rebuilt:
    """Base of the objects that our own constructors make and a later BUILD may complete."""

    __slots__ = ()

    def set_state(self, machine: Services, state: Any) -> None:
        """Take what `__setstate__` would be given."""


Constructor = Callable[[Services, Global, Any], Any]
"""`(machine, global, arguments) -> value`; NotImplemented when the arguments are not what it knows."""


def as_key(value: Any) -> Any:
    """`value` as a key that hashes and compares quickly, whoever chose it."""
    kind = type(value)
    if kind is str:
        return value  # long ones are interned, so that comparing two equal ones never reads them
    if kind is int or kind is float or kind is bool:
        return NumberKey(value) if -_SHORT_INT < value < _SHORT_INT else OddKey(value)  # NaN is an odd one too
    if value is None or (kind is bytes and len(value) <= LONG_TEXT):
        return value
    return OddKey(value)
