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

SCALE = 600
"""Values whose squares might leave the range of float64 are multiplied by 2^±SCALE before they are squared."""

UNIT = -1074 - 2 * SCALE
"""Exponent of the power of two that sums count in."""


@dataclass(frozen=True, slots=True)
class Compared:
    """How the values `b` differ from the values `a`. Of several parts of a tensor, or several tensors, they add.

    Attributes:
        changed: Elements whose bits differ.
        nan_a: Values that are NaN in `a` only.
        nan_b: Values that are NaN in `b` only.
        max: Greatest |b - a|: an integer of 64-bit integers, else float64. Infinite where an infinity came, went or
            turned, or where it is beyond float64; NaN is left out.
        dd: Sum of (b - a)², in units of 2^`UNIT`, of values that are finite in both.
        aa: Sum of a².
        bb: Sum of b².
        ab: Sum of a·b.

    >>> one = Compared(changed=1, max=0.5, dd=4, aa=16, bb=16, ab=16)
    >>> (one + one).changed, one.relative, one.cosine
    (2, 0.5, 1.0)
    """

    changed: int = 0
    nan_a: int = 0
    nan_b: int = 0
    max: float | int = 0
    dd: int = 0
    aa: int = 0
    bb: int = 0
    ab: int = 0

    def __add__(self, other: Compared) -> Compared:
        return Compared(
            self.changed + other.changed,
            self.nan_a + other.nan_a,
            self.nan_b + other.nan_b,
            max(self.max, other.max),
            self.dd + other.dd,
            self.aa + other.aa,
            self.bb + other.bb,
            self.ab + other.ab,
        )

    @staticmethod
    def total(parts: Iterable[Compared]) -> Compared:
        """The sum of any number of them."""
        return sum(parts, Compared())

    @property
    def relative(self) -> float:
        """‖b - a‖ / ‖a‖ in L2; 0 where nothing differs, infinite where `a` is all zeros."""
        if not self.dd:
            return 0.0
        return _root_of_ratio(self.dd, self.aa) if self.aa else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between `a` and `b`; NaN where one is all zeros."""
        if not self.aa or not self.bb:
            return math.nan
        if self.aa == self.bb == self.ab:
            return 1.0
        cosine = min(_root_of_ratio(self.ab * self.ab, self.aa * self.bb), 1.0)
        return cosine if self.ab >= 0 else -cosine

    @property
    def distance(self) -> float:
        """‖b - a‖ in L2."""
        return _root(self.dd)

    @property
    def norm(self) -> float:
        """‖a‖ in L2."""
        return _root(self.aa)


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
