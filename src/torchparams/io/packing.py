"""Pack and unpack sub-byte elements; strides of contiguous tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from torchparams.dtypes import DType

    Array = np.ndarray[Any, Any]


def contiguous(shape: Sequence[int], fortran: bool = False) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements, as in torch: a size of 0 counts as 1.

    >>> contiguous((2, 3, 4)), contiguous((2, 3, 4), fortran=True), contiguous((2, 0, 4))
    ((12, 4, 1), (1, 2, 6), (4, 4, 1))
    """
    strides, step = [], 1
    for size in shape if fortran else reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(strides if fortran else reversed(strides))


def unpack(packed: Array, dtype: DType, shape: tuple[int, ...]) -> Array:
    """Unpack 4-bit or 6-bit elements to one per byte, the layout of ml_dtypes.

    Elements start at the lowest bit of the first byte. So the first of two 4-bit elements is the low half of its byte,
    as in the OCP Microscaling formats, ONNX and `torch.float4_e2m1fn_x2`; four 6-bit elements take three bytes. No
    other order of 6-bit elements is in use, but no standard defines it.

    Args:
        packed: Packed bytes as uint8, for at least as many elements as `shape` has.
        dtype: Dtype of the elements.
        shape: Shape of the array.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> unpack(np.array([0x21], np.uint8), DType.of("F4"), (2,)).astype(np.float32)
    array([0.5, 1. ], dtype=float32)
    """
    import numpy as np

    numel = 1
    for size in shape:
        numel *= size
    nbytes = dtype.nbytes(numel)
    groups = -(-nbytes // 3) if dtype.bits == 6 else nbytes
    if dtype.bits == 6 and nbytes % 3:
        packed = np.concatenate([packed[:nbytes], np.zeros(groups * 3 - nbytes, np.uint8)])
    if dtype.bits == 4:
        codes = np.empty((groups, 2), np.uint8)
        np.bitwise_and(packed[:nbytes], 0xF, out=codes[:, 0])
        np.right_shift(packed[:nbytes], 4, out=codes[:, 1])
    else:
        a, b, c = packed[: groups * 3].reshape(groups, 3).T
        codes = np.empty((groups, 4), np.uint8)
        np.bitwise_and(a, 0x3F, out=codes[:, 0])
        np.bitwise_or(a >> 6, (b & 0xF) << 2, out=codes[:, 1])
        np.bitwise_or(b >> 4, (c & 0x3) << 4, out=codes[:, 2])
        np.right_shift(c, 2, out=codes[:, 3])
    return codes.reshape(-1)[:numel].reshape(shape).view(dtype.numpy)


def pack(array: Array, dtype: DType) -> Array:
    """Pack elements in C order as uint8, the inverse of `unpack`; the last byte is padded with zeros.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> pack(np.array([0.5, 1.0]).astype(DType.of("F4").numpy), DType.of("F4")).tolist()
    [33]
    """
    import numpy as np

    per, into = (2, 1) if dtype.bits == 4 else (4, 3)
    codes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    nbytes = dtype.nbytes(codes.size)
    short = -codes.size % per
    if short:
        codes = np.concatenate([codes, np.zeros(short, np.uint8)])
    groups = codes.reshape(-1, per)
    packed = np.empty((len(groups), into), np.uint8)
    if dtype.bits == 4:
        packed[:, 0] = groups[:, 0] & 0xF | groups[:, 1] << 4
    else:
        a, b, c, d = (groups & 0x3F).T
        packed[:, 0] = a | b << 6
        packed[:, 1] = b >> 2 | c << 4
        packed[:, 2] = c >> 4 | d << 2
    return packed.reshape(-1)[:nbytes]
