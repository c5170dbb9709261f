"""Split arrays and packed bytes into contiguous blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.sketch.kernels import Array

BLOCK_BYTES = 1 << 20
"""Bytes per block: small enough to stay in the L2 cache."""


def byte_blocks(array: Array, nbytes: int = BLOCK_BYTES) -> Iterator[Array]:
    """Elements of an array in C order, as one-dimensional uint8 blocks of whole elements.

    A block is a view if possible; other arrays are copied block by block along their leading dimensions. Bytes in the
    other byte order are swapped.

    Args:
        array: Array of any layout.
        nbytes: Maximum bytes per block; at least one element.

    >>> a = np.arange(6, dtype=np.uint8).reshape(2, 3)
    >>> [block.tolist() for block in byte_blocks(a.T, 4)]
    [[0, 3, 1, 4], [2, 5]]
    """
    if array.size == 0:
        return
    if array.flags.c_contiguous and array.dtype.isnative:
        flat = array.reshape(-1).view(np.uint8)
        step = max(nbytes // array.itemsize, 1) * array.itemsize
        for start in range(0, len(flat), step):
            yield flat[start : start + step]
    elif array.nbytes <= nbytes or array.ndim == 0:
        yield np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1).view(np.uint8)
    else:
        row = array.nbytes // array.shape[0]
        step = max(nbytes // row, 1)
        for start in range(0, array.shape[0], step):
            yield from byte_blocks(array[start : start + step] if row <= nbytes else array[start], nbytes)


def unpack6(data: Array) -> Array:
    """Unpack 6-bit elements, four in three bytes with the first in the lowest bits, to one per byte.

    >>> unpack6(np.array([0x41, 0x20, 0x0C], np.uint8)).tolist()
    [1, 1, 2, 3]
    """
    whole = np.concatenate([data, np.zeros(-len(data) % 3, np.uint8)]).reshape(-1, 3).astype(np.uint32)
    groups = whole[:, 0] | whole[:, 1] << np.uint32(8) | whole[:, 2] << np.uint32(16)
    codes: Array = groups[:, None] >> np.arange(0, 24, 6, dtype=np.uint32) & np.uint32(63)
    return codes.astype(np.uint8).reshape(-1)
