"""Count values and compute exact sums: the NumPy definition, and the choice of the C kernel.

A **tally** counts the values of one kind, block by block:

    tally = kernels.tally("f32")
    tally.update(data)          # any contiguous little-endian buffer of whole elements
    counted = tally.finish()    # returns the result, and resets the tally

Every value has a **code**. For 8-bit and 16-bit values (`p8`, `p16`) it is the bit pattern itself. For wider floats it
is the sign, the exponent and 7 bits of mantissa: the top 16 bits of `f32`, the top 19 of `f64`. For wider integers
(`i32`, `u32`, `i64`, `u64`) it is built the same way from the magnitude; see `magnitude_codes`.

Sums of wide values are exact integers in units of the smallest subnormal (`UNIT`; its square for squares). So results
depend neither on the order of values nor on blocks.

`NumpyTally` (the definition) and `CTally` (the fast path) give equal results. C is used if the package was built with a
compiler and the environment variable `TORCHPARAMS_KERNELS` is not `numpy`.
"""

from __future__ import annotations

import math
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from torchparams.sketch import native
from torchparams.sketch.native import uses_c

if native.BUILT:
    from torchparams.sketch import _kernels

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"

KINDS = ("p8", "p16", "f32", "f64", "i32", "u32", "i64", "u64")
"""Kinds of values, in the numbering of `_kernels.h`."""

ITEMSIZE = {"p8": 1, "p16": 2, "f32": 4, "f64": 8, "i32": 4, "u32": 4, "i64": 8, "u64": 8}
"""Bytes per value."""

UNIT = {"f32": -149, "f64": -1074, "i32": 0, "u32": 0, "i64": 0, "u64": 0}
"""Exponent of the unit of sums."""

SIGN_CODE = 1 << 15
"""Code of the integer 0; negative values have lower codes."""

FEW = 1 << 16
"""A tally with at most this many values is cleared in time proportional to them."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts of a tally.

    Attributes:
        codes: Codes that occur, uint32, ascending.
        counts: Number of values of each code, uint64.
        zeros: Number of zeros, of either sign.
        posinf: Number of +Inf.
        neginf: Number of -Inf.
        min: Smallest finite value (zero as +0.0), or None.
        max: Largest finite value, or None.
        sum: Exact sum of the finite values, in units of 2^`UNIT[kind]`.
        abs: Exact sum of their magnitudes.
        square: Exact sum of their squares, in units of 2^(2·`UNIT[kind]`).

    For `p8` and `p16`, codes and counts contain everything; the other attributes stay 0 and None.
    """

    codes: Array
    counts: Array
    zeros: int = 0
    posinf: int = 0
    neginf: int = 0
    min: float | int | None = None
    max: float | int | None = None
    sum: int = 0
    abs: int = 0
    square: int = 0


class Tally(Protocol):
    """Counts values of one kind; see the module's docstring."""

    kind: str

    def update(self, data: Any) -> None:
        """Count the values of a contiguous buffer of little-endian elements."""

    def finish(self) -> Counted:
        """Return the result, and reset the tally."""


# --- definition ----------------------------------------------------------------------------------

_CHUNK = 1 << 20  # partial sums of 24-bit parts stay exact in float64
_LIMB = 24
_MANY = 1 << 14
_FIELDS = {"f32": (23, 8), "f64": (52, 11)}  # bits of mantissa and exponent


def magnitude_codes(magnitude: Array) -> Array:
    """Code of each magnitude (uint64): the magnitude itself below 256, otherwise its exponent and 7 more bits.

    For 2^e <= v < 2^(e+1), e >= 7, the code is (e - 7)·128 + floor(v / 2^(e-7)). Codes ascend, are continuous at 2^8,
    and values of the same code differ by less than a relative 2^-7.

    >>> magnitude_codes(np.array([0, 255, 256, 257, 258, 2**64 - 1], np.uint64))
    array([   0,  255,  256,  256,  257, 7423], dtype=uint32)
    """
    v = magnitude.astype(np.uint64)
    # Exponent without a logarithm: count the powers of two from 2^8 that are reached.
    powers = np.left_shift(np.uint64(1), np.arange(8, 64, dtype=np.uint64))
    shift = np.searchsorted(powers, v, side="right").astype(np.uint64)
    return (shift * np.uint64(128) + (v >> shift)).astype(np.uint32)


