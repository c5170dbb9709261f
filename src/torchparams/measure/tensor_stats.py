"""A row of statistics: of one tensor, or of several together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.render.tree import json_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.dtypes import DType
    from torchparams.sketch import Sketch

BINS = 12
"""Intervals of a row's histogram: half a standard deviation each, unless minimum or maximum come first."""

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
"""Attributes of `TensorStats` → their types, for tables handed to other libraries."""


class TensorStats(NamedTuple):  # of all frozen records, what is made soonest: there may be a hundred thousand
    """Statistics of the elements of one tensor, or of a group of tensors.

    Counts are of all elements. Means, sums, norms, quantiles and the histogram are over the **finite** ones; `min` and
    `max` are over all but NaN. What is taken of nothing is NaN. A complex element counts as two values, its real and
    its imaginary part.

    All of it is exact (rounded once) for types of at most 16 bits. Of wider ones, and of groups of several types,
    quantiles are within a relative 2⁻⁸, the histogram counts what is that near to an edge on either side of it, and
    `entropy` and `distinct` are lower bounds: `exact` says which.

    Attributes:
        name: The tensor's canonical name, or what the group is called.
        tensors: How many tensors.
        shape: The tensor's; None of a group.
        dtype: Element type; None of a group of several.
        numel: Count of elements.
        values: Count of values: that of elements, of complex ones twice as many.
        zeros, nan, posinf, neginf: Counts of 0 (of either sign), NaN, +Inf, -Inf.
        min, max: Least and greatest value.
        mean: Mean.
        std: Standard deviation, with n - 1 as torch's default: NaN of a single value.
        l1, l2, linf: Sum of magnitudes, root of the sum of squares, greatest magnitude.
        quantiles: Pairs (q, value), linear between neighbours as `torch.quantile` takes them.
        histogram: Counts in `BINS` intervals of equal width from `low` to `high`, the outermost with all beyond.
        low, high: mean - 3·std and mean + 3·std, but no further than minimum and maximum.
        entropy: Shannon entropy of the bit patterns, -Σ p·log2 p, in bits per value.
        distinct: How many values are different; all NaN count as one.
        saturated: Count of values at the greatest finite magnitude of a float of at most 16 bits; None of others.
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
        """Count of NaN and ±Inf."""
        return self.nan + self.posinf + self.neginf

    @property
    def bars(self) -> str:
        """The histogram as text, a character for each interval; blank where there is nothing.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> tp.stats({"w": np.repeat(np.arange(12), [3, 4, 5, 6, 7, 8, 8, 7, 0, 5, 4, 3])})["w"].bars
        '▃▄▅▆▇██▇ ▅▄▃'
        """
        top = max(self.histogram, default=0)
        return "".join(_BARS[-(-count * 8 // top)] if count else " " for count in self.histogram)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON takes it."""
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
    """The row for a sketch.

    Args:
        sketch: Of the elements.
        quantiles: Which ones, from 0 to 1.
        name, numel, shape, dtype, tensors: What the sketch does not know.
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
    """Edges and counts, for a picture that a single outlier does not flatten."""
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
