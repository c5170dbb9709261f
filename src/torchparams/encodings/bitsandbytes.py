"""bitsandbytes: int8 with one scale per row (`SCB`), and nf4 and fp4 in blocks with scales, possibly quantised."""

from __future__ import annotations

import json
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.encodings.base import Claim, Refused, quoted, shaped
from torchparams.encodings.packed import Bytes, Nibbles
from torchparams.encodings.scaled import F32, BlockScaled
from torchparams.errors import TorchParamsError

if TYPE_CHECKING:
    from torchparams.encodings.base import Tensors
    from torchparams.expressions.base import Expression

_U8 = DType.of("uint8")
_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_STATE_BYTES = 1 << 14
_SEVENTH = 7.874015718698502e-3
"""1/127, as in bitsandbytes."""

_MOST = 1 << 48


def claim(codes: str, tensors: Tensors) -> Claim | Refused | None:
    """Recognise a layer of bitsandbytes."""
    states = tensors.present(*(codes + end for end in _STATES))
    if states:
        return _four_bits(codes, states, tensors)
    stem = codes.removesuffix("weight")
    if stem != codes and tensors.dtype(codes) == "int8" and stem + "SCB" in tensors:
        return _eight_bits(codes, stem, tensors)
    if tensors.present(codes + ".absmax") and tensors.present(codes + ".quant_map"):
        return Refused(
            (codes, codes + ".absmax", codes + ".quant_map"), f"{quoted(codes + '.quant_state…')} is missing"
        )
    return None


def _eight_bits(codes: str, stem: str, tensors: Tensors) -> Claim | Refused:
    scale, layout = stem + "SCB", stem + "weight_format"
    parts = (codes, scale, *tensors.present(layout))
    shape = tensors.shape(codes)
    if len(shape) != 2 or 0 in shape or tensors.shape(scale) != shape[:1] or tensors.dtype(scale) != "float32":
        return Refused(parts, f"The scales {shaped(tensors, scale)} do not match {list(shape)}")
    if layout in tensors and any(tensors.bytes_of(layout, 8)):
        return Refused(parts, f"{quoted(layout)} names a layout other than rows, which only a GPU can read")
    rows, columns = shape
    build = partial(BlockScaled, matrix=(rows, columns), block=(1, columns), factor=_SEVENTH)
    return Claim(codes, shape, "int8-bnb", parts, build, (codes, scale))


def _four_bits(codes: str, states: tuple[str, ...], tensors: Tensors) -> Claim | Refused:
    absmax, table = codes + ".absmax", codes + ".quant_map"
    nested = (codes + ".nested_absmax", codes + ".nested_quant_map")
    parts = (codes, *tensors.present(absmax, table, *nested), *states)
    if len(states) > 1:
        return Refused(parts, f"Either of {quoted(states[0])} and {quoted(states[1])} may describe it")
    missing = [name for name in (absmax, table) if name not in tensors]
    if missing:
        return Refused(parts, f"{quoted(missing[0])} is missing")
    state = _json(tensors.bytes_of(states[0], _STATE_BYTES))
    if state is None:
        return Refused(parts, f"{quoted(states[0])} is not a JSON object")
    kind, shape, block = state.get("quant_type"), state.get("shape"), state.get("blocksize")
    try:
        dtype = DType.of(state.get("dtype"))
    except TorchParamsError:
        return Refused(parts, f"{quoted(states[0])} has an invalid dtype: {quoted(state.get('dtype'))}")
    if kind != states[0][-3:]:
        return Refused(parts, f"{quoted(states[0])} is of the type {quoted(kind)}")
    if not (isinstance(shape, list) and shape and all(_is_size(size) for size in shape) and _is_size(block)):
        return Refused(parts, f"{quoted(states[0])} has the shape {quoted(shape)} in blocks of {quoted(block)}")
    assert isinstance(block, int)
    numel = prod(shape)
    if numel > _MOST or -(-numel // 2) != tensors.infos[codes].nbytes:
        return Refused(parts, f"{shaped(tensors, codes)} does not hold {quoted(shape)} codes of four bits")
    if dtype not in ("float32", "float16", "bfloat16"):
        return Refused(parts, f"{quoted(states[0])} names the dtype {dtype}")
    blocks = -(-numel // block)
    if tensors.shape(absmax) != (blocks,):
        return Refused(parts, f"The scales {shaped(tensors, absmax)} are not {blocks}")
    if tensors.shape(table) != (16,) or tensors.dtype(table) != "float32":
        return Refused(parts, f"{shaped(tensors, table)} is not a table of 16 values")
    inner: int | None = None
    offset: Any = 0.0
    operands = [codes, absmax, table]
    if tensors.dtype(absmax) == "uint8":
        inner, offset = state.get("nested_blocksize"), state.get("nested_offset")
        missing = [name for name in nested if name not in tensors]
        if missing:
            return Refused(parts, f"{quoted(missing[0])} is missing")
        if not _is_size(inner) or not isinstance(offset, int | float) or not abs(offset) < _MOST:
            told = f"nested blocks of {quoted(inner)}, and the offset {quoted(offset)}"
            return Refused(parts, f"{quoted(states[0])} has {told}")
        assert isinstance(inner, int)
        if tensors.shape(nested[0]) != (-(-blocks // inner),) or tensors.dtype(nested[0]) != "float32":
            return Refused(parts, f"The nested scales {shaped(tensors, nested[0])} are not {-(-blocks // inner)}")
        if tensors.shape(nested[1]) != (256,) or tensors.dtype(nested[1]) != "float32":
            return Refused(parts, f"{shaped(tensors, nested[1])} is not a table of 256 values")
        operands += nested
    elif tensors.dtype(absmax) != "float32":
        return Refused(parts, f"The scales {shaped(tensors, absmax)} are not float32")
    build = partial(_build, shape=tuple(shape), blocksize=block, inner=inner, offset=float(offset or 0), dtype=dtype)
    return Claim(codes, tuple(shape), str(kind), parts, build, tuple(operands), dtype)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= _MOST


def _json(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _build(
    codes: Expression,
    absmax: Expression,
    table: Expression,
    *nested: Expression,
    shape: tuple[int, ...],
    blocksize: int,
    inner: int | None,
    offset: float,
    dtype: DType,
) -> Expression:
    numel = prod(shape)
    packed = Bytes(codes, _U8, (codes.nbytes,))
    scales = absmax
    if inner is not None:
        scales = BlockScaled(
            absmax, nested[0], (1, absmax.numel), (1, min(inner, absmax.numel)), table=nested[1], dtype=F32
        )
    return BlockScaled(
        Nibbles(packed, (numel,), high_first=True), scales, (1, numel), (1, min(blocksize, numel)),
        table=table, shape=shape, dtype=dtype, offset=offset,
    )  # fmt: skip
