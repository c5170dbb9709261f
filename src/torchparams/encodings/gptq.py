"""GPTQ and AWQ: groups of inputs with a scale and a zero point each, packed in 32-bit words.

Both store `qweight`, `qzeros` and `scales` with inputs before outputs. GPTQ packs codes along the inputs, in order or
(act-order) with the group of each input in `g_idx`. AWQ packs codes along the outputs, in its own order.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torchparams.encodings.base import Claim, Refused, quoted, shaped
from torchparams.encodings.packed import Transposed, Unpacked
from torchparams.encodings.scaled import COUNTED, BlockScaled

if TYPE_CHECKING:
    from torchparams.encodings.base import Tensors
    from torchparams.expressions.base import Expression

AWQ_ORDER = bytes([0, 2, 4, 6, 1, 3, 5, 7])
"""Output held by each field of a word, lowest bits first."""

_BITS = (2, 3, 4, 8)


def claim(codes: str, tensors: Tensors) -> Claim | Refused | None:
    """Recognise a layer of GPTQ or AWQ."""
    stem = codes.removesuffix("qweight")
    if stem == codes or not tensors.present(stem + "scales", stem + "qzeros"):
        return None
    zeros, scales = stem + "qzeros", stem + "scales"
    parts = (codes, *tensors.present(zeros, scales, stem + "g_idx"))
    missing = [name for name in (zeros, scales) if name not in tensors]
    if missing:
        return Refused(parts, f"{quoted(missing[0])} is missing")
    for name in (codes, zeros):
        if tensors.dtype(name) != "int32" or len(tensors.shape(name)) != 2 or 0 in tensors.shape(name):
            return Refused(parts, f"{shaped(tensors, name)} is not an int32 matrix")
    if len(tensors.shape(scales)) != 2 or tensors.dtype(scales) not in ("float16", "bfloat16", "float32"):
        return Refused(parts, f"The scales {shaped(tensors, scales)} are not a matrix of floats")
    outputs = tensors.shape(scales)[1]
    if tensors.shape(codes)[1] == outputs:
        return _gptq(stem, parts, tensors)
    if tensors.shape(codes)[1] * 8 == outputs:
        return _awq(stem, parts, tensors)
    return Refused(
        parts, f"{shaped(tensors, codes)} and the scales {shaped(tensors, scales)} do not match a known layout"
    )


def _gptq(stem: str, parts: tuple[str, ...], tensors: Tensors) -> Claim | Refused:
    codes, zeros, scales, order = (stem + end for end in ("qweight", "qzeros", "scales", "g_idx"))
    groups, outputs = tensors.shape(scales)
    words = tensors.shape(codes)[0]
    bits = [bits for bits in _BITS if tensors.shape(zeros) == (groups, -(-outputs * bits // 32))]
    if len(bits) != 1:
        return Refused(parts, f"The zero points {shaped(tensors, zeros)} do not match {shaped(tensors, scales)}")
    width = bits[0]
    if order in tensors:
        inputs = tensors.infos[order].numel
        if tensors.shape(order) != (inputs,) or tensors.dtype(order) not in ("int32", "int64"):
            return Refused(parts, f"{shaped(tensors, order)} is not a list of groups")
    else:
        inputs = words * 32 // width
    if words != -(-inputs * width // 32):
        return Refused(parts, f"{shaped(tensors, codes)} does not hold {inputs} codes of {width} bits in a column")
    group = _group(inputs, groups, tensors.config.get("group_size"))
    if group is None:
        return Refused(parts, f"The {groups} groups of {quoted(scales)} do not divide {inputs} inputs")
    stated = tensors.config.get("bits")
    if stated is not None and stated != width:
        return Refused(parts, f"The configuration says {quoted(stated)} bits, but the zero points have {width}")
    layout = _zero_points(tensors)
    if layout is None:
        return Refused(
            parts,
            "The tensors do not tell whether zero points are stored minus one: keep config.json or "
            "quantize_config.json "
            "beside the file",
        )
    if layout not in (0, 1):
        return Refused(parts, f"The configuration has an unknown format {quoted(layout)}")
    operands = (codes, scales, zeros, *tensors.present(order))
    build = partial(_build_gptq, bits=width, shape=(outputs, inputs), group=group, above=layout)
    return Claim(
        stem + "weight", (outputs, inputs), f"gptq-int{width}-{_called(group, inputs)}", parts, build, operands
    )


def _group(inputs: int, groups: int, stated: object) -> int | None:
    """Inputs per group; None if the groups do not cover the inputs."""
    if type(stated) is int and stated > 0 and -(-inputs // stated) == groups:
        return stated
    return inputs // groups if groups and inputs % groups == 0 else None


def _called(group: int, inputs: int) -> str:
    return "channel" if group >= inputs else f"g{group}"


def _zero_points(tensors: Tensors) -> int | str | None:
    """Offset of stored zero points; the name of an unknown format; None without a configuration."""
    config = tensors.config
    if tensors.method not in ("gptq", "") or not config:
        return tensors.method or None
    if "bits" not in config:
        return None
    format = config.get("checkpoint_format", config.get("format", "gptq"))
    known = {"gptq": 1, "gptq_v2": 0}
    return known.get(format, format) if isinstance(format, str) else str(format)


def _build_gptq(
    codes: Expression,
    scales: Expression,
    zeros: Expression,
    index: Expression | None = None,
    *,
    bits: int,
    shape: tuple[int, int],
    group: int,
    above: int,
) -> Expression:
    outputs, inputs = shape
    # Programs disagree only about the largest zero point, which means that zero minus one wrapped around.
    common: dict[str, Any] = {
        "table": COUNTED, "above": above, "limit": (1 << bits) - 1 - above, "index": index
    }  # fmt: skip
    stored = BlockScaled(
        Unpacked(codes, bits, (inputs, outputs), 0),
        scales,
        (inputs, outputs),
        (group, 1),
        zeros=Unpacked(zeros, bits, (zeros.shape[0], outputs), 1),
        rows_by_index=True,
        **common,
    )
    return BlockScaled(
        Unpacked(codes, bits, (outputs, inputs), 0, turned=True),
        Transposed(scales),
        (outputs, inputs),
        (1, group),
        zeros=Unpacked(zeros, bits, (outputs, zeros.shape[0]), 1, turned=True),
        stored=stored,
        **common,
    )


def _awq(stem: str, parts: tuple[str, ...], tensors: Tensors) -> Claim | Refused:
    codes, zeros, scales = (stem + end for end in ("qweight", "qzeros", "scales"))
    (inputs, words), (groups, outputs) = tensors.shape(codes), tensors.shape(scales)
    if stem + "g_idx" in tensors:
        return Refused(parts, f"{quoted(stem + 'g_idx')} does not belong to a layout that packs outputs")
    version = tensors.config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() not in ("gemm", "exllama", "ipex"):
        return Refused(parts, f"The AWQ version {quoted(version)} in the configuration is not supported; 'gemm' is")
    stated = tensors.config.get("bits", tensors.config.get("w_bit", 4))
    if stated != 4:
        return Refused(parts, f"The configuration says {quoted(stated)} bits, not 4")
    if tensors.shape(zeros) != (groups, words) or not groups or inputs % groups:
        return Refused(parts, f"The zero points {shaped(tensors, zeros)} do not match {shaped(tensors, scales)}")
    group = inputs // groups
    build = partial(_build_awq, shape=(outputs, inputs), group=group)
    return Claim(
        stem + "weight", (outputs, inputs), f"awq-int4-{_called(group, inputs)}", parts, build, (codes, scales, zeros)
    )


def _build_awq(
    codes: Expression, scales: Expression, zeros: Expression, *, shape: tuple[int, int], group: int
) -> Expression:
    outputs, inputs = shape
    groups = zeros.shape[0]
    stored = BlockScaled(
        Unpacked(codes, 4, (inputs, outputs), 1, order=AWQ_ORDER),
        scales,
        (inputs, outputs),
        (group, 1),
        table=COUNTED,
        zeros=Unpacked(zeros, 4, (groups, outputs), 1, order=AWQ_ORDER),
    )
    return BlockScaled(
        Unpacked(codes, 4, shape, 1, turned=True, order=AWQ_ORDER),
        Transposed(scales),
        shape,
        (1, group),
        table=COUNTED,
        zeros=Unpacked(zeros, 4, (outputs, groups), 1, turned=True, order=AWQ_ORDER),
        stored=stored,
    )
