"""Statistics of many small tensors of one element type in one call of a kernel, in columns.

What the kernel computes is defined by `Sketch`: each number here is that of the sketch of the tensor, bit for bit.
Where the kernels in C are not there, or not wanted, `takes` says so, and the sketches themselves are made.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.errors import NotReadable
from torchparams.sketch import native
from torchparams.sketch.codes import Coding, middles_of, values_of
from torchparams.sketch.kernels import KINDS

try:
    from torchparams.sketch import _batch

    _BUILT = True
except ImportError:  # built without a compiler, or by one that lacks integers of 128 bits
    _BUILT = False

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.dtypes import DType
    from torchparams.sketch.kernels import Array

MOST = 1 << 15
"""Values of a tensor that the kernel takes. To count the codes of more costs more than it spares."""

_ASCENDING, _SIGNED, _FLOATING = range(3)


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers of many tensors, a row for each.

    Attributes:
        coding: How the values were counted.
        counts: Values of each tensor.
        reals: float64: mean, std, l1, l2, entropy, the ends of the histogram, then the quantiles.
        integers: int64: zeros, NaN, +Inf, -Inf, distinct, saturated, then the histogram.
        extremes: uint64: minimum, maximum, greatest magnitude, as `coding` has them: see `extreme`.
    """

    coding: Coding
    counts: Array
    reals: Array
    integers: Array
    extremes: Array

    def extreme(self, column: int) -> Array:
        """The minimum (0), the maximum (1), or the greatest magnitude (2); integers where the type is one."""
        bits = self.extremes[:, column]
        kind = self.coding.kind
        if kind[0] == "u" or (kind[0] == "i" and column == 2):
            return bits
        if kind[0] == "i":
            return bits.view(np.int64)
        return bits.view(np.float64)


def takes(dtype: DType, numel: int) -> bool:
    """Whether `measure` takes a tensor of a type and so many elements.

    >>> from torchparams.dtypes import DType
    >>> takes(DType.of("float32"), MOST + 1), takes(DType.of("float4_e2m1fn"), 2)
    (False, False)
    """
    return numel <= MOST and native.uses_c() and _parts(dtype) * numel <= MOST


@functools.cache
def _parts(dtype: DType) -> int:
    """Values in an element; more than are taken where the type is not."""
    try:
        coding = Coding.of(dtype)
    except NotReadable:
        return 2 * MOST
    return coding.parts if _BUILT and (coding.dtype.bits >= 8 or coding.dtype == "bool") else 2 * MOST


def measure(
    dtype: DType, data: Any, starts: Sequence[int], numels: Sequence[int], quantiles: Sequence[float]
) -> Measured:
    """Measure tensors of one type, which `takes` has said yes to.

    Args:
        dtype: Their element type.
        data: A buffer that they lie in; None where `starts` are addresses.
        starts: The offset of each in bytes, or its address. Whoever calls keeps the memory alive.
        numels: The elements of each.
        quantiles: Which to take, from 0 to 1.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> if takes(DType.of("float32"), 2):
    ...     found = measure(DType.of("float32"), np.array([1, 2, 5], np.float32), [0, 8], [2, 1], [])
    ...     assert found.reals[:, 0].tolist() == [1.5, 5.0]
    """
    coding = Coding.of(dtype)
    _, _, reals, integers, extremes, bins = _batch.sizes()
    count = len(numels)
    found = Measured(
        coding,
        np.array(numels, np.uint64) * np.uint64(coding.parts),
        np.empty((count, reals + len(quantiles))),
        np.empty((count, integers), np.int64),
        np.empty((count, extremes), np.uint64),
    )
    assert integers == 6 + bins
    _batch.measure(
        _STATE.memory,
        data,
        np.array(starts, np.uint64),
        found.counts,
        _form(coding),
        _table(coding),
        np.array(quantiles, np.float64),
        found.reals,
        found.integers,
        found.extremes,
    )
    return found


class _State(threading.local):
    """What the kernel counts with, on this thread: zeros from call to call."""

    def __init__(self) -> None:
        self.memory: Array = np.zeros(_batch.sizes()[0] // 8 if _BUILT else 0, np.uint64)


_STATE = _State()


@functools.cache
def _form(coding: Coding) -> tuple[int, int, int, float]:
    """Kind, order of the codes, whether any byte but 0 is true, and the value that counts as saturated."""
    dtype = coding.dtype
    order = _ASCENDING if coding.ascends else _FLOATING if coding.is_float else _SIGNED
    return KINDS.index(coding.kind), order, dtype == "bool", math.nan if coding.largest is None else coding.largest


@functools.cache
def _table(coding: Coding) -> Array | None:
    """The value of every code; None of wide floats, where the kernel makes it from the code."""
    if coding.kind in ("f32", "f64"):
        return None
    if not coding.exact:
        return middles_of(coding.kind)
    table = values_of(coding.dtype)
    if len(table) == 2:  # of bool
        table = np.concatenate([table, np.zeros(254)])
    return table
