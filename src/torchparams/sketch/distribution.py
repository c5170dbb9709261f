"""Quantiles and histograms, from sorted values with cumulative counts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.sketch.kernels import Array

_NOTHING = np.zeros(1, np.uint64)


def quantiles(values: Array, cumulative: Array, ends: tuple[float, float], wanted: Sequence[float]) -> list[float]:
    """Quantiles, interpolated linearly between neighbours.

    Args:
        values: Finite values that occur, ascending, float64; at least one.
        cumulative: Number of values up to each, uint64.
        ends: Minimum and maximum, which are exact where `values` are not.
        wanted: Numbers from 0 to 1.

    >>> quantiles(np.array([1.0, 2.0]), np.array([1, 3], np.uint64), (1.0, 2.0), [0, 0.25])
    [1.0, 1.5]
    """
    last = int(cumulative[-1]) - 1
    # For a few numbers, Python is faster than NumPy.
    places = [each * last for each in wanted]
    ranks = [min(int(place), last) for place in places]
    both = ranks + [min(rank + 1, last) for rank in ranks]
    found = values[cumulative.searchsorted(np.array(both, np.uint64), side="right")].tolist()
    exact = {0: ends[0], last: ends[1]}
    found = [exact.get(rank, value) for rank, value in zip(both, found, strict=True)]
    return [
        low if low == high or place == rank else low * (1 - (place - rank)) + high * (place - rank)
        for place, rank, low, high in zip(places, ranks, found, found[len(ranks) :], strict=False)
    ]


def histogram(
    values: Array, cumulative: Array, limits: tuple[float, float], bins: int, *, clip: bool
) -> tuple[Array, Array]:
    """Counts in intervals of equal width, and the edges of the intervals.

    Args:
        values: Finite values that occur, ascending, float64.
        cumulative: Number of values up to each, uint64.
        limits: Lowest and highest edge, finite and ascending. If they are equal, they are 0.5 on either side.
        bins: Number of intervals.
        clip: Count values outside `limits` in the outermost intervals.

    >>> histogram(np.array([0.0, 1.0]), np.array([1, 4], np.uint64), (0.0, 1.0), 2, clip=False)[0].tolist()
    [1, 3]
    """
    low, high = limits
    if low == high:
        low, high = low - 0.5, high + 0.5
    share, rest = _shares(bins)
    edges = low * rest + high * share  # high - low may overflow float64
    edges = np.minimum(np.maximum(np.maximum.accumulate(edges), low), high)
    below = values.searchsorted(edges, side="left")
    below[-1] = values.searchsorted(high, side="right")
    if clip:
        below[0], below[-1] = 0, len(values)
    upto = np.concatenate([_NOTHING, cumulative])[below]
    return upto[1:] - upto[:-1], edges


@functools.lru_cache(4)
def _shares(bins: int) -> tuple[Array, Array]:
    """Relative position of every edge from the lower and from the upper end, from 0 to 1."""
    share = np.arange(bins + 1) / bins
    return share, 1 - share
