"""Norms, means and counts of many tensors: one row each, which groups and ranks combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.sketch.moments import EXPONENTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers of tensors, a row for each.

    Attributes:
        counts: Number of elements; int64, shape (n,).
        sums, norms, most: Sum, L2 norm and largest magnitude of the finite elements; float64, (n,).
        zeros, nonfinite: Number of elements that are zero, and of NaN and infinities; int64, (n,).
        exponents: Histograms of magnitudes, see `sketch.moments.EXPONENTS`; int64, (n, 256). None if not requested.
    """

    counts: Array
    sums: Array
    norms: Array
    most: Array
    zeros: Array
    nonfinite: Array
    exponents: Array | None = None

    @classmethod
    def empty(cls, count: int, exponents: bool) -> Measured:
        """Rows of zeros."""
        integers, reals = np.zeros((3, count), np.int64), np.zeros((3, count))
        histogram = np.zeros((count, EXPONENTS), np.int64) if exponents else None
        return cls(integers[0], reals[0], reals[1], reals[2], integers[1], integers[2], histogram)

    @property
    def means(self) -> Array:
        """Mean of the finite elements; NaN if there are none."""
        with np.errstate(all="ignore"):
            found: Array = self.sums / (self.counts - self.nonfinite)
        return found

    @property
    def deviations(self) -> Array:
        """Standard deviation of the finite elements, with n - 1; NaN for a single element."""
        with np.errstate(all="ignore"):
            count = self.counts - self.nonfinite
            found: Array = np.sqrt(np.maximum(np.square(self.norms) - self.sums**2 / count, 0) / (count - 1))
        return found

    def grouped(self, members: Sequence[Sequence[int]]) -> Measured:
        """Combine rows into groups, given by row numbers."""
        sums = [getattr(self, key) for key in ("counts", "sums", "zeros", "nonfinite")]
        counts, total, zeros, nonfinite = (np.array([column[list(m)].sum() for m in members]) for column in sums)
        norms = np.array([together(self.norms[list(m)]) for m in members])
        most = np.array([self.most[list(m)].max(initial=0) for m in members])
        exponents = None if self.exponents is None else np.array([self.exponents[list(m)].sum(0) for m in members])
        return Measured(counts, total, norms, most, zeros, nonfinite, exponents)

    def packed(self) -> Array:
        """All columns as one float64 array, which ranks exchange; counts are exact below 2^53."""
        columns = [self.norms, self.most, self.counts, self.sums, self.zeros, self.nonfinite]
        return np.column_stack([*columns, *([] if self.exponents is None else [self.exponents])]).astype(np.float64)

    @classmethod
    def unpacked(cls, ranks: Array) -> Measured:
        """Combine the `packed` numbers of all parts, of shape (ranks, n, columns), for whole tensors."""
        norms, most, total = together(ranks[:, :, 0]), ranks[:, :, 1].max(axis=0), ranks[:, :, 2:].sum(axis=0)
        counts, zeros, nonfinite = (total[:, i].astype(np.int64) for i in (0, 2, 3))
        exponents = total[:, 4:].astype(np.int64) if total.shape[1] > 4 else None
        return cls(counts, total[:, 1], norms, most, zeros, nonfinite, exponents)


def together(norms: Array) -> Array:
    """Combine the norms of several tensors along the first dimension.

    >>> together(np.array([[3.0], [4.0]])).tolist()
    [5.0]
    """
    most: Array = norms.max(axis=0, initial=0)
    scale = np.where((most > 0) & np.isfinite(most), most, 1)
    found: Array = scale * np.sqrt(np.square(norms / scale).sum(axis=0))
    return found
