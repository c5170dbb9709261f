"""Pictures of tensors: minimum, maximum and root mean square of each tile, over all values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchparams.engines.base import Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.engines.base import Job
    from torchparams.io.blocks import Block

    Array = np.ndarray[Any, Any]

TILES = 128
"""Maximum number of tiles along each side."""

_PIECE = 1 << 18  # elements that are worked on at once


class Picture(NamedTuple):
    """Tiles of a tensor as a matrix: the first dimension down, all others across.

    Attributes:
        rows, columns: Size of the matrix.
        down, across: Count of tiles.
        least, greatest: Minimum and maximum of the finite values of each tile, float64; NaN where there are none.
        rms: Root mean square of the finite values, likewise.
        nonfinite: Count of NaN and ±Inf in each.
    """

    rows: int
    columns: int
    down: int
    across: int
    least: Array
    greatest: Array
    rms: Array
    nonfinite: Array


class PictureTask(Task["_Tiles", Picture]):
    """Task that makes a picture of each tensor.

    Args:
        tiles: Maximum number of tiles along each side.
    """

    def __init__(self, tiles: int = TILES) -> None:
        self.tiles = tiles

    def begin(self, job: Job) -> _Fold:
        """Start without values."""
        return _Fold(_matrix(job), self.tiles)

    def combine(self, job: Job, parts: Sequence[_Tiles]) -> Picture:
        """Picture of the merged parts."""
        rows, columns = _matrix(job)
        first, *others = parts
        for part in others:
            first.add(part)
        down, across = min(rows, self.tiles), min(columns, self.tiles)
        with np.errstate(invalid="ignore", divide="ignore"):
            rms = np.sqrt(first.squares / first.finite)
        empty = first.finite == 0
        least, greatest = (np.where(empty, np.nan, each) for each in (first.least, first.greatest))
        return Picture(rows, columns, down, across, least, greatest, rms, first.nonfinite)


def _matrix(job: Job) -> tuple[int, int]:
    shape = job.rows[0].shape
    if not shape or 0 in shape:
        return (1, job.numel) if job.numel else (0, 0)
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


class _Tiles:
    """Sums over tiles, which add up."""

    def __init__(self, count: int) -> None:
        self.least, self.greatest = np.full(count, np.inf), np.full(count, -np.inf)
        self.squares, self.finite = np.zeros(count), np.zeros(count, np.int64)
        self.nonfinite = np.zeros(count, np.int64)

    def add(self, other: _Tiles) -> None:
        """Add the sums of another part."""
        np.minimum(self.least, other.least, out=self.least)
        np.maximum(self.greatest, other.greatest, out=self.greatest)
        self.squares += other.squares
        self.finite += other.finite
        self.nonfinite += other.nonfinite


class _Fold:
    def __init__(self, matrix: tuple[int, int], tiles: int) -> None:
        self.rows, self.columns = matrix
        self.down, self.across = min(self.rows, tiles), min(self.columns, tiles)
        self.found = _Tiles(self.down * self.across)
        # First column of each tile; widths of tiles differ by one column at most.
        self.begins = np.arange(self.across, dtype=np.int64) * self.columns // max(self.across, 1)

    def update(self, block: Block) -> None:
        """Add a block, in runs of elements within one row of one tile."""
        values = block.values()
        for start in range(0, len(values), _PIECE):
            self._piece(values[start : start + _PIECE], block.start + start)

    def _piece(self, values: Array, start: int) -> None:
        stop = start + len(values)
        if values.dtype.kind == "c":
            magnitudes = abs(values).astype(np.float64)
        else:
            magnitudes = values.astype(np.float64)
        first, last = start // self.columns, (stop - 1) // self.columns
        runs = (np.arange(first, last + 1)[:, None] * self.columns + self.begins[None, :]).ravel()
        tiles = (
            (np.arange(first, last + 1) * self.down // self.rows)[:, None] * self.across + np.arange(self.across)
        ).ravel()
        begin = int(runs.searchsorted(start, side="right")) - 1
        end = int(runs.searchsorted(stop, side="left"))
        places, tiles = np.maximum(runs[begin:end] - start, 0), tiles[begin:end]
        finite = np.isfinite(magnitudes)
        if finite.all():
            low = high = squares = magnitudes
            counts = np.diff(places, append=len(values))
        else:
            low, high = np.where(finite, magnitudes, np.inf), np.where(finite, magnitudes, -np.inf)
            squares = np.where(finite, magnitudes, 0.0)
            counts = np.add.reduceat(finite.astype(np.int64), places)
            odd = np.add.reduceat((~finite).astype(np.int64), places)
            np.add.at(self.found.nonfinite, tiles, odd)
        np.minimum.at(self.found.least, tiles, np.minimum.reduceat(low, places))
        np.maximum.at(self.found.greatest, tiles, np.maximum.reduceat(high, places))
        np.add.at(self.found.squares, tiles, np.add.reduceat(squares * squares, places))
        np.add.at(self.found.finite, tiles, counts)

    def finish(self) -> _Tiles:
        """Sums of all blocks."""
        return self.found
