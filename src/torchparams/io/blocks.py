"""A block: elements of a tensor in a row, as bytes."""

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
        dtype: The element type.
        start, stop: Places of the first element, and of the one after the last.
        buffer: Their bytes, one-dimensional, contiguous, little-endian. They are valid only during the call that they
            are given to: the memory is used again. Do not write to them.
        packed: Whether elements of less than a byte are packed, as in files; else each has a byte.
    """

    dtype: DType
    start: int
    stop: int
    buffer: memoryview
    packed: bool

    @property
    def numel(self) -> int:
        """Count of elements."""
        return self.stop - self.start

    @property
    def data(self) -> Array:
        """The bytes as a uint8 array; work that takes any buffer does without numpy, and so without its import."""
        import numpy as np

        return np.frombuffer(self.buffer, np.uint8)

    def values(self) -> Array:
        """The elements as an array of their own type, shape (numel,): a view, unless they have to be unpacked.

        Raises:
            NotReadable: Neither numpy nor ml_dtypes has the type.
        """
        if self.packed:
            from torchparams.io.packing import unpack

            return unpack(self.data, self.dtype, (self.numel,))
        view: Array = self.data.view(self.dtype.numpy)
        return view
