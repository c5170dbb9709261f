"""Sums of many tensors in memory at once: what a record of a training step is made of.

The kernels in `_moments.c` are called with the addresses of all tensors of a type, and work on all processors. The
functions named `numpy_…` are their definitions, and run in their place where the package was built without a compiler.
Counts and maxima are the same; the last bits of sums may differ, which are float64 in both.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from torchparams.dtypes import DType
from torchparams.io.threads import processors, results_of
from torchparams.sketch import native

try:
    from torchparams.sketch import _moments

    BUILT = True
except ImportError:  # built without a compiler
    BUILT = False

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"

KINDS = ("float32", "float64", "bfloat16", "float16")
"""The types that are measured, in the kernel's order."""

EXPONENTS = 256
"""Bins of a histogram: bin e counts magnitudes from 2^(e-127) to below 2^(e-126).

Bin 0 counts zeros and all that is smaller, bin 254 all that is greater, bin 255 NaN and infinities.
"""

PIECE = 1 << 18
"""Elements that one thread takes at once."""

ALONE = 1 << 20
"""Elements that are not worth another thread."""


def uses_c() -> bool:
    """Whether the kernels in use are those in C."""
    return BUILT and native.WANTED != "numpy"


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums of tensors, a row for each.

    Attributes:
        counts: Elements, shape (n,).
        sums, squares, most: Of finite elements the sum, the sum of squares and the greatest magnitude; float64, (n,).
        zeros, nonfinite: Count of elements that are zero, and of NaN and infinities; int64, (n,).
        exponents: The histogram of magnitudes, see `EXPONENTS`; int64, (n, 256). None where it was not asked for.
    """

    counts: Array
    sums: Array
    squares: Array
    most: Array
    zeros: Array
    nonfinite: Array
    exponents: Array | None = None


class Layout:
    """Tensors of one type, cut into pieces for the processors; it is made once and used at every step.

    Args:
        dtype: The element type.
        numels: Elements of each tensor.
    """

    def __init__(self, dtype: DType, numels: Sequence[int]) -> None:
        self.kind = KINDS.index(str(dtype))
        self.itemsize = dtype.itemsize
        self.dtype = dtype
        self.numels = np.array(numels, np.uint64)
        pieces = [(i, start) for i, numel in enumerate(numels) for start in range(0, max(numel, 1), PIECE)]
        self.owner = np.array([i for i, _ in pieces], np.intp)
        starts = np.array([start for _, start in pieces], np.uint64)
        self._offsets = starts * np.uint64(self.itemsize)
        self._counts = np.minimum(self.numels[self.owner] - starts, np.uint64(PIECE)) if pieces else starts
        self._first = np.flatnonzero(np.diff(self.owner, prepend=-1)) if pieces else self.owner
        total = int(self.numels.sum())
        parts = max(min(processors(), total // ALONE), 1)
        ends = np.searchsorted(np.cumsum(self._counts), np.arange(1, parts) * (total // parts)).tolist()
        bounds = [0, *ends, len(pieces)]
        self._parts = [slice(a, b) for a, b in pairwise(bounds) if b > a]

    def measure(self, addresses: Sequence[int], *, exponents: bool = False) -> Moments:
        """Measure the tensors.

        Args:
            addresses: Where each begins; contiguous, and kept alive by whoever calls.
            exponents: Make the histograms too.
        """
        at = self._places(addresses)
        count = len(self.owner)
        sums, integers = np.empty((count, 3)), np.empty((count, 2), np.int64)
        histogram = np.empty((count, EXPONENTS), np.int64) if exponents else None
        measure = _moments.measure if uses_c() else numpy_measure
        self._run(
            lambda part: measure(
                self.kind,
                at[part],
                self._counts[part],
                sums[part],
                integers[part],
                None if histogram is None else histogram[part],
            )
        )
        added = self._added
        return Moments(
            self.numels.astype(np.int64),
            added(sums[:, 0]),
            added(sums[:, 1]),
            np.maximum.reduceat(sums[:, 2], self._first) if count else sums[:, 2],
            added(integers[:, 0]),
            added(integers[:, 1]),
            None if histogram is None else added(histogram),
        )

    def distance(self, addresses: Sequence[int], others: Sequence[int]) -> Array:
        """Sums of squares of the differences to other tensors, and of these; float64, shape (n, 2).

        They are not finite where an element is not.
        """
        at, to = self._places(addresses), self._places(others)
        sums = np.empty((len(self.owner), 2))
        distance = _moments.distance if uses_c() else numpy_distance
        self._run(lambda part: distance(self.kind, at[part], to[part], self._counts[part], sums[part]))
        return self._added(sums)

    def nonfinite(self, addresses: Sequence[int]) -> Array:
        """Count NaN and infinities of each tensor, int64; this reads them at the memory's speed."""
        at = self._places(addresses)
        found = np.empty(len(self.owner), np.int64)
        nonfinite = _moments.nonfinite if uses_c() else numpy_nonfinite
        self._run(lambda part: nonfinite(self.kind, at[part], self._counts[part], found[part]))
        return self._added(found)

    def _places(self, addresses: Sequence[int]) -> Array:
        places: Array = np.array(addresses, np.uint64)[self.owner] + self._offsets
        return places

    def _added(self, column: Array) -> Array:
        if len(self._first) == len(column):  # a piece each
            return column
        found: Array = np.add.reduceat(column, self._first, axis=0)
        return found

    def _run(self, call: Callable[[slice], object]) -> None:
        def work(part: slice) -> Iterator[None]:
            call(part)
            yield None

        if len(self._parts) == 1:
            call(self._parts[0])
        elif self._parts:
            for _ in results_of([work(part) for part in self._parts], threading.Event()):
                pass


