"""Compare two tensors of values: the NumPy definition, and the choice of the C kernel.

A **comparison** reads the values of two tensors block by block, in step:

    comparison = compare.comparison(Values.of("bfloat16"))
    comparison.update(a, b)             # contiguous little-endian buffers with equally many elements
    compared = comparison.finish()      # returns the result, and resets the comparison

Values of one dtype are compared by bits: -0.0 differs from 0.0, and NaN of equal bits are equal. Values of two dtypes
are compared as numbers. The maximum difference is rounded once, to float64; for 64-bit integers it is an integer. Sums
cover the values that are finite in both, and are **exact**, because a value is an integer times a power of two, and so
is a product. So results depend neither on blocks nor on order.

`NumpyComparison` (the definition) and `CComparison` (the fast path) give equal results. C is used if the package was
built with a compiler and the environment variable `TORCHPARAMS_KERNELS` is not `numpy`. It supports values of a single
dtype; 64-bit integers against another dtype use the definition.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from torchparams.dtypes import DType
from torchparams.sketch import native
from torchparams.sketch.codes import Coding
from torchparams.sketch.compared import UNIT, Compared

if native.BUILT:
    from torchparams.sketch import _compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"

KINDS = ("p8", "bf16", "f16", "f32", "f64", "i16", "u16", "i32", "u32", "i64", "u64")
"""Kinds of values, in the numbering of `_compare.h`."""

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
    """How the elements of a dtype are compared.

    Attributes:
        kind: One of `KINDS`; `p8` means values of at most 8 bits, one per byte.
        parts: Values per element: 2 for complex dtypes.
        table: For `p8`, the value of every byte.
    """

    kind: str
    parts: int = 1
    table: Array | None = None

    @staticmethod
    def of(dtype: object) -> Values:
        """How elements of `dtype` are compared; sub-byte elements take one byte each.

        Raises:
            NotReadable: The dtype is packed or quantised, so its bits are not numbers.

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
    # Bits above a sub-byte value are ignored; a bool is true if any bit is set.
    table = coding.values(np.minimum(codes, 1) if dtype == "bool" else codes % coding.size)
    return Values("p8", parts, np.ascontiguousarray(table))


class Comparison(Protocol):
    """Compares two sequences of values; see the module's docstring."""

    def update(self, a: Any, b: Any) -> None:
        """Compare the elements of two contiguous little-endian buffers with equally many whole elements."""

    def finish(self) -> Compared:
        """Return the result, and reset the comparison."""


# --- definition ----------------------------------------------------------------------------------

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
_BITS = {"p8": 8, "bf16": 8, "f16": 11, "f32": 24, "f64": 53}  # mantissa bits of floats
_CHUNK = 1 << 16  # elements per step: intermediate arrays stay in the cache, and sums of 32-bit parts fit into float64
_WORD = np.uint64(32)
_MASK = np.uint64((1 << 32) - 1)


class _Numbers(NamedTuple):
    """Values as numbers: `high + low`, and `mantissa`·2^`exponent` with a separate sign."""

    high: Array  # the nearest float64
    low: Array  # remainder for 64-bit integers
    negative: Array
    mantissa: Array  # uint64, of at most `bits` bits
    exponent: Array
    bits: int

    def times(self, other: _Numbers) -> int:
        """Exact sum of the products, in units of 2^UNIT."""
        place = self.exponent + other.exponent - UNIT
        first = int(place.min(initial=0))
        place = place - first
        negative = self.negative != other.negative

        def add(products: Array, shift: int) -> None:
            for part, at in ((products & _MASK, shift), (products >> _WORD, shift + 32)):
                weights = part.astype(np.float64)
                sums = np.bincount(place, np.where(negative, -weights, weights))
                for i in np.flatnonzero(sums).tolist():
                    found[i] = found.get(i, 0) + (int(sums[i]) << at)

        found: dict[int, int] = {}
        x, y = self.mantissa, other.mantissa
        if self.bits + other.bits <= 64:
            add(x * y, 0)
        else:
            add((x & _MASK) * (y & _MASK), 0)
            add((x & _MASK) * (y >> _WORD), 32)
            add((x >> _WORD) * (y & _MASK), 32)
            add((x >> _WORD) * (y >> _WORD), 64)
        # Mantissas of subnormal numbers end in zeros, which the right shift drops.
        return sum(v << i + first if i + first >= 0 else v >> -(i + first) for i, v in found.items())


