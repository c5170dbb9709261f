"""Values on the stack of the pickle interpreter, besides plain Python values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torchparams.errors import shorten

Buffer = bytes | memoryview

LONG_TEXT = 1024
"""Longer texts are interned, so that equal texts are one object."""

_SHORT_INT = 1 << 64  # formatting longer integers is slow, and a key may be used often


class Malformed(Exception):
    """The pickle is invalid; the message says why, and the interpreter adds the position."""


class Cut(Malformed):
    """The pickle is truncated."""


class Global:
    """Name of an object that Python would import.

    Attributes:
        module: Module as spelled in the file.
        name: Name as spelled in the file; dotted for nested classes.
        build: Replacement to call instead, or None.
        called: Whether the pickle calls it with arguments that no replacement handles.
    """

    __slots__ = ("build", "called", "module", "name")

    def __init__(self, module: str, name: str, build: Constructor | None = None) -> None:
        self.module, self.name, self.build, self.called = module, name, build, False

    def __repr__(self) -> str:
        if not self.module:
            return self.name
        return shorten(f"{self.module[:160]}.{self.name[:160]}", 160)


class Reduced:
    """A call that was not made, or an object that was not built.

    Attributes:
        func: Class or function, usually a `Global`; a hostile file may use any value.
        args: Arguments, usually a tuple.
        state: Argument of `__setstate__` or the `__dict__` of the object, or None.
        items: Values to append, or None.
        pairs: Values to set by key, or None.
    """

    __slots__ = ("args", "func", "items", "pairs", "state")

    def __init__(self, func: Any, args: Any) -> None:
        self.func, self.args = func, args
        self.state: Any = None
        self.items: list[Any] | None = None
        self.pairs: dict[Any, Any] | None = None


class Blob:
    """A long byte string that was not copied: bytes `[start, stop)` of `data`, or of the file if `data` is None."""

    __slots__ = ("data", "start", "stop")

    def __init__(self, data: Buffer | None, start: int, stop: int) -> None:
        self.data, self.start, self.stop = data, start, stop

    def __len__(self) -> int:
        return self.stop - self.start


class OddKey:
    """Dict key that hashes by identity."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class NumberKey:
    """Dict key that is a number; equal numbers are one key, as in Python.

    Python's hash of a number is predictable, so a file could choose numbers that collide. This key hashes its text,
    whose hash is randomised per process.
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
    """The part of the interpreter that constructors and their results may use.

    Attributes:
        data: The buffer that it runs.
        label: Name of the buffer in messages.
        left: Number of operations that may still run.
        imported: All globals named so far, each once.
    """

    data: Buffer
    label: str
    left: int
    imported: list[Global]

    def charge(self, cost: int) -> None:
        """Count `cost` more operations.

        Raises:
            LimitExceeded: The pickle runs too many operations.
        """

    def note_call(self, func: Any) -> None:
        """Note that `func` would be called and has no replacement."""

    def encoded(self, text: str, codec: str) -> bytes:
        """`text` encoded with `codec`, cached."""

    def set_items(self, target: Any, items: Sequence[Any]) -> None:
        """Add alternating keys and values to a dict."""


class Rebuilt:
    """Base of objects that known constructors build and a later BUILD may complete."""

    __slots__ = ()

    def set_state(self, machine: Services, state: Any) -> None:
        """Apply the argument of `__setstate__`."""


Constructor = Callable[[Services, Global, Any], Any]
"""`(machine, global, arguments) -> value`; NotImplemented if the arguments are unknown."""


def as_key(value: Any) -> Any:
    """`value` as a dict key that is always fast to hash and compare."""
    kind = type(value)
    if kind is str:
        return value  # long texts are interned, so comparing equal ones is fast
    if kind is int or kind is float or kind is bool:
        return NumberKey(value) if -_SHORT_INT < value < _SHORT_INT else OddKey(value)  # NaN is an odd one too
    if value is None or (kind is bytes and len(value) <= LONG_TEXT):
        return value
    return OddKey(value)
