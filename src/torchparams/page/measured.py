"""Measurements of one tensor for the page: statistics and the shape of its distribution, from one sketch."""

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
"""Maximum number of tensors to measure in detail; beyond it, histograms are coarser and quantiles fewer."""

FINE_BINS = 64
"""Number of intervals of a detailed histogram."""

REACH = 5
"""Maximum reach of a detailed histogram, in standard deviations from the mean; values beyond it are counted."""


def _normal(z: float) -> float:
    """Share of a normal distribution below `z` standard deviations."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


FINE = tuple(sorted({*(_normal(i / 4) for i in range(-16, 17)), 0.001, 0.01, 0.05, 0.25, 0.75, 0.95, 0.99, 0.999}))
"""Detailed quantiles: every quarter of a standard deviation of a normal distribution, and round shares."""

COARSE = tuple(sorted({*(_normal(z) for z in range(-3, 4)), 0.01, 0.25, 0.75, 0.99}))
"""Quantiles for more than `DETAILED` tensors."""


class Shape(NamedTuple):
    """Shape of a distribution.

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
    """Statistics, shape of the distribution (None without detail), and excess kurtosis of a tensor."""

    row: TensorStats
    shape: Shape | None
    kurtosis: float


class PageTask(Task["Sketch", "Measured | tuple[Columns, int]"]):
    """Task that measures each tensor for the page.

    Args:
        detailed: Measure shapes. Otherwise small tensors are measured together, as in `stats`, without kurtosis.
    """

    def __init__(self, *, detailed: bool) -> None:
        self.detailed = detailed
        self.quantiles = FINE if detailed else COARSE
        self._rows = StatsTask(self.quantiles)

    def begin(self, job: Job) -> SketchFold:
        """Start an empty sketch."""
        return SketchFold(job.dtype)

    def combine(self, job: Job, parts: Sequence[Sketch]) -> Measured:
        """Statistics and shape derived from the merged sketches."""
        sketch = parts[0] if len(parts) == 1 else parts[0].merge(parts)
        (row,) = job.rows
        made = derive(sketch, self.quantiles, name=job.key, numel=row.numel, shape=row.shape, dtype=row.dtype)
        return Measured(made, _shape(sketch, made) if self.detailed else None, kurtosis(sketch))

    def takes(self, job: Job) -> bool:
        """Whether the tensor is small, and shapes are not measured."""
        return not self.detailed and self._rows.takes(job)

    def many(self, jobs: Sequence[Job], buffer: memoryview | None, starts: Sequence[int]) -> list[tuple[Columns, int]]:
        """Rows of small tensors, in columns."""
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
