"""What two runs of values have in common: in NumPy, and the choice between that and the same in C.

A **comparison** takes the values of two tensors of one type, block by block in step:

    comparison = compare.comparison(Values.of("bfloat16"))
    comparison.update(a, b)             # contiguous little-endian buffers of as many whole elements
    compared = comparison.finish()      # the result; the comparison is empty again

Bits decide what has changed: -0.0 is not 0.0, and two NaN of the same bits are equal. Differences are taken in float64
(of 64-bit integers exactly). Sums are over the values that are finite in both, in an order that is part of the
definition: 64 values make a group, in which 8 sums run side by side; the sums of groups are added exactly, as integers.
So where blocks begin, as long as it is at multiples of 64 elements, cannot show in a result, and neither can the
order in which parts of a tensor are put together.

`NumpyComparison` (the definition) and `CComparison` (the fast path) give equal results for equal data. C is used where
the package was built with a compiler, unless the environment variable `TORCHPARAMS_KERNELS` is `numpy`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from torchparams.dtypes import DType
from torchparams.sketch import native
from torchparams.sketch.codes import Coding
from torchparams.sketch.compared import SCALE, UNIT, Compared

if native.BUILT:
    from torchparams.sketch import _compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"

KINDS = ("p8", "bf16", "f16", "f32", "f64", "i16", "u16", "i32", "u32", "i64", "u64")
"""Kinds of values, in the order of the numbers that `_compare.c` gives them."""

GROUP, LANES = 64, 8
"""Values that are added up in float64, and how many sums run side by side."""

_KIND_OF = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    **{f"{s}int{bits}": f"{s or 'i'}{bits}" for s in ("", "u") for bits in (16, 32, 64)},
}
_PART_OF = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}


@dataclass(frozen=True, slots=True)
class Values:
    """How the elements of one type are compared.

    Attributes:
        kind: One of `KINDS`; `p8` are values of at most 8 bits, one in a byte.
        parts: Values in an element: 2 for complex types.
        table: Of `p8`, the value of every byte.
    """

    kind: str
    parts: int = 1
    table: Array | None = None

    @staticmethod
    def of(dtype: object) -> Values:
        """How elements of `dtype` are compared; those of less than a byte come one in a byte.

        Raises:
            NotReadable: It is a packed or quantised type, whose bits alone are not numbers.

        >>> Values.of("complex64").kind, Values.of("complex64").parts
        ('f32', 2)
        """
        return _values(DType.of(dtype))


@functools.cache
def _values(dtype: DType) -> Values:
    part, parts = (_PART_OF[dtype], 2) if dtype in _PART_OF else (str(dtype), 1)
    if part in _KIND_OF:
        return Values(_KIND_OF[part], parts)
    coding = Coding.of(dtype)
    codes = np.arange(256)
    # Of sub-byte values the bits above them are of no meaning, and of a truth value all bits but whether one is set.
    table = coding.values(np.minimum(codes, 1) if dtype == "bool" else codes % coding.size)
    return Values("p8", parts, np.ascontiguousarray(table))


class Comparison(Protocol):
    """Compares two runs of values; see the module's text."""

    def update(self, a: Any, b: Any) -> None:
        """Compare the elements of two contiguous little-endian buffers of one size.

        The size is a multiple of 64 elements, unless these are the last.
        """

    def finish(self) -> Compared:
        """The result. The comparison is as it was made."""


# --- the definition ------------------------------------------------------------------------------

_NUMPY_OF = {
    "f16": "<f2",
    "f32": "<f4",
    "f64": "<f8",
    "i16": "<i2",
    "u16": "<u2",
    "i32": "<i4",
    "u32": "<u4",
    "i64": "<i8",
    "u64": "<u8",
}
_ITEMSIZE = {kind: int(name[2]) for kind, name in _NUMPY_OF.items()} | {"p8": 1, "bf16": 2}
_CHUNK = 1 << 16  # elements at once: what they become stays in the cache