def codes_of(kind: str, bits: Array) -> Array:
    """Code of each value, given its bits as an unsigned integer.

    >>> [hex(c) for c in codes_of("f32", np.array([1.0, -2.0], np.float32).view(np.uint32))]
    ['0x3f80', '0xc000']
    """
    if kind in ("p8", "p16"):
        return bits.astype(np.uint32)
    if kind == "f32":
        return bits >> np.uint32(16)
    if kind == "f64":
        return (bits >> np.uint64(45)).astype(np.uint32)
    negative, magnitude = _sign_and_magnitude(kind, bits)
    code = magnitude_codes(magnitude)
    return np.where(negative, SIGN_CODE - code, SIGN_CODE + code).astype(np.uint32)


def _sign_and_magnitude(kind: str, bits: Array) -> tuple[Array, Array]:
    if kind[0] == "u":
        return np.zeros(len(bits), bool), bits.astype(np.uint64)
    wide = bits.view(f"<i{bits.itemsize}").astype(np.int64)
    negative = wide < 0
    unsigned = wide.view(np.uint64)
    return negative, np.where(negative, np.uint64(0) - unsigned, unsigned)


def _sums(magnitude: Array, position: Array, negative: Array) -> tuple[int, int, int]:
    """Sums of ±magnitude·2^position, of magnitude·2^position, and of their squares."""
    # Values of equal position and sign are added in limbs of 24 bits: float64 holds 2^20 of them exactly.
    bins = position.astype(np.int64) * 2 + negative
    count = int(bins.max(initial=0)) + 1

    def add(values: Array, shift: int, by_bin: list[int]) -> None:
        for part in (values & np.uint64((1 << _LIMB) - 1), values >> np.uint64(_LIMB)):
            weights = np.bincount(bins, weights=part.astype(np.float64), minlength=count)
            for b in np.flatnonzero(weights):
                by_bin[b] += int(weights[b]) << shift
            shift += _LIMB

    bits = int(magnitude.max(initial=0)).bit_length()
    limbs = [(magnitude >> np.uint64(s)) & np.uint64((1 << _LIMB) - 1) for s in range(0, bits, _LIMB)]
    sums, squares = [0] * count, [0] * count
    for i, limb in enumerate(limbs):
        add(limb, _LIMB * i, sums)
        for j, other in enumerate(limbs[: i + 1]):
            add(limb * other, _LIMB * (i + j) + (i != j), squares)
    total = sum(s << (b >> 1) if not b & 1 else -(s << (b >> 1)) for b, s in enumerate(sums))
    magnitudes = sum(s << (b >> 1) for b, s in enumerate(sums))
    return total, magnitudes, sum(s << (b & ~1) for b, s in enumerate(squares))


