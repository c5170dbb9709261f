"""Results of comparisons: sums that add up, and the numbers derived from them. Works without NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.sketch import native

if native.BUILT:
    from torchparams.sketch import _compare

if TYPE_CHECKING:
    from collections.abc import Iterable

UNIT = -2 * 1074
"""Exponent of the unit of sums: the square of the smallest float64."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Difference between the values `b` and the values `a`.

    Results of parts of a tensor, or of several tensors, can be added. All numbers are exact, so addition is associative
    and commutative, and any partition gives the same result.

    Attributes:
        changed: Number of elements that differ.
        nan_a: Number of values that are NaN only in `a`.
        nan_b: Number of values that are NaN only in `b`.
        infinite: Number of values, without NaN, that are infinite on one side only, or with different signs.
        max: Maximum |b - a| over values that are finite in both: an integer for 64-bit integers, otherwise float64,
            rounded once; infinite if it overflows float64.
        aa: Sum of a² over values that are finite in both, in units of 2^`UNIT`.
        bb: Sum of b².
        ab: Sum of a·b.

    >>> one = Compared(changed=1, max=0.5, aa=16, bb=4, ab=8)
    >>> (one + one).changed, one.relative, one.cosine
    (2, 0.5, 1.0)
    """

    changed: int = 0
    nan_a: int = 0
    nan_b: int = 0
    infinite: int = 0
    max: float | int = 0
    aa: int = 0
    bb: int = 0
    ab: int = 0

    def __add__(self, other: Compared) -> Compared:
        return Compared(
            self.changed + other.changed,
            self.nan_a + other.nan_a,
            self.nan_b + other.nan_b,
            self.infinite + other.infinite,
            max(self.max, other.max, key=_by_value),
            self.aa + other.aa,
            self.bb + other.bb,
            self.ab + other.ab,
        )

    @staticmethod
    def total(parts: Iterable[Compared]) -> Compared:
        """Sum of any number of results."""
        return sum(parts, Compared())

    @property
    def dd(self) -> int:
        """Sum of (b - a)² over values that are finite in both, in units of 2^`UNIT`."""
        return self.aa + self.bb - 2 * self.ab

    @property
    def greatest(self) -> float | int:
        """Maximum |b - a|; NaN if a NaN appeared or disappeared, infinite if an infinity did or changed sign."""
        if self.nan_a or self.nan_b:
            return math.nan
        return math.inf if self.infinite else self.max

    @property
    def relative(self) -> float:
        """Relative difference ‖b - a‖ / ‖a‖ in L2; 0 if nothing differs, infinite if `a` is all zeros.

        NaN or infinite if `greatest` is, because of a NaN or infinity on one side; values non-finite in both are
        excluded.
        """
        if self.nan_a or self.nan_b or self.infinite:
            return float(self.greatest)
        dd = self.dd
        if not dd:
            return 0.0
        return _root_of_ratio(dd, self.aa) if self.aa else math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity of `a` and `b`.

        NaN if one is all zeros, or if a NaN or infinity is on one side only; values non-finite in both are excluded.
        """
        if self.nan_a or self.nan_b or self.infinite or not self.aa or not self.bb:
            return math.nan
        if self.aa == self.bb == self.ab:
            return 1.0
        cosine = min(_root_of_ratio(self.ab * self.ab, self.aa * self.bb), 1.0)
        return cosine if self.ab >= 0 else -cosine

    @property
    def distance(self) -> float:
        """L2 norm ‖b - a‖ over values that are finite in both."""
        return _root(self.dd)

    @property
    def norm(self) -> float:
        """L2 norm ‖a‖ over values that are finite in both."""
        return _root(self.aa)


def _by_value(value: float) -> tuple[float, bool]:
    return value, isinstance(value, int)  # on a tie, the integer wins, in any order


def _root_of_ratio(a: int, b: int) -> float:
    """√(a/b), correct to about one unit in the last place."""
    # The quotient gets at least 118 bits, so that its root has more bits than a float64.
    shift = max(118 - a.bit_length() + b.bit_length(), 0)
    shift += shift % 2
    try:
        return math.ldexp(math.isqrt((a << shift) // b), -shift // 2)
    except OverflowError:
        return math.inf


def _root(n: int) -> float:
    """√(n·2^UNIT)."""
    drop = max(n.bit_length() - 118, 0)
    drop += drop % 2
    try:
        return math.ldexp(math.isqrt(n >> drop), (drop + UNIT) // 2)
    except OverflowError:
        return math.inf


def equal(a: Any, b: Any) -> bool:
    """Whether two contiguous buffers have equal bytes.

    >>> equal(b"ab", b"ab"), equal(b"ab", b"ac"), equal(b"ab", b"a")
    (True, False, False)
    """
    if native.uses_c():
        return _compare.equal(a, b)
    import numpy as np

    return len(a) == len(b) and np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
