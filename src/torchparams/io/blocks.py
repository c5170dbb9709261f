"""Blocks: contiguous elements of a tensor, as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from torchparams.dtypes import DType

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Block:
    """Elements `[start, stop)` of a tensor, in C order.

    Attributes:
        dtype: Dtype of the elements.
        start, stop: Range of elements.
        buffer: Bytes of the elements: one-dimensional, contiguous, little-endian. Valid only during the call that
            receives the block, because the memory is reused. Do not write to it.
        packed: Whether sub-byte elements are packed, as in files, instead of one per byte.
    """

    dtype: DType
    start: int
    stop: int
    buffer: memoryview
    packed: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def data(self) -> Array:
        """Bytes as a uint8 array. Code that accepts any buffer should use `buffer`, which needs no NumPy."""
        import numpy as np

        return np.frombuffer(self.buffer, np.uint8)

    def values(self) -> Array:
        """Elements as an array of their dtype, shape (numel,): a view, unless they must be unpacked.

        Raises:
            NotReadable: NumPy and ml_dtypes lack the dtype.
        """
        if self.packed:
            from torchparams.io.packing import unpack

            return unpack(self.data, self.dtype, (self.numel,))
        view: Array = self.data.view(self.dtype.numpy)
        return view
