"""Quotients and roots of exact integers, rounded to floats."""

from __future__ import annotations

import math


def ratio(numerator: int, denominator: int, exponent: int) -> float:
    """Compute numerator / denominator · 2^exponent, rounded once; NaN if the denominator is 0.

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
        return numerator / denominator  # Python rounds quotients of integers correctly
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


def root(numerator: int, denominator: int, exponent: int) -> float:
    """Compute sqrt(numerator / denominator) · 2^exponent, rounded once.

    >>> root(2, 1, 0) == 2**0.5
    True
    """
    # A 128-bit quotient gives a 64-bit root, more than a float64 holds; one extra bit marks an inexact root.
    shift = max(128 + denominator.bit_length() - numerator.bit_length(), 0)
    shift += shift & 1
    quotient, rest = divmod(numerator << shift, denominator)
    whole = math.isqrt(quotient)
    more = 1 if rest or whole * whole != quotient else 0
    return ratio(whole << 1 | more, 1, exponent - shift // 2 - 1)
