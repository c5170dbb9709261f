"""Singular values of matrices, and the figures that are made of them.

The singular values of a matrix A are the square roots of the eigenvalues of its Gram matrix, `AᵀA` or `AAᵀ`, whichever
is smaller. The Gram matrix is accumulated in float64 while A is read, so that A need not be in memory, and its
eigenvalues cost a fraction of a singular value decomposition of A.

The price is resolution: an error of the Gram matrix of 10⁻¹⁶ of its largest eigenvalue hides singular values below
about 10⁻⁸ of the largest one. Those below `RESOLUTION` of it are not told apart from zero here: the condition number is
then a lower bound, and the tail's fit leaves them out. Above it, singular values are right to about 10⁻⁶ of themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torchparams.io.blocks import Block

    Array = np.ndarray[Any, Any]

RESOLUTION = 1e-5
"""Singular values below this part of the largest one are not resolved."""

TILE = 1 << 21
"""Elements that are multiplied at once."""

TAIL = 50
"""Fewest singular values that a tail is fitted to."""


class Rows:
    """Whole rows of a matrix, cut from the blocks that it comes in.

    Args:
        shape: Rows and columns of the matrix.
        dtype: The type that rows are given in.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        rows, self._columns = shape
        self._tile = np.empty((min(rows, max(TILE // self._columns, 1)), self._columns), dtype)
        self._flat = self._tile.reshape(-1)
        self._filled = 0

    def add(self, block: Block) -> list[Array]:
        """Take the next block, and give the tiles that it fills; each is valid until the next call."""
        values = block.values()
        found = []
        at = 0
        while at < len(values):
            count = min(len(values) - at, len(self._flat) - self._filled)
            self._flat[self._filled : self._filled + count] = values[at : at + count]
            self._filled += count
            at += count
            if self._filled == len(self._flat):
                # A block may fill several tiles only if it is larger than one: then each needs memory of its own.
                found.append(self._tile.copy() if at < len(values) else self._tile)
                self._filled = 0
        return found

    def rest(self) -> Array:
        """The rows that fill no tile, after the last block."""
        return self._tile[: self._filled // self._columns]


class Gram:
    """Accumulates the Gram matrix of the smaller side of a matrix, from its blocks in C order.

    Of a matrix with fewer rows than columns, all of it is held until the last block, in its own dtype.

    Args:
        shape: Rows and columns.
        dtype: Element type of the blocks.
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
        with np.errstate(all="ignore"):  # what is not finite shows in the sum
            self._sum += tile.T @ tile


def singular_values(gram: Array) -> Array:
    """Square roots of the eigenvalues of a Gram matrix, descending, float64.

    >>> singular_values(np.diag([4.0, 9.0])).tolist()
    [3.0, 2.0]
    """
    values: Array = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))[::-1]
    return values


class Figures(NamedTuple):
    """Figures of the singular values σ of a matrix, in descending order.

    Attributes:
        spectral_norm: σ₁.
        nuclear_norm: Σσ.
        stable_rank: Σσ² / σ₁² (Rudelson and Vershynin, 2007).
        effective_rank: exp(−Σ p ln p) with p = σ / Σσ (Roy and Vetterli, 2007).
        rank: Count of those above `RESOLUTION` · σ₁.
        condition: σ₁ / σₙ; 1 / `RESOLUTION` where σₙ is not resolved; infinite for a matrix of zeros.
        is_bound: Whether the condition number is a lower bound.
        tail_exponent: α of the power law that the largest eigenvalues σ² follow best; None for fewer than `TAIL`.
        tail_distance: Its Kolmogorov–Smirnov distance.
        edge: Largest singular value to expect of independent entries with the same mean square: s·(√m + √n)
            (Marchenko and Pastur, 1967).
        spikes: Count of singular values above it.
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
    """The figures of singular values in descending order.

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
    """The Marchenko–Pastur edge of the singular values of a matrix, by its sum of squares.

    >>> edge_of(4.0, (2, 2))
    2.8284271247461903
    """
    rows, columns = shape
    return math.sqrt(squares / (rows * columns)) * (math.sqrt(rows) + math.sqrt(columns))


def tail(values: Array) -> tuple[float | None, float | None]:
    """The exponent of the power law p(x) ∝ x^−α of the tail of ascending positive numbers, and its distance.

    The tail begins where the fit is best: for each number as the lower end, α is the maximum-likelihood estimate, and
    the end with the least Kolmogorov–Smirnov distance is taken (Clauset, Shalizi and Newman, 2009).

    >>> tail(np.arange(1.0, 10.0))
    (None, None)
    """
    count = len(values)
    if count < TAIL:
        return None, None
    logs = np.log(values)
    # Of the tail from each number on: how many there are, and how far they lie above it.
    counts = np.arange(count, 0, -1)
    above = np.cumsum(logs[::-1])[::-1] - counts * logs
    best, least = None, math.inf
    for i in range(count - 1):
        if above[i] <= 0 or (i and logs[i] == logs[i - 1]):
            continue
        slope = counts[i] / above[i]
        expected = -np.expm1(-slope * (logs[i:] - logs[i]))
        distance = float(np.abs(expected - np.arange(counts[i]) / counts[i]).max())
        if distance < least:
            best, least = 1 + slope, distance
    return (None, None) if best is None else (float(best), least)