class NumpyTally:
    """NumPy definition; `CTally` gives the same results."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._start()

    def _start(self) -> None:
        self._codes = np.zeros(0, np.uint32)
        self._counts = np.zeros(0, np.uint64)
        self._zeros = self._posinf = self._neginf = 0
        self._min: int | None = None
        self._max: int | None = None
        self._sum = self._abs = self._square = 0

    def update(self, data: Any) -> None:
        """Count the values of a contiguous buffer of little-endian elements."""
        bits = np.frombuffer(data, f"<u{ITEMSIZE[self.kind]}") if len(memoryview(data)) else np.zeros(0, np.uint8)
        for start in range(0, len(bits), _CHUNK):
            self._update(bits[start : start + _CHUNK])

    def _update(self, bits: Array) -> None:
        codes, counts = np.unique(codes_of(self.kind, bits), return_counts=True)
        self._codes, self._counts = merge_counts([(self._codes, self._counts), (codes, counts.astype(np.uint64))])
        if self.kind in _FIELDS:
            self._update_floats(bits)
        elif self.kind not in ("p8", "p16"):
            negative, magnitude = _sign_and_magnitude(self.kind, bits)
            self._zeros += int(np.count_nonzero(magnitude == 0))
            values = bits if self.kind[0] == "u" else bits.view(f"<i{bits.itemsize}")
            self._see(int(values.min()), int(values.max()))
            self._add(magnitude, np.zeros(len(bits), np.int64), negative)

    def _update_floats(self, bits: Array) -> None:
        mantissa_bits, exponent_bits = _FIELDS[self.kind]
        width = mantissa_bits + exponent_bits
        wide = bits.astype(np.uint64)
        negative = (wide >> np.uint64(width)).astype(bool)
        magnitude = wide & np.uint64((1 << width) - 1)
        infinity = np.uint64(((1 << exponent_bits) - 1) << mantissa_bits)
        self._zeros += int(np.count_nonzero(magnitude == 0))
        self._posinf += int(np.count_nonzero((magnitude == infinity) & ~negative))
        self._neginf += int(np.count_nonzero((magnitude == infinity) & negative))
        finite = magnitude < infinity
        magnitude, negative = magnitude[finite], negative[finite]
        if not len(magnitude):
            return
        key = np.where(negative, -magnitude.view(np.int64), magnitude.view(np.int64))
        self._see(int(key.min()), int(key.max()))
        exponent = magnitude >> np.uint64(mantissa_bits)
        normal = (exponent != 0).astype(np.uint64)
        mantissa = (magnitude & np.uint64((1 << mantissa_bits) - 1)) | (normal << np.uint64(mantissa_bits))
        self._add(mantissa, exponent - normal, negative)

    def _add(self, magnitude: Array, position: Array, negative: Array) -> None:
        sums = _sums(magnitude, position, negative)
        self._sum, self._abs, self._square = self._sum + sums[0], self._abs + sums[1], self._square + sums[2]

    def _see(self, low: int, high: int) -> None:
        self._min = low if self._min is None else min(self._min, low)
        self._max = high if self._max is None else max(self._max, high)

    def finish(self) -> Counted:
        """Return the result, and reset the tally."""
        low, high = self._min, self._max
        counted = Counted(
            codes=self._codes,
            counts=self._counts,
            zeros=self._zeros,
            posinf=self._posinf,
            neginf=self._neginf,
            min=None if low is None else _value(self.kind, low),
            max=None if high is None else _value(self.kind, high),
            sum=self._sum,
            abs=self._abs,
            square=self._square,
        )
        self._start()
        return counted


def _value(kind: str, key: int) -> float | int:
    """Value for a key: for floats, the bits of the magnitude, with the sign."""
    # The processor may be set to flush subnormal numbers to zero: avoid arithmetic on them.
    if kind == "f64":
        (value,) = struct.unpack("<d", abs(key).to_bytes(8, "little"))
    elif kind == "f32":
        exponent, mantissa = divmod(abs(key), 1 << 23)
        value = math.ldexp(mantissa + (1 << 23 if exponent else 0), max(exponent, 1) - 1 + UNIT["f32"])
    else:
        return key
    return -value if key < 0 else float(value)


def merge_counts(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Merge sorted lists of unique codes with counts."""
    parts = [part for part in parts if len(part[0])]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return np.zeros(0, np.uint32), np.zeros(0, np.uint64)
    total, highest = sum(len(codes) for codes, _ in parts), max(int(codes[-1]) for codes, _ in parts)
    if total > _MANY and total > highest // 4:
        # A table that is well filled is cheaper than sorting.
        table = np.zeros(highest + 1, np.uint64)
        for codes, counts in parts:
            table[codes] += counts
        found = np.flatnonzero(table)
        return found.astype(np.uint32), table[found]
    return group_counts(np.concatenate([codes for codes, _ in parts]), np.concatenate([counts for _, counts in parts]))


