"""Four-bit floats: MXFP4 (blocks of 32 with a power of two each) and NVFP4 (blocks of 16 with a float8 scale each).

gpt-oss stores MXFP4 as `X_blocks` and `X_scales`; ModelOpt stores NVFP4 as `weight`, `weight_scale` and
`weight_scale_2`. The lower half of a byte comes first.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING

from torchparams.dtypes import DType
from torchparams.encodings.base import Claim, Refused, quoted, shaped
from torchparams.encodings.packed import Bytes, Nibbles, Rescaled, Sixes, Transposed
from torchparams.encodings.scaled import FP4, FP6, BlockScaled

if TYPE_CHECKING:
    from torchparams.encodings.base import Tensors
    from torchparams.expressions.base import Expression

POWERS = DType.of("float8_e8m0fnu")
_GROUP = {"mxfp4": 32, "nvfp4": 16}


def claim(codes: str, tensors: Tensors) -> Claim | Refused | None:
    """Recognise MXFP4 as stored by gpt-oss, or NVFP4 as stored by ModelOpt."""
    if tensors.dtype(codes) != "uint8":
        return None
    if codes.endswith("_blocks") and codes.removesuffix("blocks") + "scales" in tensors:
        return _gpt_oss(codes, tensors)
    if codes + "_scale_2" in tensors:
        scale, whole = codes + "_scale", codes + "_scale_2"
        if scale not in tensors:
            return Refused((codes, whole), f"{quoted(scale)} is missing")
        return nvfp4(codes, codes, scale, whole, tensors, divide=False)
    return None


def nvfp4(name: str, codes: str, scale: str, whole: str, tensors: Tensors, *, divide: bool) -> Claim | Refused:
    """Claim for NVFP4: codes, a float8 scale for each 16 elements of a row, and a global scale.

    Args:
        name: Name of the parameter.
        codes, scale, whole: Names of the stored tensors.
        tensors: All stored tensors.
        divide: Whether to divide by the global scale instead of multiplying.
    """
    parts = (codes, scale, whole)
    problem = _misfit(codes, scale, tensors, "nvfp4")
    if problem:
        return Refused(parts, problem)
    if tensors.dtype(scale) != "float8_e4m3fn":
        return Refused(parts, f"The scales {shaped(tensors, scale)} are not float8_e4m3fn")
    if prod(tensors.shape(whole)) != 1 or tensors.dtype(whole) != "float32":
        return Refused(parts, f"{shaped(tensors, whole)} is not one float32")
    *batch, rows, half = tensors.shape(codes)
    build = partial(_nvfp4, shape=(*batch, rows, 2 * half), divide=divide)
    return Claim(name, (*batch, rows, 2 * half), "nvfp4", parts, build)


def mxfp4(name: str, codes: str, scale: str, tensors: Tensors) -> Claim | Refused:
    """Claim for MXFP4 or MXFP6: codes, and a power of two for each 32 elements of a row."""
    parts = (codes, scale)
    shape, given = tensors.shape(codes), tensors.shape(scale)
    if shape[:-1] == given[:-1] and shape[-1] == 24 * given[-1] and len(shape) > 1 and 0 not in shape:
        kind, shape = "mxfp6", (*shape[:-1], shape[-1] // 3 * 4)  # of six bits, E2M3
    else:
        kind, shape = "mxfp4", (*shape[:-1], 2 * shape[-1])
        problem = _misfit(codes, scale, tensors, "mxfp4")
        if problem:
            return Refused(parts, problem)
    if tensors.dtype(scale) not in ("uint8", POWERS):
        return Refused(parts, f"The scales {shaped(tensors, scale)} are not powers of two")
    return Claim(name, shape, kind, parts, partial(_mx, kind=kind, shape=shape))


def _misfit(codes: str, scale: str, tensors: Tensors, kind: str) -> str:
    """Reason why scales do not match the codes; empty if they do."""
    shape, given = tensors.shape(codes), tensors.shape(scale)
    if tensors.dtype(codes) != "uint8" or len(shape) < 2 or 0 in shape:
        return f"{shaped(tensors, codes)} does not hold rows of bytes"
    if given != (*shape[:-1], 2 * shape[-1] // _GROUP[kind]) or 2 * shape[-1] % _GROUP[kind]:
        return (
            f"The scales {shaped(tensors, scale)} are not one for each {_GROUP[kind]} of {[*shape[:-1], 2 * shape[-1]]}"
        )
    return ""


def _nvfp4(
    codes: Expression, scale: Expression, whole: Expression, *, shape: tuple[int, ...], divide: bool
) -> Expression:
    matrix = (prod(shape[:-1]), shape[-1])
    scales = Rescaled(scale, whole, divide=divide)
    return BlockScaled(Nibbles(codes, shape), scales, matrix, (1, _GROUP["nvfp4"]), table=FP4)


def powers(scale: Expression) -> Expression:
    """Scales that are stored as the exponents of two."""
    return scale if scale.dtype == POWERS else Bytes(scale, POWERS, scale.shape)


def _mx(codes: Expression, scale: Expression, *, kind: str, shape: tuple[int, ...]) -> Expression:
    matrix = (prod(shape[:-1]), shape[-1])
    unpacked, table = (Nibbles(codes, shape), FP4) if kind == "mxfp4" else (Sixes(codes, shape), FP6)
    return BlockScaled(unpacked, powers(scale), matrix, (1, 32), table=table)


def _gpt_oss(codes: str, tensors: Tensors) -> Claim | Refused:
    scale = codes.removesuffix("blocks") + "scales"
    parts = (codes, scale)
    shape = tensors.shape(codes)
    if len(shape) != 4 or 0 in shape or shape[-1] != 16:
        return Refused(parts, f"{shaped(tensors, codes)} is not [experts, outputs, groups, 16]")
    if tensors.shape(scale) != shape[:-1] or tensors.dtype(scale) != "uint8":
        return Refused(parts, f"The scales {shaped(tensors, scale)} are not one for each group of {list(shape)}")
    experts, outputs, groups, _ = shape
    inputs = 32 * groups
    build = partial(_turned, shape=(experts, outputs, inputs))
    return Claim(codes.removesuffix("_blocks"), (experts, inputs, outputs), "mxfp4", parts, build)


def _turned(codes: Expression, scale: Expression, *, shape: tuple[int, int, int]) -> Expression:
    """Experts stored with inputs before outputs, as the layer multiplies."""
    _, outputs, inputs = shape
    turned = Transposed(Nibbles(codes, shape))
    stored = BlockScaled(Nibbles(codes, shape), powers(scale), (outputs, inputs), (1, 32), table=FP4)
    return BlockScaled(turned, Transposed(powers(scale)), (inputs, outputs), (32, 1), table=FP4, stored=stored)