def square_distance(dtype: str, data: Array, other: Array) -> float:
    """Sum of squares of the differences of two arrays of bytes; not finite if an element is not.

    >>> square_distance("float32", *(np.array(x, np.float32).view(np.uint8) for x in ([3, 3], [3, 5])))
    4.0
    """
    found = np.zeros((1, 2))
    if data.size:
        kind = KINDS.index(dtype)
        at, to = (np.array([each.__array_interface__["data"][0]], np.uint64) for each in (data, other))
        count = np.array([data.size // DType.of(dtype).itemsize], np.uint64)
        (_moments.distance if uses_c() else numpy_distance)(kind, at, to, count, found)
    return float(found[0, 0])


# --- definitions --------------------------------------------------------------------------------------


def numpy_measure(
    kind: int, addresses: Array, counts: Array, sums: Array, integers: Array, exponents: Array | None
) -> None:
    """Fill the rows of some tensors: sum, squares and greatest magnitude; zeros and non-finite; the histogram."""
    for i, values in enumerate(_values(kind, addresses, counts)):
        finite = np.isfinite(values)
        wide = np.where(finite, values, 0).astype(np.float64)
        with np.errstate(all="ignore"):  # squares of float64 overflow
            sums[i] = wide.sum(), np.square(wide).sum(), np.abs(wide).max(initial=0)
        integers[i] = (values == 0).sum(), (~finite).sum()
        if exponents is not None:
            _, exponent = np.frexp(wide)
            found = np.clip(exponent + 126, 0, EXPONENTS - 2)
            found[wide == 0] = 0
            found[~finite] = EXPONENTS - 1
            exponents[i] = np.bincount(found, minlength=EXPONENTS)


def numpy_distance(kind: int, addresses: Array, others: Array, counts: Array, sums: Array) -> None:
    """Fill the rows: the sum of squares of the difference, and of its second term."""
    pairs = zip(_values(kind, addresses, counts), _values(kind, others, counts), strict=True)
    with np.errstate(all="ignore"):
        for i, (a, b) in enumerate(pairs):
            wide = b.astype(np.float64)
            sums[i] = np.square(a.astype(np.float64) - wide).sum(), np.square(wide).sum()


def numpy_nonfinite(kind: int, addresses: Array, counts: Array, found: Array) -> None:
    """Fill in the counts of NaN and infinities."""
    for i, values in enumerate(_values(kind, addresses, counts)):
        found[i] = np.count_nonzero(~np.isfinite(values))


def _values(kind: int, addresses: Array, counts: Array) -> Iterator[Array]:
    """The elements at some addresses, as float64 or float32."""
    dtype = DType.of(KINDS[kind])
    for address, count in zip(addresses.tolist(), counts.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address) if count else b""
        values: Array = np.frombuffer(memory, dtype.numpy)
        yield values if dtype.bits > 16 else values.astype(np.float32)
