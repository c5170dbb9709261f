"""JSON without any licence: what the headers and indexes of checkpoints are held to.

Python's own parser takes more than the standard: NaN, repeated keys, half surrogates, numbers of any length. Here
each is an error that says where it is. This is the slow way, which only files that are odd or wrong go through,
and files that are small.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from torchparams.errors import FileFormatError, shorten


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, in order, repeated keys and all; a JSON array is a plain list."""


class _Refused(Exception):
    """What is wrong with a number."""


_MOST_DIGITS = 40  # more than any 64-bit integer has, and few enough to convert at once


def strict(data: bytes, what: str, path: str, start: int = 0) -> Any:
    """The JSON text in `data`, with every object as `Pairs`.

    Args:
        data: UTF-8 text.
        what: What it is, for messages: `the header`.
        path: The file, for messages.
        start: Where `data` starts in the file.

    Raises:
        FileFormatError: It is not JSON. Says at which byte.
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
        raise FileFormatError(f"{what} nests its values too deep to be one", where=path) from None
    except _Refused as error:
        raise FileFormatError(f"{what} {error}", where=path) from None
    if "\\u" in text:
        _refuse_half_surrogates(value, what, path)
    return value


_HOLLOW = 10_000  # arrays and objects that any JSON text may hold


def refuse_hollow(data: bytes, what: str, path: str) -> None:
    """Refuse JSON that is hardly more than brackets, before it is parsed.

    An empty array takes three bytes of text and sixty of memory. The entry of a tensor takes at least 48 bytes, with
    three arrays and objects.

    Args:
        data: The JSON text.
        what: What it is, for messages: `the header`.
        path: The file, for messages.

    Raises:
        FileFormatError: It has more arrays and objects than any file of tensors.
    """
    most = _HOLLOW + len(data) // 16
    count = data.count(b"[") + data.count(b"{")
    if count > most:
        count = _brackets(data)
        if count > most:
            raise FileFormatError(
                f"{what} of {len(data):,} bytes holds {count:,} arrays and objects, more than tensors need", where=path
            )


def _brackets(data: bytes) -> int:
    """How many arrays and objects begin outside of texts."""
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    count = at = 0
    while at >= 0:
        begin = data.find(b'"', at)
        stop = len(data) if begin < 0 else begin
        count += data.count(b"[", at, stop) + data.count(b"{", at, stop)
        at = -1 if begin < 0 else data.find(b'"', begin + 1) + 1 or -1
    return count


def as_object(value: Any, what: str, path: str) -> dict[str, Any]:
    """The JSON object `value`, as `strict` gave it, as a dict.

    Raises:
        FileFormatError: It is not an object, or a key stands in it twice.
    """
    if type(value) is not Pairs:
        raise FileFormatError(f"{what} is {describe(value)}, not an object", where=path)
    made = dict(value)
    if len(made) != len(value):
        seen: set[str] = set()
        for key, _ in value:
            if key in seen:
                raise FileFormatError(f"{what} holds the key {quoted(key)} twice", where=path)
            seen.add(key)
    return made


def refuse_repeats(value: Any, what: str, path: str) -> None:
    """Refuse a value in which, at any depth, an object holds a key twice."""
    left = [value]
    while left:
        item = left.pop()
        if type(item) is Pairs:
            left.extend(as_object(item, what if item is value else f"an object in {what}", path).values())
        elif type(item) is list:
            left.extend(item)


def plain(value: Any, what: str, path: str) -> Any:
    """A value from `strict` with dicts for its objects.

    Raises:
        FileFormatError: An object in it holds a key twice.
    """
    refuse_repeats(value, what, path)
    try:
        return _plain(value)
    except RecursionError:
        raise FileFormatError(f"{what} nests its values too deep", where=path) from None


def _plain(value: Any) -> Any:
    if type(value) is Pairs:
        return {key: _plain(inner) for key, inner in value}
    return [_plain(inner) for inner in value] if type(value) is list else value


def describe(value: Any) -> str:
    """What a JSON value is, for a message: `the number 3`, `an array`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    return "an object" if isinstance(value, Pairs) else "an array"


def quoted(text: str) -> str:
    """A name out of a file, short and on one line."""
    return f"'{shorten(text, 120)}'"


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise _Refused(f"holds the number {digits[:20]}… of {len(digits)} characters")
    if digits == "-0":
        raise _Refused("holds the number -0, which is not an integer")
    return int(digits)


def _fraction(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _Refused(f"holds the number {digits[:40]}, which is beyond any float")
    return number


def _constant(name: str) -> NoReturn:
    raise _Refused(f"holds {name}, which JSON does not have")


_DECODER = json.JSONDecoder(
    object_pairs_hook=Pairs, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
)


def _refuse_half_surrogates(value: Any, what: str, path: str) -> None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise FileFormatError(
                    f"{what} holds the text {quoted(item)}, in which half of a surrogate pair stands alone", where=path
                ) from None
        elif isinstance(item, Pairs):
            for pair in item:
                left.extend(pair)
        elif isinstance(item, list):
            left.extend(item)
