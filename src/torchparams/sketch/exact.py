"""Quotients and roots of exact integers, as floats."""

from __future__ import annotations

import math


def ratio(numerator: int, denominator: int, exponent: int) -> float:
    """numerator / denominator · 2^exponent, rounded once; NaN where the denominator is 0.

    >>> ratio(1, 3, -1) == 1 / 6
    True
    """
    if denominator == 0:
        return math.nan
    if exponent < 0:
        denominator <<= -exponent
    else:
        numerator <<= exponent
    try:
        return numerator / denominator  # of integers, Python rounds the exact quotient
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


def root(numerator: int, denominator: int, exponent: int) -> float:
    """sqrt(numerator / denominator) · 2^exponent, rounded once.

    >>> root(2, 1, 0) == 2**0.5
    True
    """
    # 128 bits of quotient leave 64 of root, more than a float64 has; one more says that the root goes on.
    shift = max(128 + denominator.bit_length() - numerator.bit_length(), 0)
    shift += shift & 1
    quotient, rest = divmod(numerator << shift, denominator)
    whole = math.isqrt(quotient)
    more = 1 if rest or whole * whole != quotient else 0
    return ratio(whole << 1 | more, 1, exponent - shift // 2 - 1)
