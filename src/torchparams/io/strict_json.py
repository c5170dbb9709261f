"""Strict JSON parser for headers and indexes of checkpoints.

Python's parser accepts more than the standard: NaN, repeated keys, lone surrogates, numbers of any length. Here each of
these is an error with its position. This parser is slow; it is used for small files, and for files that look odd or
wrong.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from torchparams.errors import FileFormatError, shorten


class Object(list[tuple[str, Any]]):
    """JSON object as a list of pairs, including repeated keys; a JSON array is a plain list."""


class _Refused(Exception):
    """A number is not allowed."""


_MOST_DIGITS = 40  # more than any 64-bit integer, and cheap to convert


def strict(data: bytes, what: str, path: str, start: int = 0) -> Any:
    """Parse JSON text, with every object as `Object`.

    Args:
        data: UTF-8 text.
        what: Description for messages, such as `the header`.
        path: File, for messages.
        start: Offset of `data` in the file.

    Raises:
        FileFormatError: The text is not JSON; the message has the byte offset.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(
            f"{what} is not UTF-8: {error.reason} {data[error.start]:#04x}", where=f"{path}, byte {start + error.start}"
        ) from None
    refuse_hollow(data, what, path)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        at = start + len(text[: error.pos].encode())
        found = repr(text[error.pos]) if error.pos < len(text) else "its end"
        reason = error.msg[:1].lower() + error.msg[1:]
        raise FileFormatError(f"{what} is not JSON: {reason}, found {found}", where=f"{path}, byte {at}") from None
    except RecursionError:
        raise FileFormatError(f"{what} is nested too deeply", where=path) from None
    except _Refused as error:
        raise FileFormatError(f"{what} {error}", where=path) from None
    if "\\u" in text:
        _refuse_half_surrogates(value, what, path)
    return value


_HOLLOW = 10_000  # arrays and objects that are always allowed


def refuse_hollow(data: bytes, what: str, path: str) -> None:
    """Reject JSON that consists of brackets, before parsing it.

    An empty array takes three bytes of text, but sixty bytes of memory. The entry of a tensor takes at least 48 bytes,
    with three arrays and objects.

    Args:
        data: JSON text.
        what: Description for messages, such as `the header`.
        path: File, for messages.

    Raises:
        FileFormatError: There are more arrays and objects than tensors can need.
    """
    most = _HOLLOW + len(data) // 16
    count = data.count(b"[") + data.count(b"{")
    if count > most:
        count = _brackets(data)
        if count > most:
            raise FileFormatError(
                f"{what} of {len(data):,} bytes has {count:,} arrays and objects, more than tensors need", where=path
            )


def _brackets(data: bytes) -> int:
    """Number of arrays and objects that start outside strings."""
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    count = at = 0
    while at >= 0:
        begin = data.find(b'"', at)
        stop = len(data) if begin < 0 else begin
        count += data.count(b"[", at, stop) + data.count(b"{", at, stop)
        at = -1 if begin < 0 else data.find(b'"', begin + 1) + 1 or -1
    return count


def as_object(value: Any, what: str, path: str) -> dict[str, Any]:
    """Convert a JSON object from `strict` to a dict.

    Raises:
        FileFormatError: The value is not an object, or has a repeated key.
    """
    if type(value) is not Object:
        raise FileFormatError(f"{what} is {describe(value)}, not an object", where=path)
    made = dict(value)
    if len(made) != len(value):
        seen: set[str] = set()
        for key, _ in value:
            if key in seen:
                raise FileFormatError(f"{what} has the key {quoted(key)} twice", where=path)
            seen.add(key)
    return made


def refuse_repeats(value: Any, what: str, path: str) -> None:
    """Reject a value that contains, at any depth, an object with a repeated key."""
    left = [value]
    while left:
        item = left.pop()
        if type(item) is Object:
            left.extend(as_object(item, what if item is value else f"an object in {what}", path).values())
        elif type(item) is list:
            left.extend(item)


def plain(value: Any, what: str, path: str) -> Any:
    """Convert a value from `strict` to plain dicts and lists.

    Raises:
        FileFormatError: An object has a repeated key.
    """
    refuse_repeats(value, what, path)
    try:
        return _plain(value)
    except RecursionError:
        raise FileFormatError(f"{what} is nested too deeply", where=path) from None


def _plain(value: Any) -> Any:
    if type(value) is Object:
        return {key: _plain(inner) for key, inner in value}
    return [_plain(inner) for inner in value] if type(value) is list else value


def describe(value: Any) -> str:
    """Description of a JSON value for messages, such as `the number 3` or `an array`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    return "an object" if isinstance(value, Object) else "an array"


def quoted(text: str) -> str:
    """Name from a file, shortened to one line."""
    return f"'{shorten(text, 120)}'"


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _Refused(f"has the number {digits[:20]}… of {len(digits)} characters")
    if digits == "-0":
        raise _Refused("has the number -0, which is not an integer")
    return int(digits)


def _fraction(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _Refused(f"has the number {digits[:40]}, which overflows float64")
    return number


def _constant(name: str) -> NoReturn:
    raise _Refused(f"has {name}, which JSON does not allow")


_DECODER = json.JSONDecoder(
    object_pairs_hook=Object, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
)


def _refuse_half_surrogates(value: Any, what: str, path: str) -> None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise FileFormatError(f"{what} has the text {quoted(item)} with a lone surrogate", where=path) from None
        elif isinstance(item, Object):
            for pair in item:
                left.extend(pair)
        elif isinstance(item, list):
            left.extend(item)
