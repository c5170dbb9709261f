"""Statistics stored in columns, with row objects created on demand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np

from torchparams.io.filebytes import paused_gc
from torchparams.measure.tensor_stats import TensorStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchparams.dtypes import DType
    from torchparams.engines.base import Job
    from torchparams.sketch.batch import Measured

    Array = np.ndarray[Any, Any]

_row = partial(tuple.__new__, TensorStats)  # as TensorStats._make, which is a function in Python

Head: TypeAlias = "tuple[str, tuple[int, ...] | None, DType | None, int]"
"""Row data outside the statistics: name, shape, dtype, numel."""


class Columns:
    """Statistics of tensors of one dtype, with one array per column.

    Args:
        jobs: Jobs of the tensors.
        measured: Statistics, in the same order.
        quantiles: Quantiles in the statistics.
    """

    __slots__ = ("dtype", "measured", "names", "numels", "quantiles", "shapes")

    def __init__(self, jobs: Sequence[Job], measured: Measured, quantiles: tuple[float, ...]) -> None:
        self.dtype = jobs[0].dtype
        self.names = [job.key for job in jobs]
        self.shapes = [job.rows[0].shape for job in jobs]
        self.numels = [job.rows[0].numel for job in jobs]
        self.measured = measured
        self.quantiles = quantiles

    def rows(self, which: Sequence[int]) -> list[TensorStats]:
        """Rows at the given indices."""
        measured, coding = self.measured, self.measured.coding
        take = np.array(which, np.intp)
        values = measured.counts[take].tolist()
        mean, std, l1, l2, entropy, low, high, *quantiles = map(_floats, measured.reals[take].T)
        integers = measured.integers[take]
        zeros, nan, posinf, neginf, distinct, saturated = integers[:, :6].T.tolist()
        least, most, linf = (measured.extreme(column)[take] for column in range(3))
        if coding.is_float:
            extremes = [_floats(each) for each in (least, most, linf)]
        else:  # types of at most 16 bits were counted as float64
            whole = (np.nan_to_num(each) if each.dtype == np.float64 else each for each in (least, most, linf))
            extremes = [each.astype(np.uint64 if each.dtype == np.uint64 else np.int64).tolist() for each in whole]
        for i, count in enumerate(values):
            if not count:
                extremes[0][i], extremes[1][i], extremes[2][i] = math.nan, math.nan, 0.0
        taken = [zip(repeat(q), column, strict=False) for q, column in zip(self.quantiles, quantiles, strict=True)]
        pairs = zip(*taken, strict=True) if taken else repeat(())
        histograms = zip(*integers[:, 6:].T.tolist(), strict=True)
        columns: tuple[Iterable[Any], ...] = (
            *([self.names[i] for i in which], repeat(1), [self.shapes[i] for i in which], repeat(self.dtype)),
            *([self.numels[i] for i in which], values, zeros, nan, posinf, neginf, extremes[0], extremes[1]),
            *(mean, std, l1, l2, extremes[2], pairs, histograms, low, high, entropy),
            *(distinct, repeat(None) if coding.largest is None else saturated, repeat(coding.exact)),
        )
        return list(map(_row, zip(*columns, strict=False)))

    @property
    def std(self) -> Array:
        """Standard deviations."""
        return self.measured.reals[:, 1]

    @property
    def odd(self) -> Array:
        """Whether a tensor has non-finite or saturated values, or all its values are equal."""
        integers = self.measured.integers
        same = self.measured.extreme(0) == self.measured.extreme(1)
        found: Array = integers[:, 1:4].any(axis=1) | (integers[:, 5] > 0) | same
        return found


class Rows(Sequence[TensorStats]):
    """Sequence of rows, equal to a tuple of them. Rows in columns are created at first access.

    Args:
        entries: Rows, or (columns, index) pairs.
    """

    def __init__(self, entries: Iterable[TensorStats | tuple[Columns, int]]) -> None:
        self._entries = list(entries)
        self._places = _grouped(self._entries)
        self._made: tuple[TensorStats, ...] | None = None

    @property
    def made(self) -> tuple[TensorStats, ...]:
        """All rows as a tuple."""
        if self._made is None:
            with paused_gc():  # many objects, no cycles
                self._made = tuple(_filled(self._entries, self._places))
            self._entries, self._places = list(self._made), {}
        return self._made

    def some(self, which: Iterable[int]) -> list[TensorStats]:
        """Rows at the given indices, without creating others."""
        entries = [self._entries[i] for i in which]
        return _filled(entries, _grouped(entries))

    def heads(self) -> Iterator[Head]:
        """Name, shape, dtype and numel of each row, without creating rows."""
        for entry in self._entries:
            if isinstance(entry, TensorStats):
                yield entry.name, entry.shape, entry.dtype, entry.numel
            else:
                columns, i = entry
                yield columns.names[i], columns.shapes[i], columns.dtype, columns.numels[i]

    def scan(self) -> tuple[Array, Array]:
        """Standard deviations, and whether each row may have a flag by itself, without creating rows."""
        std, odd = np.zeros(len(self)), np.zeros(len(self), bool)
        for columns, (here, there) in self._places.items():
            std[here], odd[here] = columns.std[there], columns.odd[there]
        for i, entry in enumerate(self._entries):
            if isinstance(entry, TensorStats):
                std[i], odd[i] = entry.std, bool(entry.nonfinite or entry.saturated or entry.min == entry.max)
        return std, odd

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, which: int) -> TensorStats: ...
    @overload
    def __getitem__(self, which: slice) -> tuple[TensorStats, ...]: ...
    def __getitem__(self, which: int | slice) -> TensorStats | tuple[TensorStats, ...]:
        return self.made[which]

    def __iter__(self) -> Iterator[TensorStats]:
        return iter(self.made)

    def __eq__(self, other: object) -> bool:
        return self.made == tuple(other) if isinstance(other, Rows | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.made)

    def __repr__(self) -> str:
        return repr(self.made)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.made,)


def _floats(column: Array) -> list[float]:
    """Column as Python floats. NaN becomes the object `math.nan`, so that equal rows compare equal."""
    found: list[float] = column.tolist()
    return [math.nan if value != value else value for value in found] if np.isnan(column).any() else found


Places: TypeAlias = "dict[Columns, tuple[list[int], list[int]]]"
"""For each of several columns: indices into a list of entries, and the matching indices into the columns."""


def _grouped(entries: Iterable[Any]) -> Places:
    found: Places = {}
    columns = None
    for i, entry in enumerate(entries):
        if type(entry) is tuple:
            if entry[0] is not columns:  # entries of the same columns are usually adjacent
                columns = entry[0]
                here, there = found.setdefault(columns, ([], []))
            here.append(i)
            there.append(entry[1])
    return found


def _filled(entries: list[Any], places: Places) -> list[TensorStats]:
    found = list(entries)
    for columns, (here, there) in places.items():
        for i, row in zip(here, columns.rows(there), strict=True):
            found[i] = row
    return found
