"""Meaning of the codes that sketches count, for each dtype.

`Coding.of` tells how a dtype is counted: by which kind of kernel, and whether a code is a value (dtypes of at most 16
bits) or an interval of values (wider dtypes, with 7 bits of mantissa).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from torchparams.dtypes import DType
from torchparams.errors import NotReadable
from torchparams.sketch.kernels import SIGN_CODE, UNIT, Array, group_counts

_KIND_OF_WIDE = {
    "float32": "f32",
    "float64": "f64",
    "int32": "i32",
    "uint32": "u32",
    "int64": "i64",
    "uint64": "u64",
}
_COMPONENT = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}

# float16 has the longest mantissa of the exact floats, 11 bits.
_MANTISSA = 11
# Integers below this limit, and sums of them, are exact in float64.
_EXACT = 1 << 53

Extremes: TypeAlias = tuple[int, int, int, float | int | None, float | int | None]
"""Numbers of zeros, of +Inf and of -Inf; minimum and maximum, None without finite values."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How the values of a dtype are counted.

    Attributes:
        dtype: Dtype of a value; for a complex dtype, that of its real part.
        kind: Kind of kernel, one of `kernels.KINDS`.
        parts: Values per element: 2 for complex dtypes, otherwise 1.
    """

    dtype: DType
    kind: str
    parts: int = 1

    @staticmethod
    def of(dtype: object) -> Coding:
        """Coding of a dtype.

        Raises:
            NotReadable: The dtype is packed or quantised, so its bits are not numbers.

        >>> Coding.of("bfloat16").kind, Coding.of("complex64").parts
        ('p16', 2)
        """
        return _coding(DType.of(dtype))

    @property
    def exact(self) -> bool:
        """Whether every value has its own code."""
        return self.kind[0] == "p"

    @property
    def is_float(self) -> bool:
        """Whether the dtype is floating-point."""
        return self.dtype.kind == "float"

    @property
    def unit(self) -> int:
        """Exponent of the power of two that is the unit of exact sums."""
        return _parts_of(self.dtype)[2] if self.exact else UNIT[self.kind]

    def values(self, codes: Array) -> Array:
        """Value of each code as float64: the middle of an interval; NaN for codes of NaN.

        The middle is within a relative 2^-8 of every value of the interval. Subnormal intervals have the width 2^-133
        (float32) or 2^-1029 (float64); the one at zero stands for 0.
        """
        if self.kind == "f64":
            return _middles("f64", codes)
        known: Array = (values_of(self.dtype) if self.exact else middles_of(self.kind))[codes]
        return known

    @property
    def ascends(self) -> bool:
        """Whether the order of codes is the order of values."""
        return self.kind[0] in "iu" or self.dtype.kind in ("uint", "bool") or self.dtype == "float8_e8m0fnu"

    def ascending(self, codes: Array, counts: Array) -> tuple[Array, Array]:
        """Sort codes and counts by value; the position of NaN codes is arbitrary."""
        if self.ascends:
            return codes, counts
        first = int(codes.searchsorted(self.size // 2))  # the first code with a sign
        # Magnitudes of negative floats ascend with the code; integers are in two's complement.
        step = -1 if self.is_float else 1
        return tuple(np.concatenate([a[first:][::step], a[:first]]) for a in (codes, counts))  # type: ignore[return-value]  # two

    def sums(self, codes: Array, counts: Array) -> tuple[int, int, int]:
        """Exact sums of the finite values, of their magnitudes and of their squares, in `unit` (squared).

        Only for exact codings: an interval does not determine its values.
        """
        magnitude, place, _, greatest = _parts_of(self.dtype)
        m, p = magnitude[codes], place[codes]
        total = int(counts.sum(dtype=np.uint64))
        if total * greatest**2 < _EXACT:
            weights = m * counts
            sums, squares = _by_place(weights, p), _by_place(weights * m, p >> 1)
        else:  # 16-bit integers, or more values than in any single tensor
            weights = m.astype(np.int64).astype(object) * counts.astype(object)
            sums, squares = _by_place(weights, p), _by_place(weights * m.astype(np.int64), p >> 1)
        positive = negative = 0
        for at, s in sums:
            if at & 1:
                negative += s << (at >> 1)
            else:
                positive += s << (at >> 1)
        return positive - negative, positive + negative, sum([s << 2 * at for at, s in squares])

    def extremes(self, codes: Array, counts: Array) -> Extremes:
        """Numbers of zeros, of +Inf and of -Inf, and the minimum and maximum of the finite values.

        Only for exact codings: an interval does not determine its values.
        """
        values = self.values(codes)
        zeros, posinf, neginf = count_of(counts, values == 0), 0, 0
        finite = values
        if not (is_finite := np.isfinite(values)).all():
            finite = values[is_finite]
            posinf, neginf = count_of(counts, np.isposinf(values)), count_of(counts, np.isneginf(values))
        if not len(finite):
            return zeros, posinf, neginf, None, None
        if self.is_float:
            # adding 0.0 turns -0.0 into 0.0
            return zeros, posinf, neginf, float(finite.min()) + 0.0, float(finite.max()) + 0.0
        return zeros, posinf, neginf, int(finite.min()), int(finite.max())

    @property
    def largest(self) -> float | None:
        """Largest finite value of an exact float; None for other dtypes."""
        return _largest(self.dtype) if self.exact and self.is_float else None

    @property
    def size(self) -> int:
        """Number of codes; codes are the integers below it."""
        if self.exact:
            return len(values_of(self.dtype))
        return 1 << (19 if self.kind == "f64" else 16)

    def widened(self, codes: Array, counts: Array) -> tuple[Array, Array]:
        """Codes and counts of the same values in the coding of float64."""
        values = self.values(codes)
        return group_counts((values.view(np.uint64) >> np.uint64(45)).astype(np.uint32), counts)


def count_of(counts: Array, which: Array) -> int:
    """Sum of the counts that `which` marks."""
    return int(counts[which].sum(dtype=np.uint64)) if which.any() else 0


@functools.cache
def _coding(dtype: DType) -> Coding:
    parts = 1
    if dtype.kind == "complex":
        dtype, parts = DType.of(_COMPONENT[dtype]), 2
    if dtype.kind == "opaque":
        raise NotReadable(
            f"the bits of {dtype} are not numbers",
            exists="quantised and packed values need a scale or layout stored elsewhere",
            hint="unpack or dequantise the tensor first",
        )
    kind = _KIND_OF_WIDE.get(dtype) or ("p8" if dtype.bits <= 8 else "p16")
    return Coding(dtype, kind, parts)


@functools.cache
def values_of(dtype: DType) -> Array:
    """Value of every pattern of an exact dtype, as float64."""
    if dtype == "bool":
        table = np.array([0.0, 1.0])
    else:
        patterns = np.arange(1 << dtype.bits, dtype=np.uint16 if dtype.bits == 16 else np.uint8)
        with np.errstate(invalid="ignore"):  # signalling NaN
            table = patterns.view(dtype.numpy).astype(np.float64)
    table.flags.writeable = False
    return table


@functools.cache
def _largest(dtype: DType) -> float:
    table = values_of(dtype)
    return float(table[np.isfinite(table)].max())


@functools.cache
def _parts_of(dtype: DType) -> tuple[Array, Array, int, float]:
    """Magnitude mantissa of every pattern, and twice the exponent plus the sign; unit and largest mantissa.

    A magnitude is mantissa·2^(exponent + unit); the mantissa is a float64 integer of at most 16 bits. NaN and
    infinities are 0.
    """
    table = values_of(dtype)
    finite = np.where(np.isfinite(table), table, 0.0)
    if dtype.kind != "float":
        magnitude = abs(finite)
        return magnitude, (finite < 0).astype(np.int64), 0, float(magnitude.max())
    fraction, exponent = np.frexp(abs(finite))
    mantissa = fraction * (1 << _MANTISSA)
    nonzero = mantissa != 0
    unit = int(exponent[nonzero].min())
    place = np.where(nonzero, exponent - unit, 0).astype(np.int64) * 2 + (finite < 0)
    return mantissa, place, unit - _MANTISSA, float(mantissa.max())


@functools.cache
def middles_of(kind: str) -> Array:
    """Middle of every code of a wide kind with 2^16 codes."""
    table = _middles(kind, np.arange(1 << 16, dtype=np.uint32))
    table.flags.writeable = False
    return table


def _middles(kind: str, codes: Array) -> Array:
    c = codes.astype(np.uint64)
    if kind == "f32":
        # float64 represents float32's subnormal values as normal numbers.
        middle = np.where(c & np.uint64(0x7FFF), (c << np.uint64(16)) | np.uint64(0x8000), c << np.uint64(16))
        with np.errstate(invalid="ignore"):  # signalling NaN
            wide = middle.astype(np.uint32).view(np.float32).astype(np.float64)
        return _clean(wide, c, 0x7F80, 0x7FFF)
    if kind == "f64":
        middle = np.where(c & np.uint64(0x3FFFF), (c << np.uint64(45)) | np.uint64(1 << 44), c << np.uint64(45))
        return _clean(middle.view(np.float64), c, 0x3FF80, 0x3FFFF)
    negative = codes < SIGN_CODE
    m = np.where(negative, SIGN_CODE - codes.astype(np.int64), codes.astype(np.int64) - SIGN_CODE)
    shift = np.maximum((m >> 7) - 1, 0)
    first = (m - (shift << 7)).astype(np.float64)
    middle = np.ldexp(first, shift) + (np.ldexp(1.0, shift) - 1) / 2
    signed: Array = np.where(negative, -middle, middle)
    return signed


def _by_place(values: Array, places: Array) -> list[tuple[int, int]]:
    """Nonzero sums of the values at each place, as Python integers."""
    if values.dtype == object:
        sums = np.zeros(int(places.max(initial=0)) + 1, object)
        np.add.at(sums, places, values)
    else:
        sums = np.bincount(places, values).astype(np.int64)
    found = np.flatnonzero(sums)
    return list(zip(found.tolist(), sums[found].tolist(), strict=True))


def _clean(values: Array, codes: Array, infinity: int, mask: int) -> Array:
    """Replace values by Inf where the code holds infinities (and perhaps NaN), and by NaN beyond."""
    top = codes & np.uint64(mask)
    values = np.where(top > infinity, np.nan, values)
    signed = np.where(codes > mask, -np.inf, np.inf)
    return np.where(top == infinity, signed, values)