def group_counts(codes: Array, counts: Array) -> tuple[Array, Array]:
    """Unique codes, ascending, with the sum of their counts (uint64).

    >>> group_counts(np.array([7, 3, 7]), np.array([1, 1, 5]))
    (array([3, 7]), array([1, 6], dtype=uint64))
    """
    order = np.argsort(codes, kind="stable")  # for sorted lists, a stable sort is a merge
    codes = codes[order]
    first = np.flatnonzero(np.concatenate([np.ones(min(len(codes), 1), bool), codes[1:] != codes[:-1]]))
    return codes[first], np.add.reduceat(counts[order].astype(np.uint64), first) if len(first) else counts


# --- C kernel ------------------------------------------------------------------------------------


class CTally:
    """C kernel: many times faster, and releases the GIL."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._number = KINDS.index(kind)
        # Untouched zero pages take no memory, and most of these megabytes stay untouched.
        self._state = np.zeros(_kernels.size() // 8, np.uint64)
        self._seen = 0

    def update(self, data: Any) -> None:
        """Count the values of a contiguous buffer of little-endian elements."""
        self._seen += memoryview(data).nbytes // ITEMSIZE[self.kind]
        _kernels.update(self._state, self._number, data, self._seen <= FEW)

    def finish(self) -> Counted:
        """Return the result, and reset the tally."""
        self._seen = 0
        codes, counts, zeros, posinf, neginf, finite, low, high, *sums = _kernels.finish(self._state, self._number)
        integers = [int.from_bytes(limbs, "little", signed=True) for limbs in sums]
        return Counted(
            np.frombuffer(codes, np.uint32),
            np.frombuffer(counts, np.uint64),
            zeros,
            posinf,
            neginf,
            _value(self.kind, self._key(low)) if finite else None,
            _value(self.kind, self._key(high)) if finite else None,
            *integers,
        )

    def _key(self, ordered: int) -> int:
        """Key of the definition, from the unsigned ascending key of the C kernel."""
        if self.kind[0] == "u":
            return ordered
        if self.kind[0] == "i":
            return ordered - (1 << 63)
        sign = 1 << (8 * ITEMSIZE[self.kind] - 1)
        return ordered - sign if ordered >= sign else -(sign - 1 - ordered)


def tally(kind: str, implementation: str | None = None) -> Tally:
    """Create a tally.

    Args:
        kind: Kind of values, one of `KINDS`.
        implementation: `c` or `numpy`; None chooses.

    >>> counted = tally("f32").finish()
    >>> counted.zeros, counted.min, counted.sum
    (0, None, 0)
    """
    chosen = implementation or ("c" if uses_c() else "numpy")
    return CTally(kind) if chosen == "c" else NumpyTally(kind)


class _Idle(threading.local):
    """Unused tallies of this thread, kept because the pages of a new one would have to be faulted in."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, bool], list[Tally]] = {}


_IDLE = _Idle()


def borrow_tally(kind: str) -> Tally:
    """Get an empty tally, perhaps one passed to `return_tally`."""
    kept = _IDLE.tallies.get((kind, uses_c()))
    return kept.pop() if kept else tally(kind)


def return_tally(mine: Tally) -> None:
    """Keep a finished tally for the next `borrow_tally` of this thread."""
    kept = _IDLE.tallies.setdefault((mine.kind, isinstance(mine, CTally)), [])
    if len(kept) < 2:
        kept.append(mine)


def vector_units() -> list[str]:
    """Vector units of this machine that the C kernels support, best last; empty without C.

    >>> len(vector_units()) > 0 or not uses_c()
    True
    """
    return _kernels.levels() if native.BUILT else []


def use_vector_unit(name: str) -> None:
    """Select a vector unit for all threads, for tests and measurements.

    Raises:
        ValueError: The unit is not in `vector_units`.
    """
    units = vector_units()
    if name not in units:
        raise ValueError(f"vector unit {name!r} is not available; available are {units}")
    _kernels.use(units.index(name))


def implementation() -> str:
    """Description of the kernels in use: `C, AVX-512`, or `NumPy` with the reason.

    >>> implementation().split(",")[0] in ("C", "NumPy")
    True
    """
    if uses_c():
        return f"C, {vector_units()[-1]}"
    if not native.BUILT:
        return "NumPy, several times slower: the package was built without a C compiler"
    return "NumPy, several times slower: selected by TORCHPARAMS_KERNELS"
