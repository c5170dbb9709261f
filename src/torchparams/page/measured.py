"""What the page shows of a tensor: its row of statistics, and the shape of its distribution, from one sketch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchparams.engines.base import Task
from torchparams.engines.sketches import SketchFold
from torchparams.measure.stats import StatsTask
from torchparams.measure.tensor_stats import BINS, TensorStats, derive
from torchparams.sketch.shape import Octaves, kurtosis, octaves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.engines.base import Job
    from torchparams.measure.columns import Columns
    from torchparams.sketch import Sketch

    Array = np.ndarray[Any, Any]

DETAILED = 5000
"""Tensors up to which each is measured in detail; of more, the page holds a coarser histogram and fewer quantiles."""

FINE_BINS = 64
"""Intervals of a histogram in detail."""

REACH = 5
"""Standard deviations from the mean that a histogram in detail reaches at most; what lies beyond is counted."""


def _normal(z: float) -> float:
    """The share of a normal distribution below `z` standard deviations."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


FINE = tuple(sorted({*(_normal(i / 4) for i in range(-16, 17)), 0.001, 0.01, 0.05, 0.25, 0.75, 0.95, 0.99, 0.999}))
"""The quantiles in detail: at every quarter of a standard deviation, as a plot against a normal distribution wants."""

COARSE = tuple(sorted({*(_normal(z) for z in range(-3, 4)), 0.01, 0.25, 0.75, 0.99}))
"""The quantiles of a table of more than `DETAILED` tensors."""


class Shape(NamedTuple):
    """The shape of a distribution.

    Attributes:
        low, high: Ends of the histogram; NaN where no value is finite.
        counts: Counts in intervals of equal width from `low` to `high`.
        below, above: Counts of finite values beyond the ends.
        octaves: Counts by power of two.
    """

    low: float
    high: float
    counts: Array
    below: int
    above: int
    octaves: Octaves


class Measured(NamedTuple):
    """A row, the shape of its distribution (None where that is not measured), and its excess kurtosis."""

    row: TensorStats
    shape: Shape | None
    kurtosis: float


class PageTask(Task["Sketch", "Measured | tuple[Columns, int]"]):
    """The task that measures what the page shows of every tensor.

    Args:
        detailed: Whether shapes are wanted. Else small tensors are measured together, as of `stats`, without kurtosis.
    """

    def __init__(self, *, detailed: bool) -> None:
        self.detailed = detailed
        self.quantiles = FINE if detailed else COARSE
        self._rows = StatsTask(self.quantiles)

    def begin(self, job: Job) -> SketchFold:
        """Count from nothing."""
        return SketchFold(job.dtype)

    def combine(self, job: Job, parts: Sequence[Sketch]) -> Measured:
        """The row and the shape, derived from the sketch of all parts."""
        sketch = parts[0] if len(parts) == 1 else parts[0].merge(parts)
        (row,) = job.rows
        made = derive(sketch, self.quantiles, name=job.key, numel=row.numel, shape=row.shape, dtype=row.dtype)
        return Measured(made, _shape(sketch, made) if self.detailed else None, kurtosis(sketch))

    def takes(self, job: Job) -> bool:
        """Whether it is small, and no shape is wanted."""
        return not self.detailed and self._rows.takes(job)

    def many(self, jobs: Sequence[Job], buffer: memoryview | None, starts: Sequence[int]) -> list[tuple[Columns, int]]:
        """The rows, in columns."""
        return self._rows.many(jobs, buffer, starts)


def _shape(sketch: Sketch, row: TensorStats) -> Shape:
    extent = sketch.finite_range
    if extent is None:
        return Shape(math.nan, math.nan, np.zeros(FINE_BINS, np.uint64), 0, 0, octaves(sketch))
    least, greatest = map(float, extent)
    reach = REACH * row.std if row.std > 0 else 0.0
    low, high = max(row.mean - reach, least), min(row.mean + reach, greatest)
    if not low < high:
        low, high = least, greatest
    counts = sketch.histogram(FINE_BINS, (low, high))[0]
    below = above = 0
    if least < low or high < greatest:
        clipped = sketch.histogram(FINE_BINS, (low, high), clip=True)[0]
        below, above = int(clipped[0] - counts[0]), int(clipped[-1] - counts[-1])
    return Shape(low, high, counts, below, above, octaves(sketch))


assert BINS < FINE_BINS  # the coarser histogram is that of `stats`
