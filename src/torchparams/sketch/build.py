"""Build sketches from blocks of elements."""

from __future__ import annotations

from typing import Any

from torchparams.sketch.counter import Counter
from torchparams.sketch.sketch import Sketch


class Builder:
    """Builds a sketch from blocks of elements of one dtype.

    A builder belongs to one thread. Several builders may each process a part of a tensor: the sum of their sketches is
    the sketch of the tensor.

    Args:
        dtype: Dtype of the elements.
        packed: Whether sub-byte elements are packed, as in files, instead of one per byte.

    Raises:
        NotReadable: The dtype is packed or quantised, so its bits are not numbers.

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
            data: Whole elements; for packed 6-bit elements, whole groups of three bytes, except in the last block.
            numel: Number of elements; only needed if the last byte of packed elements is not full.
        """
        self._counter.update(data, numel)

    def finish(self) -> Sketch:
        """Return the sketch. The builder cannot be used again."""
        return Sketch(self._counter.dtype, self._counter.finish())
