"""Sketches of elements that come block by block."""

from __future__ import annotations

from typing import Any

from torchparams.sketch.counter import Counter
from torchparams.sketch.sketch import Sketch


class Builder:
    """A sketch in the making: takes the elements of one type block by block.

    It belongs to one thread. Several of them over parts of one tensor, and their sketches added, are
    the sketch of the tensor.

    Args:
        dtype: The element type.
        packed: Whether elements of less than a byte come packed, as in files; else one in a byte.

    Raises:
        NotReadable: The type is packed or quantised, not of numbers.

    >>> import numpy as np
    >>> builder = Builder("float16")
    >>> builder.update(np.array([1, 2], np.float16))
    >>> builder.update(np.array([6], np.float16))
    >>> builder.finish().mean
    3.0
    """

    def __init__(self, dtype: object, *, packed: bool = False) -> None:
        self._counter = Counter(dtype, packed=packed)

    def update(self, data: Any, numel: int | None = None) -> None:
        """Count the elements of a contiguous little-endian buffer.

        Args:
            data: Whole elements; of packed ones of 6 bits, whole groups of three bytes unless it is the last block.
            numel: How many elements; needed only where the last byte of packed ones is not full.
        """
        self._counter.update(data, numel)

    def finish(self) -> Sketch:
        """The sketch of all that came. The builder cannot be used again."""
        return Sketch(self._counter.dtype, self._counter.finish())
