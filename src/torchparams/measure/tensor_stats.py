"""Statistics of one tensor, or of a group of tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.render.tree import json_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.dtypes import DType
    from torchparams.sketch import Sketch

BINS = 12
"""Number of histogram intervals: half a standard deviation each, unless the minimum or maximum is nearer."""

_BARS = " ▁▂▃▄▅▆▇█"


COLUMNS = {
    "name": str,
    "tensors": int,
    "shape": list[int],
    "dtype": str,
    "numel": int,
    "values": int,
    "zeros": int,
    "nan": int,
    "posinf": int,
    "neginf": int,
    "min": float,
    "max": float,
    "mean": float,
    "std": float,
    "l1": float,
    "l2": float,
    "linf": float,
    "quantiles": dict[float, float],
    "histogram": list[int],
    "low": float,
    "high": float,
    "entropy": float,
    "distinct": int,
    "saturated": int,
    "exact": bool,
}
"""Types of the `TensorStats` columns, for tables handed to other libraries."""


class TensorStats(NamedTuple):  # the fastest immutable class to create: there may be 100,000 rows
    """Statistics of the elements of a tensor, or of a group of tensors.

    Counts cover all elements. Means, sums, norms, quantiles and the histogram cover the **finite** ones; `min` and
    `max` cover all but NaN. Statistics of nothing are NaN. A complex element counts as two values, its real and
    imaginary part.

    Everything is exact (rounded once) for dtypes of at most 16 bits. For wider dtypes, and for groups of several
    dtypes, quantiles have a relative error of at most 2⁻⁸, histogram counts near an edge may be on either side of it,
    and `entropy` and `distinct` are lower bounds. `exact` tells the two cases apart.

    Attributes:
        name: Canonical name of the tensor, or name of the group.
        tensors: Number of tensors.
        shape: Shape of the tensor; None for a group.
        dtype: Dtype; None for a group of several.
        numel: Number of elements.
        values: Number of values; twice `numel` for complex dtypes.
        zeros, nan, posinf, neginf: Counts of 0 (of either sign), NaN, +Inf, -Inf.
        min, max: Minimum and maximum.
        mean: Mean.
        std: Standard deviation with n - 1, torch's default; NaN for a single value.
        l1, l2, linf: Sum of magnitudes, root of the sum of squares, maximum magnitude.
        quantiles: Pairs (q, value), interpolated linearly as by `torch.quantile`.
        histogram: Counts in `BINS` equal intervals from `low` to `high`; values beyond count in the outermost.
        low, high: mean - 3·std and mean + 3·std, limited to the minimum and maximum.
        entropy: Shannon entropy of the bit patterns, -Σ p·log2 p, in bits per value.
        distinct: Number of different values; all NaN count as one.
        saturated: Number of values at the maximum finite magnitude, for floats of at most 16 bits; None for other
            dtypes.
        exact: Whether quantiles, histogram, entropy and distinct are exact.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> row = tp.stats({"w": np.array([[0, 1], [2, 5]], np.float16)})["w"]
    >>> row.zeros, row.mean, row.l1, row.distinct, row.entropy
    (1, 2.0, 8.0, 4, 2.0)
    """

    name: str
    tensors: int
    shape: tuple[int, ...] | None
    dtype: DType | None
    numel: int
    values: int
    zeros: int
    nan: int
    posinf: int
    neginf: int
    min: float | int
    max: float | int
    mean: float
    std: float
    l1: float
    l2: float
    linf: float | int
    quantiles: tuple[tuple[float, float], ...]
    histogram: tuple[int, ...]
    low: float
    high: float
    entropy: float
    distinct: int
    saturated: int | None
    exact: bool

    @property
    def nonfinite(self) -> int:
        """Number of NaN and ±Inf."""
        return self.nan + self.posinf + self.neginf

    @property
    def bars(self) -> str:
        """Histogram as text, one character per interval; blank for an empty interval.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> tp.stats({"w": np.repeat(np.arange(12), [3, 4, 5, 6, 7, 8, 8, 7, 0, 5, 4, 3])})["w"].bars
        '▃▄▅▆▇██▇ ▅▄▃'
        """
        top = max(self.histogram, default=0)
        return "".join(_BARS[-(-count * 8 // top)] if count else " " for count in self.histogram)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON data."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            "shape": None if self.shape is None else list(self.shape),
            "dtype": None if self.dtype is None else str(self.dtype),
            "numel": self.numel,
            "values": self.values,
            "zeros": self.zeros,
            "nan": self.nan,
            "posinf": self.posinf,
            "neginf": self.neginf,
            "min": json_number(self.min),
            "max": json_number(self.max),
            "mean": json_number(self.mean),
            "std": json_number(self.std),
            "l1": json_number(self.l1),
            "l2": json_number(self.l2),
            "linf": json_number(self.linf),
            "quantiles": {f"{q:.15g}": json_number(value) for q, value in self.quantiles},
            "histogram": {
                "low": json_number(self.low),
                "high": json_number(self.high),
                "counts": list(self.histogram),
            },
            "entropy": self.entropy,
            "distinct": self.distinct,
            "saturated": self.saturated,
            "exact": self.exact,
        }


def derive(
    sketch: Sketch,
    quantiles: Sequence[float],
    *,
    name: str,
    numel: int,
    shape: tuple[int, ...] | None = None,
    dtype: DType | None = None,
    tensors: int = 1,
) -> TensorStats:
    """Derive statistics from a sketch.

    Args:
        sketch: Sketch of the elements.
        quantiles: Quantiles from 0 to 1.
        name, numel, shape, dtype, tensors: Fields outside the sketch.
    """
    std, nan = sketch.std(), sketch.nan
    low, high, histogram = _histogram(sketch, std)
    return TensorStats(
        name=name,
        tensors=tensors,
        shape=shape,
        dtype=dtype,
        numel=numel,
        values=sketch.finite + nan + sketch.posinf + sketch.neginf,
        zeros=sketch.zeros,
        nan=nan,
        posinf=sketch.posinf,
        neginf=sketch.neginf,
        min=sketch.min,
        max=sketch.max,
        mean=sketch.mean,
        std=std,
        l1=sketch.l1,
        l2=sketch.l2,
        linf=sketch.linf,
        quantiles=tuple(zip(quantiles, sketch.quantile(list(quantiles)), strict=True)),
        histogram=histogram,
        low=low,
        high=high,
        entropy=sketch.entropy,
        distinct=sketch.distinct,
        saturated=sketch.saturated,
        exact=sketch.exact,
    )


def _histogram(sketch: Sketch, std: float) -> tuple[float, float, tuple[int, ...]]:
    """Edges and counts of a histogram that a single outlier does not flatten."""
    extent = sketch.finite_range
    if extent is None:
        return math.nan, math.nan, (0,) * BINS
    least, greatest = map(float, extent)
    mean, reach = sketch.mean, 3 * std if std > 0 else 0.0
    low, high = max(mean - reach, least), min(mean + reach, greatest)
    if not low < high:
        low, high = least, greatest
    counts = sketch.histogram(BINS, (low, high), clip=True)[0]
    return low, high, tuple(counts.tolist())
