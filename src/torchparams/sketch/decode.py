"""Decode quantised weights: unpack codes from words, and turn codes into values.

Each function uses the C kernel of `_decode.c` if the package was built with a compiler and the environment variable
`TORCHPARAMS_KERNELS` is not `numpy`. `numpy_scaled` and `numpy_unpack` are the definitions.
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
    """Whether the C kernels are in use."""
    return BUILT and native.WANTED != "numpy"


PIECE = 1 << 16
"""Elements per step of the definition, to limit its intermediate arrays."""

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
    """Values of a matrix of codes: `(table[code] - zero) * scale`, with each step rounded to float32.

    Args:
        codes: Elements `[start, start + n)` of the matrix in C order, uint8.
        table: Value of each of the 256 codes, float32.
        scales: Scale of each block, float32, two-dimensional.
        zeros: Zero point of each block, float32; None for zero.
        index: Block of each column, int32; None to derive it from the width of the blocks.
        columns: Number of columns of the matrix.
        block: Height and width of a block; blocks at the end may be smaller.
        start: Index of the first code.
        out: Array for the values, float32.

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
    """The array, or a contiguous and aligned copy."""
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
    """NumPy definition of `scaled`."""
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
    """Unpack codes from 32-bit words, lowest bits first; a code may span two words.

    Args:
        words: Words, uint32, two-dimensional.
        bits: Bits per code, 1 to 8.
        count: Number of codes along the packed axis.
        axis: Axis along which codes are packed.
        out: Array for the codes, uint8, with the shape of the words, except `count` along that axis.
        order: Code held by each field of a word; None for consecutive codes.

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
    """Memory of an array that is contiguous in C or Fortran order."""
    return (out if out.flags.c_contiguous else out.T).reshape(-1)


def numpy_unpack(words: Array, bits: int, count: int, axis: int, out: Array, order: bytes | None = None) -> None:
    """NumPy definition of `unpack`."""
    fields = 32 // bits
    for code in range(count):
        if order is not None:  # the field of the word that holds the code
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


def narrow(values: Array) -> tuple[Array, tuple[int, int, int]] | None:
    """Cast float32 to bfloat16, and count overflows, underflows and changes; None without the kernel in C.

    The definition is `expressions.casts.cast_counting`, which calls this.

    Args:
        values: One-dimensional, contiguous.
    """
    if not uses_c():
        return None
    import ml_dtypes

    out = np.empty(len(values), np.uint16)
    lost = _decode.narrow(values, out)
    return out.view(ml_dtypes.bfloat16), lost
