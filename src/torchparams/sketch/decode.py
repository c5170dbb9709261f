"""Codes of quantised weights to values, and codes of a few bits out of packed words: in NumPy, and the same in C.

Each function picks the kernel of `_decode.c` where the package was built with a compiler, unless the environment
variable `TORCHPARAMS_KERNELS` is `numpy`; `numpy_scaled` and `numpy_unpack` are the definitions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from torchparams.sketch import native

try:
    from torchparams.sketch import _decode

    BUILT = True
except ImportError:  # built without a compiler
    BUILT = False

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"


def uses_c() -> bool:
    """Whether the kernels in use are those in C."""
    return BUILT and native.WANTED != "numpy"


PIECE = 1 << 16
"""Elements that the definition works on at once: each takes a few places and numbers on the way."""

Blocks: TypeAlias = "tuple[int, int]"


def scaled(
    codes: Array,
    table: Array,
    scales: Array,
    zeros: Array | None,
    index: Array | None,
    columns: int,
    block: Blocks,
    start: int,
    out: Array,
) -> None:
    """Values of a matrix of codes: `(table[code] - zero) * scale`, each step rounded to float32.

    Args:
        codes: Elements `[start, start + n)` of the matrix in C order, uint8.
        table: The value of each of the 256 codes, float32.
        scales: A float32 for each block, two-dimensional.
        zeros: A float32 for each block; None for zero.
        index: The block of each column, int32, which takes the place of the blocks' width; None where it decides.
        columns: Columns of the matrix.
        block: Height and width of a block; those at the end may be smaller.
        start: Place of the first code.
        out: Where the values go, float32.

    >>> out = np.empty(3, np.float32)
    >>> codes, table = np.array([1, 2, 3], np.uint8), np.arange(256, dtype=np.float32)
    >>> scaled(codes, table, np.array([[10.0, 0.5]], np.float32), None, None, 4, (1, 2), 0, out)
    >>> out.tolist()
    [10.0, 20.0, 1.5]
    """
    if not uses_c():
        numpy_scaled(codes, table, scales, zeros, index, columns, block, start, out)
        return
    high, wide = block
    _decode.scaled(
        codes, table, _plain(scales), _plain(zeros), _plain(index), columns, high, wide, scales.shape[1], start, out
    )


def _plain(array: Array | None) -> Array | None:
    """The array, or a copy of it that is contiguous and aligned."""
    return array if array is None or (array.flags.c_contiguous and array.flags.aligned) else np.array(array, order="C")


def numpy_scaled(
    codes: Array,
    table: Array,
    scales: Array,
    zeros: Array | None,
    index: Array | None,
    columns: int,
    block: Blocks,
    start: int,
    out: Array,
) -> None:
    """The definition of `scaled`."""
    for at in range(0, len(codes), PIECE):
        part = codes[at : at + PIECE]
        row, column = np.divmod(np.arange(start + at, start + at + len(part)), columns)
        row //= block[0]
        column = column // block[1] if index is None else index[column]
        with np.errstate(all="ignore"):
            values = table[part]
            if zeros is not None:
                values = values - zeros[row, column]
            np.multiply(values, scales[row, column], out=out[at : at + len(part)])


def unpack(words: Array, bits: int, count: int, axis: int, out: Array, order: bytes | None = None) -> None:
    """Codes of a few bits out of words of 32, the lowest bits first; codes may lie across two words.

    Args:
        words: The words, uint32, two-dimensional.
        bits: Bits of a code, 1 to 8.
        count: Codes along the axis that is packed.
        axis: The axis along which codes follow each other within words.
        out: Where they go, uint8, of the shape of the words but for that axis, which has `count`.
        order: Which code of a word each field of it holds; None for one after the other.

    >>> out = np.empty((1, 4), np.uint8)
    >>> unpack(np.array([[0x4321]], np.uint32), 4, 4, 1, out)
    >>> out.tolist()
    [[1, 2, 3, 4]]
    """
    if not uses_c():
        numpy_unpack(words, bits, count, axis, out, order)
        return
    steps = [[stride // array.itemsize for stride in array.strides] for array in (words, out)]
    (word_step, lane_step), (code_out, lane_out) = (pair if axis == 0 else pair[::-1] for pair in steps)
    fields = bytes(range(32 // bits)) if order is None else order
    _decode.unpack(
        words, bits, fields, count, words.shape[1 - axis], word_step, lane_step, code_out, lane_out, _flat(out)
    )


def _flat(out: Array) -> Array:
    """The memory of an array that is contiguous in one of the two orders."""
    return (out if out.flags.c_contiguous else out.T).reshape(-1)


def numpy_unpack(words: Array, bits: int, count: int, axis: int, out: Array, order: bytes | None = None) -> None:
    """The definition of `unpack`."""
    fields = 32 // bits
    for code in range(count):
        if order is not None:  # the field of its word that holds it
            field = code // fields * fields + order.index(code % fields)
        else:
            field = code
        number, shift = divmod(field * bits, 32)
        word = words.take(number, axis).astype(np.uint64)
        if shift + bits > 32:
            word |= words.take(number + 1, axis).astype(np.uint64) << np.uint64(32)
        found = (word >> np.uint64(shift) & np.uint64((1 << bits) - 1)).astype(np.uint8)
        if axis == 0:
            out[code] = found
        else:
            out[:, code] = found
