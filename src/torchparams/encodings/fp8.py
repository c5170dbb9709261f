"""Float8 with one scale per block, channel or tensor: DeepSeek V3, transformers, compressed-tensors, ModelOpt.

A value is code times scale, for both names of the scale: `X_scale` and `X_scale_inv`.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.encodings.base import Claim, Refused, quoted, shaped
from torchparams.encodings.fp4 import POWERS, powers
from torchparams.encodings.scaled import BlockScaled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.encodings.base import Tensors
    from torchparams.expressions.base import Expression

SCALES = ("_scale_inv", "_scale")
USUAL = 128
"""Default side of a block, if no configuration names it and it fits."""

_SIDES = tuple(1 << power for power in range(4, 13))

Sides = tuple[int, int]


def claim(codes: str, tensors: Tensors) -> Claim | Refused | None:
    """Recognise float8 codes with scales."""
    dtype = tensors.dtype(codes)
    if dtype.kind != "float" or dtype.bits != 8 or dtype == "float8_e8m0fnu":
        return None
    scales = tensors.present(*(codes + end for end in SCALES))
    if codes.endswith(".weight"):  # naming of DeepSeek's own programs
        scales += tensors.present(codes.removesuffix("weight") + "scale")
    if not scales:
        return None
    if len(scales) > 1:
        return Refused((codes, *scales), f"Either of {quoted(scales[0])} and {quoted(scales[1])} may be its scale")
    return scaled(codes, scales[0], tensors, "fp8", stated_block(tensors.config))


def stated_block(config: Mapping[str, Any]) -> object:
    """Sides of a block in a configuration; None if it has none, or different ones for different modules.

    >>> stated_block({"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [16, 32]}}}})
    [16, 32]
    """
    groups = config.get("config_groups")
    if "weight_block_size" in config or not isinstance(groups, dict):
        return config.get("weight_block_size")
    stated = [each.get("weights") for each in groups.values() if isinstance(each, dict)]
    weights = [each for each in stated if isinstance(each, dict) and each.get("strategy") == "block"]
    if not weights or len(weights) < len(stated):
        return None
    first = weights[0].get("block_structure")
    return first if is_pair(first) and all(each.get("block_structure") == first for each in weights) else None


def scaled(codes: str, scale: str, tensors: Tensors, family: str, stated: object) -> Claim | Refused:
    """Claim for 8-bit codes and scales, whose shapes determine the blocks.

    Args:
        codes: Name of the codes.
        scale: Name of the scales.
        tensors: All stored tensors.
        family: Start of the encoding's name.
        stated: Sides of a block in the configuration, or None.
    """
    zeros = f"{codes}_zero_point"
    parts = (codes, scale, *tensors.present(zeros))
    shape = tensors.shape(codes)
    kind = tensors.dtype(scale)
    if zeros in tensors and family == "fp8":
        return Refused(parts, f"Zero points of floats ({quoted(zeros)}) are unknown")
    if zeros in tensors and (tensors.shape(zeros) != tensors.shape(scale) or tensors.dtype(zeros) != "int8"):
        return Refused(parts, f"The zero points {shaped(tensors, zeros)} do not match {shaped(tensors, scale)}")
    if (
        family == "fp8"
        and kind in ("uint8", POWERS)
        and shape
        and tensors.shape(scale) == (*shape[:-1], shape[-1] / 32)
    ):
        return Claim(codes, shape, "mxfp8", parts, partial(_mxfp8, matrix=(prod(shape[:-1]), shape[-1])))
    if kind.kind != "float" or kind.bits < 8:
        return Refused(parts, f"The scales {shaped(tensors, scale)} are not floating-point")
    matrix, given = _geometry(shape, tensors.shape(scale))
    if given is None:
        return Refused(parts, f"The scales {shaped(tensors, scale)} do not match any blocks of {list(shape)}")
    if given not in ((1, 1), (matrix[0], 1)) and stated is not None:
        if not is_pair(stated):
            return Refused(parts, f"The configuration's weight_block_size is {quoted(stated)}, not two sizes")
        assert isinstance(stated, list)
        if given != (-(-matrix[0] // stated[0]), -(-matrix[1] // stated[1])):
            return Refused(
                parts,
                f"The scales {shaped(tensors, scale)} do not match the configured blocks of {stated}",
            )
        block: tuple[int | None, int | None] = (stated[0], stated[1])
    else:
        block = _side(matrix[0], given[0]), _side(matrix[1], given[1])
    high, wide = block
    if high is None or wide is None:
        return Refused(
            parts,
            f"The scales {shaped(tensors, scale)} do not tell the size of their blocks in {list(shape)}, "
            "and no config.json has weight_block_size",
        )
    return Claim(
        codes, shape, f"{family}-{_called(matrix, given, (high, wide))}", parts,
        partial(_build, matrix=matrix, block=(min(high, matrix[0]), min(wide, matrix[1]))),
    )  # fmt: skip


def _build(
    codes: Expression, scale: Expression, zeros: Expression | None = None, *, matrix: Sides, block: Sides
) -> Expression:
    return BlockScaled(codes, scale, matrix, block, zeros=zeros)


def _mxfp8(codes: Expression, scale: Expression, *, matrix: Sides) -> Expression:
    return BlockScaled(codes, powers(scale), matrix, (1, 32))


def is_pair(stated: object) -> bool:
    """Whether a configuration value is a pair of sizes."""
    return isinstance(stated, list) and len(stated) == 2 and all(type(side) is int and side > 0 for side in stated)


def _called(matrix: Sides, given: Sides, block: Sides) -> str:
    (rows, columns), (high, wide) = matrix, block
    if given == (1, 1):
        return "tensor"
    if high == 1:
        return "channel" if given[1] == 1 else f"group{wide}"
    if given[0] == 1 and rows <= wide:  # a single row of blocks, shorter than a block
        high = wide
    if given[1] == 1 and columns <= high:
        wide = high
    return f"block{high}" if high == wide else f"block{high}x{wide}"


def _geometry(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[Sides, Sides | None]:
    """Rows and columns of each matrix of codes, and of its scales; None if they do not match."""
    if 0 in shape:
        return (1, 1), None
    whole = prod(shape)
    if prod(scales) == 1:  # one scale for all
        return (1, whole), (1, 1)
    if len(shape) == 3 and scales[0] == shape[0] and len(scales) <= 3:  # a matrix per expert
        rows, columns = shape[1:]
        high, wide, *_ = (*scales[1:], 1, 1)
        given = (high, wide)
        fits = 1 <= given[0] <= rows and 1 <= given[1] <= columns
        return (rows, columns), given if fits else None
    if len(shape) == 2 and len(scales) == 2:
        (rows, columns), given = (shape[0], shape[1]), (scales[0], scales[1])
        return (rows, columns), given if 1 <= given[0] <= rows and 1 <= given[1] <= columns else None
    if len(shape) >= 2 and scales[0] == shape[0] == prod(scales):  # one scale per output
        return (shape[0], whole // shape[0]), (shape[0], 1)
    return (1, whole), None


def _side(size: int, count: int) -> int | None:
    """Side of a block if `count` blocks cover `size`; None if several sides match."""
    if count == 1:
        return size
    if count == size:
        return 1
    found = [side for side in _SIDES if -(-size // side) == count]
    return USUAL if USUAL in found else found[0] if len(found) == 1 else None
