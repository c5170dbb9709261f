"""Count the values of a tensor from its bytes: packed elements, unused bits, reusable tallies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.dtypes import DType
from torchparams.sketch.blocks import unpack6
from torchparams.sketch.codes import Coding
from torchparams.sketch.kernels import Counted, borrow_tally, group_counts, return_tally

if TYPE_CHECKING:
    from torchparams.sketch.kernels import Tally


class Counter:
    """Counts the elements of one dtype, block by block; the core of a `Builder`.

    Args:
        dtype: Dtype of the elements.
        packed: Whether sub-byte elements are packed, as in files, instead of one per byte.

    Raises:
        NotReadable: The dtype is packed or quantised, so its bits are not numbers.

    >>> counter = Counter("bool")
    >>> counter.update(bytes([1, 0, 1]))
    >>> counter.finish().counts.tolist()
    [1, 2]
    """

    def __init__(self, dtype: object, *, packed: bool = False) -> None:
        self.dtype = DType.of(dtype)
        self._coding = Coding.of(self.dtype)
        self._bits = self._coding.dtype.bits if packed and self._coding.dtype.bits < 8 else 8
        self._lone: list[int] = []  # packed elements of a partial byte
        self._tally: Tally | None = borrow_tally(self._coding.kind)

    def update(self, data: Any, numel: int | None = None) -> None:
        """Count the elements of a contiguous little-endian buffer.

        Args:
            data: Whole elements; for packed 6-bit elements, whole groups of three bytes, except in the last block.
            numel: Number of elements; only needed if the last byte of packed elements is not full.
        """
        if self._tally is None:
            raise RuntimeError("this counter is finished")
        if isinstance(data, np.ndarray):
            data = data.reshape(-1).view(np.uint8)  # arrays of ml_dtypes do not support the buffer protocol
        if self._bits == 8:
            self._tally.update(data)
            return
        whole = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)
        count = len(whole) * 8 // self._bits if numel is None else numel
        if self._bits == 6:
            self._tally.update(unpack6(whole)[:count])
        else:
            self._tally.update(whole[: count // 2])
            if count % 2:
                self._lone.append(int(whole[count // 2]) & 15)

    def finish(self) -> Counted:
        """Return the counts, in the codes of `Coding.of(dtype)`. The counter cannot be used again."""
        if self._tally is None:
            raise RuntimeError("this counter is finished")
        counted = self._tally.finish()
        return_tally(self._tally)
        self._tally = None
        codes, counts = counted.codes, counted.counts
        if self._bits == 4:
            lone = np.array(self._lone, np.uint32)
            codes = np.concatenate([codes & 15, codes >> 4, lone])
            counts = np.concatenate([counts, counts, np.ones(len(lone), np.uint64)])
            counted = Counted(*group_counts(codes, counts))
        elif self._coding.dtype == "bool":
            counted = Counted(*group_counts((codes != 0).astype(np.uint32), counts))  # any nonzero byte is true
        elif self._coding.dtype.bits < 8:
            counted = Counted(*group_counts(codes & np.uint32(self._coding.size - 1), counts))
        return counted
