"""Shape of a distribution, from counts of bit patterns: its kurtosis, and its magnitudes by power of two."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torchparams.sketch.kernels import Array
    from torchparams.sketch.sketch import Sketch


class Octaves(NamedTuple):
    """Number of finite values by magnitude.

    Attributes:
        first: Exponent of the first interval: interval i holds magnitudes in [2^(first + i), 2^(first + i + 1)).
        negative: Counts of values below zero, uint64 of shape (n,).
        positive: Counts of values above zero, of the same shape.
    """

    first: int
    negative: Array
    positive: Array


def kurtosis(sketch: Sketch) -> float:
    """Excess kurtosis of the finite values: the fourth central moment divided by the squared variance, minus 3.

    It is 0 for a normal distribution, -1.2 for a uniform one, and NaN if all values are equal. The moments are those of
    the population (Fisher's definition, as in `scipy.stats.kurtosis`). For dtypes wider than 16 bits, each value is
    replaced by its code, with a relative error of at most 2^-8.

    >>> import numpy as np
    >>> from torchparams.sketch import Sketch
    >>> kurtosis(Sketch.of(np.array([-1, 1, -1, 1], np.float16)))
    -2.0
    """
    deviation = sketch.std(0)
    if not deviation > 0:
        return math.nan
    values, cumulative = sketch.ordered
    scaled = (values - sketch.mean) / deviation
    scaled *= scaled
    scaled *= scaled
    return float(np.dot(scaled, _counts(cumulative))) / sketch.finite - 3


def octaves(sketch: Sketch) -> Octaves:
    """Count the finite values by the power of two below their magnitude; zeros are omitted.

    Exact for every dtype, because no code holds values on both sides of a power of two. Magnitudes too small for a code
    count as zeros: below 2^-133 for float32, below 2^-1029 for float64.

    >>> import numpy as np
    >>> from torchparams.sketch import Sketch
    >>> found = octaves(Sketch.of(np.array([-3, 0, 1, 1.5, 2], np.float16)))
    >>> found.first, found.negative.tolist(), found.positive.tolist()
    (0, [0, 1], [2, 1])
    """
    values, cumulative = sketch.ordered
    counts = _counts(cumulative)
    below, above = int(values.searchsorted(0.0)), int(values.searchsorted(0.0, side="right"))
    if not below and above == len(values):
        return Octaves(0, np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    exponents = np.frexp(values)[1]
    ends = [exponents[i] for i in (0, below - 1) if below] + [exponents[i] for i in (above, -1) if above < len(values)]
    first, n = int(min(ends)), int(max(ends)) - int(min(ends)) + 1
    exponents -= first
    negative, positive = (
        np.bincount(exponents[part], counts[part], n).astype(np.uint64)
        for part in (slice(0, below), slice(above, None))
    )
    return Octaves(first - 1, negative, positive)


def _counts(cumulative: Array) -> Array:
    """Number of values of each code: exact up to 2^53."""
    found = cumulative.astype(np.float64)
    found[1:] -= found[:-1].copy()
    return found
