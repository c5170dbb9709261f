"""Compute the statistics of many small tensors of one dtype in a single kernel call, as columns.

`Sketch` defines the results: every number here equals that of the tensor's sketch, bit for bit. Without the C kernels,
or if they are disabled, `takes` is False, and callers make sketches instead.
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
except ImportError:  # built without a compiler, or without 128-bit integers
    _BUILT = False

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.dtypes import DType
    from torchparams.sketch.kernels import Array

MOST = 1 << 15
"""Maximum number of values per tensor; for larger ones, a sketch is as fast."""

_ASCENDING, _SIGNED, _FLOATING = range(3)


@dataclass(frozen=True, slots=True)
class Measured:
    """Statistics of many tensors, one row each.

    Attributes:
        coding: Coding of the values.
        counts: Number of values of each tensor.
        reals: float64: mean, std, l1, l2, entropy, ends of the histogram, then the quantiles.
        integers: int64: zeros, NaN, +Inf, -Inf, distinct, saturated, then the histogram.
        extremes: uint64 bits of minimum, maximum and greatest magnitude, by `coding`; see `extreme`.
    """

    coding: Coding
    counts: Array
    reals: Array
    integers: Array
    extremes: Array

    def extreme(self, column: int) -> Array:
        """Minimum (0), maximum (1) or greatest magnitude (2); as integers for integer dtypes."""
        bits = self.extremes[:, column]
        kind = self.coding.kind
        if kind[0] == "u" or (kind[0] == "i" and column == 2):
            return bits
        if kind[0] == "i":
            return bits.view(np.int64)
        return bits.view(np.float64)


def takes(dtype: DType, numel: int) -> bool:
    """Whether `measure` supports a tensor of this dtype and size.

    >>> from torchparams.dtypes import DType
    >>> takes(DType.of("float32"), MOST + 1), takes(DType.of("float4_e2m1fn"), 2)
    (False, False)
    """
    return numel <= MOST and native.uses_c() and _parts(dtype) * numel <= MOST


@functools.cache
def _parts(dtype: DType) -> int:
    """Values per element; more than `MOST` for unsupported dtypes."""
    try:
        coding = Coding.of(dtype)
    except NotReadable:
        return 2 * MOST
    return coding.parts if _BUILT and (coding.dtype.bits >= 8 or coding.dtype == "bool") else 2 * MOST


def measure(
    dtype: DType, data: Any, starts: Sequence[int], numels: Sequence[int], quantiles: Sequence[float]
) -> Measured:
    """Measure tensors of one dtype, for which `takes` is True.

    Args:
        dtype: Dtype of the tensors.
        data: Buffer that holds them; None if `starts` are addresses.
        starts: Byte offset or address of each tensor. The caller keeps the memory alive.
        numels: Number of elements of each tensor.
        quantiles: Quantiles to compute, from 0 to 1.

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
    """Counters of the kernel for this thread; all zeros between calls."""

    def __init__(self) -> None:
        self.memory: Array = np.zeros(_batch.sizes()[0] // 8 if _BUILT else 0, np.uint64)


_STATE = _State()


@functools.cache
def _form(coding: Coding) -> tuple[int, int, int, float]:
    """Kind, order of the codes, whether any nonzero byte is true, and the saturated value."""
    dtype = coding.dtype
    order = _ASCENDING if coding.ascends else _FLOATING if coding.is_float else _SIGNED
    return KINDS.index(coding.kind), order, dtype == "bool", math.nan if coding.largest is None else coding.largest


@functools.cache
def _table(coding: Coding) -> Array | None:
    """Value of every code; None for wide floats, where the kernel computes it."""
    if coding.kind in ("f32", "f64"):
        return None
    if not coding.exact:
        return middles_of(coding.kind)
    table = values_of(coding.dtype)
    if len(table) == 2:  # of bool
        table = np.concatenate([table, np.zeros(254)])
    return table
