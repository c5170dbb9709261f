"""compressed-tensors: integers packed in words with one scale per group (`pack-quantized`), int8, and floats."""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Any

from torchparams.encodings.base import Claim, Refused, quoted, shaped
from torchparams.encodings.fp4 import mxfp4, nvfp4
from torchparams.encodings.fp8 import scaled, stated_block
from torchparams.encodings.packed import Unpacked
from torchparams.encodings.scaled import BlockScaled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.encodings.base import Tensors
    from torchparams.expressions.base import Expression

_BITS = range(1, 9)


def claim(codes: str, tensors: Tensors) -> Claim | Refused | None:
    """Recognise a layer of compressed-tensors with packed or int8 codes."""
    if codes.endswith("_packed"):
        return _packed(codes, codes.removesuffix("_packed"), tensors)
    if tensors.dtype(codes) == "int8" and codes + "_scale" in tensors and tensors.method == "compressed-tensors":
        if codes + "_g_idx" in tensors:
            return Refused((codes, codes + "_scale", codes + "_g_idx"), f"{quoted(codes + '_g_idx')} is not supported")
        return scaled(codes, codes + "_scale", tensors, "int8", stated_block(tensors.config))
    return None


def _packed(codes: str, name: str, tensors: Tensors) -> Claim | Refused | None:
    scale, whole = name + "_scale", name + "_global_scale"
    if scale not in tensors:
        return Refused((codes, *tensors.present(whole, name + "_shape")), f"{quoted(scale)} is missing")
    if tensors.dtype(codes) == "uint8":
        if name + "_zero_point" in tensors:
            return Refused(
                (codes, scale, name + "_zero_point"),
                f"Zero points of floats ({quoted(name + '_zero_point')}) are unknown",
            )
        if whole in tensors:
            return nvfp4(name, codes, scale, whole, tensors, divide=True)
        return mxfp4(name, codes, scale, tensors)
    size, zeros, order = name + "_shape", name + "_zero_point", name + "_g_idx"
    parts = (codes, scale, *tensors.present(zeros, order, size))
    stored = tensors.shape(codes)
    if tensors.dtype(codes) != "int32" or len(stored) not in (2, 3) or 0 in stored:
        return Refused(parts, f"{shaped(tensors, codes)} does not hold int32 matrices")
    if size not in tensors:
        return Refused(parts, f"{quoted(size)} is missing")
    if tensors.shape(size) != (len(stored),) or tensors.dtype(size) not in ("int64", "int32"):
        return Refused(parts, f"{shaped(tensors, size)} does not hold {len(stored)} sizes")
    letter = "q" if tensors.dtype(size) == "int64" else "i"
    *batch, rows, columns = struct.unpack(f"<{len(stored)}{letter}", tensors.bytes_of(size, 24))
    bits = [bits for bits in _BITS if (*batch, rows, -(-columns * bits // 32)) == stored]
    if len(bits) > 1:  # a few columns fill as many words with codes of several widths
        widths = ", ".join(map(str, bits))
        bits = [each for each in bits if each in _stated(tensors.config)]
        if len(bits) != 1:
            return Refused(
                parts,
                f"{shaped(tensors, codes)} fits several widths ({widths} bits), and config.json states none of them",
            )
    if len(bits) != 1 or columns < 1:
        wanted = " x ".join(map(str, (*batch, rows, columns)))
        return Refused(parts, f"{shaped(tensors, codes)} does not hold {wanted} codes of 1 to 8 bits")
    width = bits[0]
    *lines, groups = tensors.shape(scale) or (0,)
    if lines != [*batch, rows] or not groups or tensors.dtype(scale).kind != "float":
        return Refused(parts, f"The scales {shaped(tensors, scale)} do not match {rows} rows")
    if columns % groups:
        return Refused(parts, f"The {groups} groups of {quoted(scale)} do not divide {columns} columns")
    group = columns // groups
    operands = [codes, scale]
    if zeros in tensors:
        if tensors.shape(zeros) != (*batch, -(-rows * width // 32), groups) or tensors.dtype(zeros) != "int32":
            return Refused(parts, f"The zero points {shaped(tensors, zeros)} do not match {shaped(tensors, scale)}")
        operands.append(zeros)
    if order in tensors:
        if batch:
            return Refused(parts, f"The order of several matrices ({quoted(order)}) is not supported")
        if tensors.shape(order) != (columns,) or tensors.dtype(order) not in ("int32", "int64"):
            return Refused(parts, f"{shaped(tensors, order)} is not a list of groups")
        operands.append(order)
    shape = (*batch, rows, columns)
    build = partial(
        _build, bits=width, shape=shape, group=group, has_zeros=zeros in tensors, has_order=order in tensors
    )
    called = "channel" if groups == 1 else f"g{group}"
    return Claim(name, shape, f"int{width}-{called}", parts, build, tuple(operands))


def _stated(config: Mapping[str, Any]) -> set[int]:
    """The widths of weights that a configuration names."""
    groups = config.get("config_groups")
    schemes = groups.values() if isinstance(groups, dict) else ()
    weights = (each.get("weights") for each in schemes if isinstance(each, dict))
    return {each["num_bits"] for each in weights if isinstance(each, dict) and type(each.get("num_bits")) is int}


def _build(
    codes: Expression,
    scale: Expression,
    *others: Expression,
    bits: int,
    shape: tuple[int, ...],
    group: int,
    has_zeros: bool,
    has_order: bool,
) -> Expression:
    # Codes and zero points are stored with half of the range added.
    half = 0 if has_zeros else 1 << (bits - 1)
    return BlockScaled(
        Unpacked(codes, bits, shape, 1),
        scale,
        (shape[-2], shape[-1]),
        (1, group),
        table=tuple(float(code - half) for code in range(256)),
        zeros=Unpacked(others[0], bits, scale.shape, 0) if has_zeros else None,
        index=others[-1] if has_order else None,
    )
