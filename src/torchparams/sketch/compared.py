"""What a comparison finds: sums that add, and what follows from them. It needs no numpy, and neither does equality."""

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
"""Exponent of the power of two that sums count in: the square of the least float64."""


@dataclass(frozen=True, slots=True)
class Compared:
    """How the values `b` differ from the values `a`.

    Of several parts of a tensor, or several tensors, they add. All of it is exact, so that addition is associative and
    commutative, and the parts may be any.

    Attributes:
        changed: Elements that differ.
        nan_a: Values that are NaN in `a` only.
        nan_b: Values that are NaN in `b` only.
        infinite: Values that are infinite in one only, or of the other sign, and NaN in none.
        max: Greatest |b - a| of the values that are finite in both: an integer of 64-bit integers, else float64,
            rounded once; infinite where it is beyond float64.
        aa: Sum of a², in units of 2^`UNIT`, of the values that are finite in both.
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
        """The sum of any number of them."""
        return sum(parts, Compared())

    @property
    def dd(self) -> int:
        """Sum of (b - a)², in units of 2^`UNIT`, of the values that are finite in both."""
        return self.aa + self.bb - 2 * self.ab

    @property
    def greatest(self) -> float | int:
        """Greatest |b - a|: NaN where a NaN came or went, else infinite where an infinity came, went or turned."""
        if self.nan_a or self.nan_b:
            return math.nan
        return math.inf if self.infinite else self.max

    @property
    def relative(self) -> float:
        """‖b - a‖ / ‖a‖ in L2; 0 where nothing differs, infinite where `a` is all zeros.

        NaN or infinite where `greatest` is so by a NaN or an infinity in one only; others are left out.
        """
        if self.nan_a or self.nan_b or self.infinite:
            return float(self.greatest)
        dd = self.dd
        if not dd:
            return 0.0
        return _root_of_ratio(dd, self.aa) if self.aa else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between `a` and `b`.

        NaN where one is all zeros, and where a NaN or an infinity is in one only; others are left out.
        """
        if self.nan_a or self.nan_b or self.infinite or not self.aa or not self.bb:
            return math.nan
        if self.aa == self.bb == self.ab:
            return 1.0
        cosine = min(_root_of_ratio(self.ab * self.ab, self.aa * self.bb), 1.0)
        return cosine if self.ab >= 0 else -cosine

    @property
    def distance(self) -> float:
        """‖b - a‖ in L2, of the values that are finite in both."""
        return _root(self.dd)

    @property
    def norm(self) -> float:
        """‖a‖ in L2, of the values that are finite in both."""
        return _root(self.aa)


def _by_value(value: float) -> tuple[float, bool]:
    return value, isinstance(value, int)  # of equal ones the integer, whichever comes first


def _root_of_ratio(a: int, b: int) -> float:
    """√(a/b), correct to one unit in the last place or so."""
    # A quotient of 118 bits or more, so that its root has more than float64 holds.
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
    """Whether two contiguous buffers have the same bytes.

    >>> equal(b"ab", b"ab"), equal(b"ab", b"ac"), equal(b"ab", b"a")
    (True, False, False)
    """
    if native.uses_c():
        return _compare.equal(a, b)
    import numpy as np

    return len(a) == len(b) and np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
