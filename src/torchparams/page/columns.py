"""Columns of numbers as text: a typed array in base64, in the smallest type that holds its values."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    Array = np.ndarray[Any, Any]

Packed = dict[str, Any]
"""`{"type": …, "data": …}`: a numpy type (little-endian) and base64."""

_LEAST, _MOST = np.finfo(np.float32).smallest_normal, np.finfo(np.float32).max


def packed(array: Array) -> Packed:
    """Pack an array of any type.

    >>> packed(np.array([1, 2], np.uint8))
    {'type': 'u1', 'data': 'AQI='}
    """
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {"type": little.dtype.str.lstrip("<|"), "data": b64encode(little.tobytes()).decode("ascii")}


def reals(values: Iterable[float] | Array) -> Packed:
    """Pack real numbers as float32 (7 digits), or as float64 if one is outside the range of float32.

    >>> reals([1.0, float("nan")])["type"], reals([1e300])["type"]
    ('f4', 'f8')
    """
    wide = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.float64)
    sizes = abs(wide[np.isfinite(wide) & (wide != 0)])
    fits = not len(sizes) or bool(sizes.max() <= _MOST and sizes.min() >= _LEAST)
    return packed(wide.astype(np.float32) if fits else wide)


def counts(values: Iterable[int] | Array) -> Packed:
    """Pack natural numbers exactly; beyond 32 bits as float64, which is exact up to 2^53.

    >>> [counts([1, most])["type"] for most in (255, 256, 1 << 16, 1 << 32)]
    ['u1', 'u2', 'u4', 'f8']
    """
    wide = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.uint64)
    most = int(wide.max()) if wide.size else 0
    kind = np.uint8 if most < 1 << 8 else np.uint16 if most < 1 << 16 else np.uint32 if most < 1 << 32 else np.float64
    return packed(wide.astype(kind))


def words(values: Sequence[Hashable]) -> dict[str, Any]:
    """Pack values with many repeats: a list of the distinct values, and an index for each value.

    >>> words(["a", "b", "a"])
    {'words': ['a', 'b'], 'of': {'type': 'u1', 'data': 'AAEA'}}
    """
    known: dict[Hashable, int] = {}
    places = [known.setdefault(value, len(known)) for value in values]
    return {"words": list(known), "of": counts(places)}