class NumpyComparison:
    """The definition: every result of `CComparison` is this one's."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._so_far = Compared(max=0 if values.kind in ("i64", "u64") else 0.0)

    def update(self, a: Any, b: Any) -> None:
        """Compare the elements of two contiguous little-endian buffers of one size."""
        kind = self._values.kind
        unit = _ITEMSIZE[kind] * self._values.parts
        x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
        for start in range(0, len(x), _CHUNK * unit):
            mine, yours = x[start : start + _CHUNK * unit], y[start : start + _CHUNK * unit]
            self._so_far += self._compare(mine, yours, unit)

    def _compare(self, x: Array, y: Array, unit: int) -> Compared:
        kind = self._values.kind
        changed = int(np.count_nonzero((x.reshape(-1, unit) != y.reshape(-1, unit)).any(1)))
        with np.errstate(all="ignore"):
            a, b = self._decoded(x), self._decoded(y)
            if kind in ("i64", "u64"):
                mine, yours = x.view(_NUMPY_OF[kind]), y.view(_NUMPY_OF[kind])
                less = yours < mine
                distance = np.where(less, mine.view("<u8") - yours.view("<u8"), yours.view("<u8") - mine.view("<u8"))
                d = np.where(less, -distance.astype(np.float64), distance.astype(np.float64))
                sums = self._sums(a, b, d)
                return Compared(changed, 0, 0, int(distance.max(initial=0)), *sums)
            nan_a, nan_b = np.isnan(a), np.isnan(b)
            finite = np.isfinite(a) & np.isfinite(b)
            infinite = ~finite & ~nan_a & ~nan_b & (a != b)
            a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
            greatest = math.inf if infinite.any() else float(abs(b - a).max(initial=0.0))
            return Compared(
                changed,
                int(np.count_nonzero(nan_a & ~nan_b)),
                int(np.count_nonzero(nan_b & ~nan_a)),
                greatest,
                *self._sums(a, b, None),
            )

    def _decoded(self, data: Array) -> Array:
        """The values as float64."""
        kind = self._values.kind
        if kind == "p8":
            assert self._values.table is not None
            decoded: Array = self._values.table[data]
        elif kind == "bf16":
            decoded = (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        else:
            decoded = data.view(_NUMPY_OF[kind]).astype(np.float64)
        return decoded

    def _sums(self, a: Array, b: Array, d: Array | None) -> tuple[int, int, int, int]:
        """Exact sums of the groups' sums of d², a², b² and ab."""
        pad = -len(a) % GROUP
        a, b = (np.pad(values, (0, pad)).reshape(-1, GROUP) for values in (a, b))
        d = b - a if d is None else np.pad(d, (0, pad)).reshape(-1, GROUP)
        power_a = power_b = power_d = np.zeros(len(a), np.int64)
        if self._values.kind == "f64":
            top_a, top_b, top_d = (abs(x).max(1, initial=0.0) for x in (a, b, d))
            power_a, power_b = _power(top_a), _power(top_b)
            huge = np.maximum(top_a, top_b) >= 2.0**1022  # the difference itself may be out of range
            power_d = np.where(huge, -SCALE, _power(top_d))
            d = np.where(huge[:, None], np.ldexp(b, -SCALE) - np.ldexp(a, -SCALE), np.ldexp(d, power_d[:, None]))
            a, b = np.ldexp(a, power_a[:, None]), np.ldexp(b, power_b[:, None])
        return (
            _exact(_group_sums(d * d), -2 * power_d),
            _exact(_group_sums(a * a), -2 * power_a),
            _exact(_group_sums(b * b), -2 * power_b),
            _exact(_group_sums(a * b), -(power_a + power_b)),
        )

    def finish(self) -> Compared:
        """The result. The comparison is as it was made."""
        found = self._so_far
        self.__init__(self._values)  # type: ignore[misc]  # that is what "as it was made" means
        return found


def _power(top: Array) -> Array:
    """The exponent of what takes values of these magnitudes near 1, where they are far from it."""
    return np.where(top >= 2.0**500, -SCALE, np.where(top < 2.0**-450, SCALE, 0))


def _group_sums(products: Array) -> Array:
    lanes = products.reshape(len(products), GROUP // LANES, LANES)
    s = np.zeros((len(products), LANES))
    for i in range(GROUP // LANES):
        s = s + lanes[:, i]
    total: Array = ((s[:, 0] + s[:, 4]) + (s[:, 2] + s[:, 6])) + ((s[:, 1] + s[:, 5]) + (s[:, 3] + s[:, 7]))
    return total


def _exact(sums: Array, shift: Array) -> int:
    """The sum of sums·2^shift, in units of 2^UNIT."""
    fraction, exponent = np.frexp(sums)
    mantissa = np.ldexp(fraction, 53).astype(np.int64)
    place = exponent + shift - 53 - UNIT
    total = 0
    for at in np.unique(place):
        here = mantissa[place == at]
        # In halves, of which 2^36 can be added.
        value = (int((here >> 27).sum()) << 27) + int((here & ((1 << 27) - 1)).sum())
        total += value << int(at) if at >= 0 else value >> -int(at)  # what a subnormal sum shifts out is zeros
    return total


# --- the fast path -------------------------------------------------------------------------------

_NO_TABLE = np.zeros(0)


class CComparison:
    """The same in C, many times as fast, with the global interpreter lock released."""

    def __init__(self, values: Values) -> None:
        self._kind = KINDS.index(values.kind)
        self._unit = _ITEMSIZE[values.kind] * values.parts
        self._table = _NO_TABLE if values.table is None else values.table
        self._integers = values.kind in ("i64", "u64")
        self._state = np.zeros(_compare.size() // 8, np.uint64)

    def update(self, a: Any, b: Any) -> None:
        """Compare the elements of two contiguous little-endian buffers of one size."""
        _compare.update(self._state, self._kind, self._unit, self._table, a, b)

    def finish(self) -> Compared:
        """The result. The comparison is as it was made."""
        changed, nan_a, nan_b, max_integer, greatest, *sums = _compare.finish(self._state)
        same, dd, aa, bb, ab = (int.from_bytes(limbs, "little", signed=True) for limbs in sums)
        most = max_integer if self._integers else greatest
        return Compared(changed, nan_a, nan_b, most, dd, aa + same, bb + same, ab + same)


def comparison(values: Values, implementation: str | None = None) -> Comparison:
    """A new comparison.

    Args:
        values: What is compared.
        implementation: `c` or `numpy`; None chooses.

    >>> c = comparison(Values.of("float32"))
    >>> c.update(np.array([3.0, 4.0], np.float32), np.array([3.0, 3.0], np.float32))
    >>> found = c.finish()
    >>> found.changed, found.max, found.relative
    (1, 1.0, 0.2)
    """
    chosen = implementation or ("c" if native.uses_c() else "numpy")
    return CComparison(values) if chosen == "c" else NumpyComparison(values)
