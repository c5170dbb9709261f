"""Singular values of matrices, and norms and ranks computed from them.

The singular values of a matrix A are the square roots of the eigenvalues of its Gram matrix, `AᵀA` or `AAᵀ`, whichever
is smaller. The Gram matrix is accumulated in float64 while A is read, so A need not fit into memory, and its
eigenvalues cost a fraction of a singular value decomposition of A.

The price is resolution. A relative error of 10⁻¹⁶ in the Gram matrix hides singular values below about 10⁻⁸ of the
largest. Values below `RESOLUTION` times the largest are treated as unresolved: the condition number is then a lower
bound, and the fit of the tail ignores them. Larger singular values have a relative error of about 10⁻⁶.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torchparams.io.blocks import Block

    Array = np.ndarray[Any, Any]

RESOLUTION = 1e-5
"""Singular values below this fraction of the largest are not resolved."""

TILE = 1 << 21
"""Number of elements to multiply at once."""

TAIL = 50
"""Minimum number of singular values for a fit of the tail."""

_STARTS = 32  # tails that are fitted at once


class Rows:
    """Split the blocks of a matrix into whole rows.

    Args:
        shape: Rows and columns of the matrix.
        dtype: dtype of the rows.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        rows, self._columns = shape
        self._tile = np.empty((min(rows, max(TILE // self._columns, 1)), self._columns), dtype)
        self._flat = self._tile.reshape(-1)
        self._filled = 0

    def add(self, block: Block) -> list[Array]:
        """Add the next block and return the tiles that it completes; they are valid until the next call."""
        values = block.values()
        found = []
        at = 0
        while at < len(values):
            count = min(len(values) - at, len(self._flat) - self._filled)
            self._flat[self._filled : self._filled + count] = values[at : at + count]
            self._filled += count
            at += count
            if self._filled == len(self._flat):
                # A block completes several tiles only if it is larger than one; then each needs its own memory.
                found.append(self._tile.copy() if at < len(values) else self._tile)
                self._filled = 0
        return found

    def rest(self) -> Array:
        """The rows of the last, incomplete tile."""
        return self._tile[: self._filled // self._columns]


class Gram:
    """Accumulate the Gram matrix of the smaller side of a matrix, from its blocks in C order.

    A matrix with fewer rows than columns is kept in memory until the last block, in its own dtype.

    Args:
        shape: Rows and columns.
        dtype: dtype of the blocks.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._shape = rows, columns = shape
        self._sum = np.zeros((min(shape), min(shape)))
        self._held = np.empty(rows * columns, dtype) if rows < columns else None
        self._rows = Rows(shape, np.dtype(np.float64)) if rows >= columns else None

    def update(self, block: Block) -> None:
        """Add the next block."""
        if self._held is not None:
            self._held[block.start : block.stop] = block.values()
        elif self._rows is not None:
            for tile in self._rows.add(block):
                self._add(tile)

    def finish(self) -> Array:
        """The Gram matrix, float64."""
        if self._held is not None:
            matrix = self._held.reshape(self._shape)
            step = max(TILE // self._shape[0], 1)
            for start in range(0, self._shape[1], step):
                self._add(matrix[:, start : start + step].astype(np.float64).T)
            self._held = None
        elif self._rows is not None:
            self._add(self._rows.rest())
        return self._sum

    def _add(self, tile: Array) -> None:
        with np.errstate(all="ignore"):  # non-finite values show in the sum
            self._sum += tile.T @ tile


def singular_values(gram: Array) -> Array:
    """Square roots of the eigenvalues of a Gram matrix, descending, float64.

    >>> singular_values(np.diag([4.0, 9.0])).tolist()
    [3.0, 2.0]
    """
    values: Array = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))[::-1]
    return values


class Figures(NamedTuple):
    """Quantities computed from the singular values σ of a matrix, in descending order.

    Attributes:
        spectral_norm: σ₁.
        nuclear_norm: Σσ.
        stable_rank: Σσ² / σ₁² (Rudelson and Vershynin, 2007).
        effective_rank: exp(−Σ p ln p) with p = σ / Σσ (Roy and Vetterli, 2007).
        rank: Number of singular values above `RESOLUTION` · σ₁.
        condition: σ₁ / σₙ; 1 / `RESOLUTION` if σₙ is not resolved; infinite for a zero matrix.
        is_bound: Whether the condition number is a lower bound.
        tail_exponent: α of the power law that fits the largest eigenvalues σ² best; None for fewer than `TAIL`.
        tail_distance: Kolmogorov–Smirnov distance of the fit.
        edge: Expected largest singular value of a matrix with independent entries of the same mean square: s·(√m + √n)
            (Marchenko and Pastur, 1967).
        spikes: Number of singular values above `edge`.
    """

    spectral_norm: float
    nuclear_norm: float
    stable_rank: float
    effective_rank: float
    rank: int | None
    condition: float | None
    is_bound: bool
    tail_exponent: float | None
    tail_distance: float | None
    edge: float
    spikes: int | None


def figures(values: Array, shape: tuple[int, int]) -> Figures:
    """Compute the figures of singular values in descending order.

    >>> found = figures(np.array([2.0, 1.0]), (2, 2))
    >>> found.nuclear_norm, found.stable_rank, found.condition
    (3.0, 1.25, 2.0)
    """
    top = float(values[0])
    total, squares = float(values.sum()), float(np.square(values).sum())
    edge = edge_of(squares, shape)
    if not top:
        return Figures(0.0, 0.0, 0.0, 0.0, 0, math.inf, False, None, None, 0.0, 0)
    resolved = values[values > RESOLUTION * top]
    shares = values[values > 0] / total
    alpha, distance = tail(np.square(resolved)[::-1])
    return Figures(
        spectral_norm=top,
        nuclear_norm=total,
        stable_rank=squares / top**2,
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        rank=len(resolved),
        condition=top / float(resolved[-1]) if len(resolved) == len(values) else float(round(1 / RESOLUTION)),
        is_bound=len(resolved) < len(values),
        tail_exponent=alpha,
        tail_distance=distance,
        edge=edge,
        spikes=int((values > edge).sum()),
    )


def edge_of(squares: float, shape: tuple[int, int]) -> float:
    """The Marchenko–Pastur edge of the singular values of a matrix, from its sum of squares.

    >>> edge_of(4.0, (2, 2))
    2.8284271247461903
    """
    rows, columns = shape
    return math.sqrt(squares / (rows * columns)) * (math.sqrt(rows) + math.sqrt(columns))


def tail(values: Array) -> tuple[float | None, float | None]:
    """Fit a power law p(x) ∝ x^−α to the tail of ascending positive numbers; return α and the distance.

    The tail begins where the fit is best: α is the maximum-likelihood estimate for each number as the lower end, and
    the end with the smallest Kolmogorov–Smirnov distance is chosen (Clauset, Shalizi and Newman, 2009).

    >>> tail(np.arange(1.0, 10.0))
    (None, None)
    """
    count = len(values)
    if count < TAIL:
        return None, None
    logs = np.log(values)
    # Number of values in the tail from each value on, and the sum of their distances above it.
    counts = np.arange(count, 0, -1)
    above = np.cumsum(logs[::-1])[::-1] - counts * logs
    usable = above[:-1] > 0
    usable[1:] &= logs[1:-1] != logs[:-2]
    slopes = np.divide(counts[:-1], above[:-1], out=np.zeros(count - 1), where=usable)
    distances = np.full(count - 1, math.inf)
    for begin in range(0, count - 1, _STARTS):
        starts = np.arange(begin, min(begin + _STARTS, count - 1))[:, None]
        expected = -np.expm1(-slopes[starts] * np.maximum(logs[begin:] - logs[starts], 0))
        observed = np.maximum(np.arange(begin, count) - starts, 0) / counts[starts]
        distances[starts[:, 0]] = np.abs(expected - observed).max(axis=1)
    distances[~usable] = math.inf
    best = int(distances.argmin())
    return (1 + float(slopes[best]), float(distances[best])) if usable[best] else (None, None)
