"""Tensor classes that keep their values in other tensors: those of torchao, and torch's quantised tensors.

A source describes each parameter by a `Structure`: for a live model from the attributes of the object, for a `.pt` file
from the pickle, for a safetensors file from torchao's metadata.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING

from torchparams.encodings.base import Claim, Refused, quoted, shaped
from torchparams.encodings.packed import Nibbles, Transposed
from torchparams.encodings.scaled import F32, BlockScaled
from torchparams.errors import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.encodings.base import Structure, Tensors
    from torchparams.expressions.base import Expression
    from torchparams.info import ParameterInfo

Geometry = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns of a matrix, and of a block."""

_FLOATS = ("float32", "float16", "bfloat16")
_SIGNED4 = tuple(float(code - 16 * (code > 7)) for code in range(16))


def structured(structure: Structure, tensors: Tensors) -> Claim | Refused:
    """Recognise a parameter of a tensor class."""
    parts = tuple(structure.parts.values())
    function = CLASSES.get(structure.kind)
    if function is None:
        why = PACKED_FOR.get(structure.kind, "which is not supported")
        return Refused(parts, f"{quoted(structure.name)} has the class {shorten(structure.kind)}, {why}")
    missing = [part for part in parts if part not in tensors]
    if missing:
        return Refused(tuple(part for part in parts if part in tensors) or parts, f"{quoted(missing[0])} is missing")
    if _FACTORS in structure.parts:
        factors = quoted(structure.parts[_FACTORS])
        return Refused(parts, f"The layer multiplies its inputs by {factors}, which the weight does not include")
    return function(structure, parts, tensors)


# --- torchao -------------------------------------------------------------------------------------


def _affine(structure: Structure, parts: tuple[str, ...], tensors: Tensors) -> Claim | Refused:
    """Int8Tensor and IntxUnpackedToInt8Tensor: (code - zero point) times scale."""
    codes, scale, zero = (structure.parts.get(part, "") for part in ("qdata", "scale", "zero_point"))
    bits = 8 if structure.kind == "Int8Tensor" else _bits(structure.attributes.get("target_dtype"))
    problem = _misfit(structure, codes, scale, tensors, "int8")
    if not problem and bits is None:
        problem = f"{quoted(structure.name)} has an unknown dtype {quoted(structure.attributes.get('target_dtype'))}"
    if not problem and zero:
        if tensors.infos[zero].numel != tensors.infos[scale].numel:
            problem = f"The zero points {shaped(tensors, zero)} do not match the scales {shaped(tensors, scale)}"
        elif tensors.dtype(zero) != "int8" and (structure.dtype != F32 or tensors.dtype(zero) not in _FLOATS):
            problem = f"The zero points {shaped(tensors, zero)} are not int8"
    if problem:
        return Refused(parts, problem)
    shape = tensors.shape(codes)
    laid = _laid_out(shape, structure.attributes.get("block_size"), tensors.infos[scale].numel)
    if laid is None:
        return Refused(parts, _no_blocks(structure, scale, tensors))
    return _claim(structure, f"int{bits}", shape, laid, tensors, (codes, scale, zero) if zero else (codes, scale))


