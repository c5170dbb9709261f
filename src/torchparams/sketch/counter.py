"""From the bytes of a tensor to its counts: packed elements, spare bits, tallies that are used again."""

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
    """Counts the elements of one type, block by block; a `Builder` without the sketch.

    Args:
        dtype: The element type.
        packed: Whether elements of less than a byte come packed, as in files; else one in a byte.

    Raises:
        NotReadable: The type is packed or quantised, not of numbers.

    >>> counter = Counter("bool")
    >>> counter.update(bytes([1, 0, 1]))
    >>> counter.finish().counts.tolist()
    [1, 2]
    """

    def __init__(self, dtype: object, *, packed: bool = False) -> None:
        self.dtype = DType.of(dtype)
        self._coding = Coding.of(self.dtype)
        self._bits = self._coding.dtype.bits if packed and self._coding.dtype.bits < 8 else 8
        self._lone: list[int] = []  # packed elements whose byte is not full
        self._tally: Tally | None = borrow_tally(self._coding.kind)

    def update(self, data: Any, numel: int | None = None) -> None:
        """Count the elements of a contiguous little-endian buffer.

        Args:
            data: Whole elements; of packed ones of 6 bits, whole groups of three bytes unless it is the last block.
            numel: How many elements; needed only where the last byte of packed ones is not full.
        """
        if self._tally is None:
            raise RuntimeError("this counter is finished")
        if isinstance(data, np.ndarray):
            data = data.reshape(-1).view(np.uint8)  # the types of ml_dtypes are no buffers
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
        """What was counted, in the codes of `Coding.of(dtype)`. The counter cannot be used again."""
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
            counted = Counted(*group_counts((codes != 0).astype(np.uint32), counts))  # any byte but 0 is true
        elif self._coding.dtype.bits < 8:
            counted = Counted(*group_counts(codes & np.uint32(self._coding.size - 1), counts))
        return counted