class NumpyComparison:
    """NumPy definition; `CComparison` gives the same results.

    Args:
        values: Values of the first tensor.
        others: Values of the second tensor, with equally many parts; by default, the same dtype.
    """

    def __init__(self, values: Values, others: Values | None = None) -> None:
        self._values, self._others = values, others or values
        self._integers = all(each.kind in ("i64", "u64") for each in (self._values, self._others))
        self._so_far = self._nothing = Compared(max=0 if self._integers else 0.0)

    def update(self, a: Any, b: Any) -> None:
        """Compare the elements of two contiguous little-endian buffers with equally many whole elements."""
        parts = self._values.parts
        x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
        unit, other = (_ITEMSIZE[each.kind] * parts for each in (self._values, self._others))
        for i in range(0, len(x) // unit, _CHUNK // 2):
            stop = i + _CHUNK // 2
            self._so_far += self._compare(x[i * unit : stop * unit], y[i * other : stop * other])

    def _compare(self, x: Array, y: Array) -> Compared:
        parts = self._values.parts
        with np.errstate(all="ignore"):
            high_a, high_b = _decoded(self._values, x), _decoded(self._others, y)
            nan_a, nan_b = np.isnan(high_a), np.isnan(high_b)
            finite = np.isfinite(high_a) & np.isfinite(high_b)
            infinite = ~finite & ~nan_a & ~nan_b & (high_a != high_b)
            a, b = _numbers(self._values, x, high_a, finite), _numbers(self._others, y, high_b, finite)
            if self._values is self._others:
                unit = _ITEMSIZE[self._values.kind] * parts
                differs = x.reshape(-1, unit) != y.reshape(-1, unit)
            else:
                differs = ((high_a != high_b) | (a.low != b.low)).reshape(-1, parts)
            return Compared(
                int(np.count_nonzero(differs.any(1))),
                int(np.count_nonzero(nan_a & ~nan_b)),
                int(np.count_nonzero(nan_b & ~nan_a)),
                int(np.count_nonzero(infinite)),
                _greatest_of_integers(a, b) if self._integers else _greatest(a, b),
                a.times(a),
                b.times(b),
                a.times(b),
            )

    def finish(self) -> Compared:
        """Return the result, and reset the comparison."""
        found, self._so_far = self._so_far, self._nothing
        return found


def _decoded(values: Values, data: Array) -> Array:
    """Nearest float64 of each value."""
    if values.table is not None:
        decoded: Array = values.table[data]
    elif values.kind == "bf16":
        decoded = (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    else:
        decoded = data.view(_NUMPY_OF[values.kind]).astype(np.float64)
    return decoded


def _numbers(values: Values, data: Array, high: Array, finite: Array) -> _Numbers:
    """Values as numbers; 0 where not `finite`."""
    high = np.where(finite, high, 0.0)
    low = np.zeros(len(high))
    negative = high < 0
    if values.kind in _BITS:
        bits = _BITS[values.kind]
        fraction, exponent = np.frexp(abs(high))
        mantissa = np.ldexp(fraction, bits).astype(np.uint64)
        return _Numbers(high, low, negative, mantissa, exponent.astype(np.int64) - bits, bits)
    whole = data.view(_NUMPY_OF[values.kind])
    bits = 8 * whole.itemsize
    if bits == 64:
        upper = (whole >> whole.dtype.type(32)).astype(np.float64) * 2.0**32
        lower = (whole & whole.dtype.type((1 << 32) - 1)).astype(np.float64)
        low = np.where(finite, lower - (high - upper), 0.0)
    mantissa = whole.astype(np.uint64)  # two's complement of negative values
    mantissa = np.where(finite, np.where(negative, np.uint64(0) - mantissa, mantissa), np.uint64(0))
    return _Numbers(high, low, negative, mantissa, np.zeros(len(high), np.int64), bits)


def _greatest_of_integers(a: _Numbers, b: _Numbers) -> int:
    """Maximum |b - a|, of up to 65 bits."""
    x, y = a.mantissa, b.mantissa
    apart = a.negative != b.negative
    distance = np.where(apart, x + y, np.maximum(x, y) - np.minimum(x, y))
    over = apart & (distance < x)
    if over.any():
        return (1 << 64) + int(distance[over].max())
    return int(distance.max(initial=0))


def _greatest(a: _Numbers, b: _Numbers) -> float:
    """Maximum |b - a|, rounded once; one of the two has no `low`."""
    d = b.high - a.high
    low = b.low - a.low
    if low.any():
        # Boldo & Melquiond 2008: sum of three, with the rest rounded to odd before it is added.
        high, rest = _two_sum(b.high, -a.high)
        middle, last = _two_sum(rest, low)
        first, second = _two_sum(high, middle)
        d = first + _odd(second, last)
    return float(abs(d).max(initial=0.0))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Rounded sum, and the rounding error (Knuth 1969)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _odd(a: Array, b: Array) -> Array:
    """Sum rounded to odd: if inexact, to the neighbour whose last bit is 1."""
    s, rest = _two_sum(a, b)
    even = (s.view(np.int64) & 1) == 0
    return np.where(even & (rest != 0), np.nextafter(s, np.where(rest > 0, np.inf, -np.inf)), s)


# --- C kernel ------------------------------------------------------------------------------------

_NO_TABLE = np.zeros(0)


class CComparison:
    """C kernel: many times faster, and releases the GIL."""

    def __init__(self, values: Values) -> None:
        self._kind = KINDS.index(values.kind)
        self._unit = _ITEMSIZE[values.kind] * values.parts
        self._table = _NO_TABLE if values.table is None else values.table
        self._most = int if values.kind in ("i64", "u64") else float
        self._integers = values.kind in ("i32", "u32", "i64", "u64")
        self._state = np.zeros(_compare.size() // 8, np.uint64)

    def update(self, a: Any, b: Any) -> None:
        """Compare the elements of two contiguous little-endian buffers of equal size."""
        _compare.update(self._state, self._kind, self._unit, self._table, a, b)

    def finish(self) -> Compared:
        """Return the result, and reset the comparison."""
        changed, nan_a, nan_b, infinite, max_integer, greatest, *sums = _compare.finish(self._state)
        same, aa, bb, ab = (int.from_bytes(limbs, "little", signed=True) for limbs in sums)
        most = self._most(max_integer if self._integers else greatest)
        return Compared(changed, nan_a, nan_b, infinite, most, aa + same, bb + same, ab + same)


def comparison(values: Values, implementation: str | None = None, *, others: Values | None = None) -> Comparison:
    """Create a comparison.

    Args:
        values: Values of the first tensor.
        implementation: `c` or `numpy`; None chooses.
        others: Values of the second tensor, if it has another dtype and values are compared as numbers.

    >>> c = comparison(Values.of("float32"))
    >>> c.update(np.array([3.0, 4.0], np.float32), np.array([3.0, 3.0], np.float32))
    >>> found = c.finish()
    >>> found.changed, found.max, found.relative
    (1, 1.0, 0.2)
    """
    chosen = implementation or ("c" if native.uses_c() else "numpy")
    if chosen == "c" and (others is None or others is values):
        return CComparison(values)
    return NumpyComparison(values, others)