def _float8(structure: Structure, parts: tuple[str, ...], tensors: Tensors) -> Claim | Refused:
    """Float8Tensor: code times scale."""
    codes, scale = (structure.parts.get(part, "") for part in ("qdata", "scale"))
    problem = _misfit(structure, codes, scale, tensors, "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")
    if problem:
        return Refused(parts, problem)
    shape, given = tensors.shape(codes), tensors.shape(scale)
    sides = [size // max(count, 1) for size, count in zip(shape, given, strict=False)]
    if prod(given) == 1:
        sides = list(shape)
    elif len(given) != len(shape) or [a * b for a, b in zip(sides, given, strict=True)] != list(shape):
        return Refused(parts, _no_blocks(structure, scale, tensors))
    laid = _laid_out(shape, sides, tensors.infos[scale].numel)
    if laid is None:
        return Refused(parts, _no_blocks(structure, scale, tensors))
    return _claim(structure, "fp8", shape, laid, tensors, (codes, scale))


def _int4(structure: Structure, parts: tuple[str, ...], tensors: Tensors) -> Claim | Refused:
    """Int4Tensor: signed code times scale, plus zero point. Scales and zero points are stored inputs first."""
    codes, scale, zero = (structure.parts.get(part, "") for part in ("qdata", "scale", "zero_point"))
    if not (codes and scale and zero):
        return Refused(parts, f"{quoted(structure.name)} has no scale, or no zero point")
    packed, sides = tensors.shape(codes), _sizes(structure.attributes.get("block_size"), len(tensors.shape(codes)))
    if tensors.dtype(codes) not in ("int8", "uint8") or len(packed) not in (2, 3) or 0 in packed:
        return Refused(parts, f"{shaped(tensors, codes)} does not hold rows of bytes")
    *batch, rows, half = packed
    shape = (*batch, rows, 2 * half)
    if structure.shape not in (None, shape):
        return Refused(parts, f"{shaped(tensors, codes)} does not hold codes of {list(structure.shape or ())}")
    if sides is None or any(side != 1 for side in sides[:-1]) or shape[-1] % sides[-1]:
        stated = structure.attributes.get("block_size")
        return Refused(parts, f"{quoted(structure.name)} has blocks of {quoted(stated)} in {list(shape)}")
    wanted = (*batch, shape[-1] // sides[-1], rows)
    for part in (scale, zero):
        if tensors.shape(part) != wanted or tensors.dtype(part) not in _FLOATS:
            return Refused(parts, f"{shaped(tensors, part)} are not floats of shape {list(wanted)}")
    group = sides[-1]
    build = partial(_build_int4, shape=shape, group=group)
    return Claim(structure.name, shape, f"int4-g{group}", parts, build, (codes, scale, zero), None, structure.aliases)


def _build_int4(
    codes: Expression, scale: Expression, zero: Expression, *, shape: tuple[int, ...], group: int
) -> Expression:
    import numpy as np

    from torchparams.expressions.operations import Elementwise

    matrix = (shape[-2], shape[-1])
    nibbles = Nibbles(codes, shape)
    values = BlockScaled(nibbles, Transposed(scale), matrix, (1, group), table=_SIGNED4)
    # Adds the zero point of each block, whatever the code.
    added = BlockScaled(nibbles, Transposed(zero), matrix, (1, group), table=(1.0,) * 16)
    return Elementwise(np.add, values, added)


def _bits(spelling: object) -> int | None:
    """Bits of a dtype `int1` to `int8` in torchao's spelling."""
    digits = str(spelling).removeprefix("int")
    return int(digits) if digits in tuple("12345678") else None


# --- torch's own ---------------------------------------------------------------------------------


def _torch(structure: Structure, parts: tuple[str, ...], tensors: Tensors) -> Claim | Refused:
    """Quantised tensor of torch: (code - zero point) times scale, per tensor or per channel."""
    codes, scale, zero = (structure.parts.get(part, "") for part in ("int_repr", "scale", "zero_point"))
    problem = _misfit(structure, codes, scale, tensors, "int8", "uint8", scales=(*_FLOATS, "float64"))
    if problem:
        return Refused(parts, problem)
    shape, axis = tensors.shape(codes), structure.attributes.get("axis")
    count = tensors.infos[scale].numel
    if not zero or tensors.infos[zero].numel != count:
        return Refused(parts, f"The zero points of {quoted(structure.name)} do not match its scales")
    sides: list[int] = list(shape)
    if axis is not None:
        if type(axis) is not int or not 0 <= axis < len(shape):
            return Refused(parts, f"{quoted(structure.name)} has scales along the dimension {quoted(axis)}")
        sides[axis] = 1
    laid = _laid_out(shape, sides, count)
    if laid is None:
        return Refused(parts, f"{quoted(structure.name)} has scales along dimension {axis}, which is not supported")
    return _claim(structure, structure.kind, shape, laid, tensors, (codes, scale, zero))


def unpacked_biases(claim: Claim, infos: Mapping[str, ParameterInfo]) -> Iterator[Claim]:
    """The bias that a state dict of `torch.ao.quantization` has beside a packed weight, under its own name.

    Args:
        claim: Claim of the weight.
        infos: Infos of the stored tensors.
    """
    module = claim.name.removesuffix("weight")
    stored, name = f"{module}_packed_params._packed_params.1", f"{module}bias"
    if module != claim.name and stored in infos and name not in infos and claim.encoding.startswith("q"):
        yield Claim(name, infos[stored].shape or (), "", (stored,), _itself)


def _itself(x: Expression) -> Expression:
    return x


CLASSES: dict[str, Callable[[Structure, tuple[str, ...], Tensors], Claim | Refused]] = {
    "Int8Tensor": _affine,
    "IntxUnpackedToInt8Tensor": _affine,
    "Float8Tensor": _float8,
    "Int4Tensor": _int4,
    "qint8": _torch,
    "quint8": _torch,
}
"""Supported classes of torchao, and dtypes of torch's quantised tensors."""


PACKED_FOR = {
    "Int4OpaqueTensor": "packed in an order that depends on the CPU that made it",
    "Int4TilePackedTo4dTensor": "packed for the tensor cores of a GPU",
    "Int4PreshuffledTensor": "packed for one kernel of a GPU",
    "Int4PlainInt32Tensor": "packed in an order that depends on the device that made it",
}
"""Classes of torchao whose order of codes only their own kernels know, and the reason."""

_FACTORS = "act_pre_scale"
"""Part of torchao's classes with a factor for each input, as in AWQ and SmoothQuant."""


# --- common checks -------------------------------------------------------------------------------


def _misfit(
    structure: Structure, codes: str, scale: str, tensors: Tensors, *dtypes: str, scales: tuple[str, ...] = _FLOATS
) -> str:
    """Reason why codes and scales do not match a class; empty if they do."""
    if not codes or not scale:
        return f"{quoted(structure.name)} has no codes, or no scale"
    shape = tensors.shape(codes)
    if tensors.dtype(codes) not in dtypes or not shape or 0 in shape:
        return f"{shaped(tensors, codes)} does not hold codes of {shorten(structure.kind)}"
    if structure.shape not in (None, shape):
        return f"{shaped(tensors, codes)} does not hold the codes of {list(structure.shape or ())}"
    if tensors.dtype(scale) not in scales:
        return f"The scales {shaped(tensors, scale)} are not floating-point"
    if structure.dtype is None or structure.dtype not in _FLOATS:
        return f"{quoted(structure.name)} has no dtype for its values"
    return ""


def _no_blocks(structure: Structure, scale: str, tensors: Tensors) -> str:
    stated = structure.attributes.get("block_size")
    return f"The scales {shaped(tensors, scale)} of {quoted(structure.name)} do not match blocks of {quoted(stated)}"


def _sizes(value: object, count: int) -> list[int] | None:
    """List of `count` positive sizes, or None."""
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    return list(value) if all(type(side) is int and side > 0 for side in value) else None


def _laid_out(shape: Sequence[int], stated: object, scales: int) -> Geometry | None:
    """View a tensor with one scale per block as matrices; None if that is not possible.

    Args:
        shape: Shape of the tensor.
        stated: Sides of a block.
        scales: Number of scales.

    >>> _laid_out((4, 6), [1, 3], 8), _laid_out((4, 6), [4, 6], 1), _laid_out((2, 4, 6), [1, 2, 3], 8)
    (((4, 6), (1, 3)), ((1, 24), (1, 24)), ((4, 6), (2, 3)))
    """
    sides = _sizes(stated, len(shape))
    if sides is None or any(size % side for size, side in zip(shape, sides, strict=True)):
        return None
    if scales != prod(size // side for size, side in zip(shape, sides, strict=True)):
        return None
    first = next((dim for dim, side in enumerate(sides) if side > 1), len(sides) - 1)
    if sides[first + 1 :] == list(shape[first + 1 :]):  # a block is contiguous
        rows, columns = prod(shape[:first]), prod(shape[first:])
        return (rows, columns), (1, prod(sides[first:]))
    if first == len(sides) - 2:
        return (shape[-2], shape[-1]), (sides[-2], sides[-1])
    return None


def _claim(
    structure: Structure,
    family: str,
    shape: tuple[int, ...],
    laid: Geometry,
    tensors: Tensors,
    operands: tuple[str, ...],
) -> Claim:
    high, wide = laid[1]
    if high > 1:
        called = f"block{high}x{wide}"
    elif prod(shape) == wide:
        called = "tensor"
    else:
        called = "channel" if prod(shape) == shape[0] * wide else f"g{wide}"
    assert structure.dtype is not None
    build = partial(_build, matrix=laid[0], block=laid[1], dtype=structure.dtype)
    recorded = None if structure.kind in ("qint8", "quint8") else structure.dtype
    return Claim(
        structure.name, shape, f"{family}-{called}", tuple(structure.parts.values()), build, operands, recorded,
        structure.aliases,
    )  # fmt: skip


def _build(
    codes: Expression,
    scale: Expression,
    zero: Expression | None = None,
    *,
    matrix: tuple[int, int],
    block: tuple[int, int],
    dtype: DType,
) -> Expression:
    return BlockScaled(codes, scale, matrix, block, zeros=zero, dtype=dtype)
