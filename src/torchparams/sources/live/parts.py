"""Split tensors of torchao, bitsandbytes and torch's own quantisation into the plain tensors they keep.

Only attributes are examined. No code of these libraries runs, and only scales are copied.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.encodings.base import Structure, part_name, unpacked_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Parts:
    """The stored tensors of one parameter.

    Attributes:
        tensors: Name → plain tensor, the codes first.
        structure: How they belong together, if names do not tell.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    structure: Structure | None = None


def take_apart(name: str, value: Any, owner: nn.Module | None = None) -> Parts | None:
    """Split a parameter whose class keeps its values in other tensors; None for any other parameter.

    Args:
        name: Name of the parameter; the names of the stored tensors are derived from it.
        value: The parameter.
        owner: The module that holds it, which may keep a part.

    >>> import torch
    >>> w = torch.quantize_per_tensor(torch.ones(2, 2), 0.5, 0, torch.qint8)  # doctest: +SKIP
    >>> list(take_apart("fc.weight", w).tensors)  # doctest: +SKIP
    ['fc._weight_int_repr', 'fc._weight_scale', 'fc._weight_zero_point']
    """
    from torch._C import DisableTorchFunctionSubclass

    with DisableTorchFunctionSubclass():
        home = type(value).__module__
        if home.startswith("torchao."):
            return _torchao(name, value)
        if home.startswith("bitsandbytes."):
            return _four_bits(name, value) or _eight_bits(name, value, owner)
        return _torch(name, value) if value.is_quantized else None


def may_have_parts(cls: type) -> bool:
    """Whether `take_apart` may return something for a tensor of this class (torch's quantised tensors aside)."""
    return cls.__module__.startswith(("torchao.", "bitsandbytes."))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a detached, plain `torch.Tensor`."""
    import torch

    return tensor.detach().as_subclass(torch.Tensor)


def _torchao(name: str, value: Any) -> Parts | None:
    import torch

    attributes: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, each in vars(value).items():
        if isinstance(each, torch.Tensor):
            if type(each) not in (torch.Tensor, torch.nn.Parameter):
                return None  # nested: its tensors keep other tensors
            tensors[key] = each.detach()
        elif isinstance(each, torch.dtype):
            attributes[key] = str(each).removeprefix("torch.")
        elif isinstance(each, list | tuple | int | float | str | None):
            attributes[key] = list(each) if isinstance(each, list | tuple) else each
    if "qdata" not in tensors:
        return None
    order = sorted(tensors, key=lambda key: key != "qdata")
    parts = {key: part_name(name, key) for key in order}
    structure = Structure(name, type(value).__name__, parts, attributes, tuple(value.shape), DType.of(value.dtype))
    return Parts({parts[key]: tensors[key] for key in order}, structure)


def _four_bits(name: str, value: Any) -> Parts | None:
    import torch

    state = vars(value).get("quant_state")
    kept = vars(state) if hasattr(state, "__dict__") else {}
    # The weights may be packed in another order for the CPU, which only the library reads.
    if not kept or kept.get("packing_format_for_cpu") or kept.get("quant_type") not in ("nf4", "fp4"):
        return None
    told: dict[str, Any] = {
        "quant_type": kept["quant_type"],
        "blocksize": kept.get("blocksize"),
        "dtype": str(kept.get("dtype")).removeprefix("torch."),
        "shape": list(kept.get("shape") or ()),
    }
    tensors = {"absmax": kept.get("absmax"), "quant_map": kept.get("code")}
    inner = kept.get("state2")
    if inner is not None:
        tensors |= {"nested_absmax": vars(inner).get("absmax"), "nested_quant_map": vars(inner).get("code")}
        offset = kept.get("offset")
        told |= {
            "nested_blocksize": vars(inner).get("blocksize"),
            "nested_dtype": str(vars(inner).get("dtype")).removeprefix("torch."),
            "nested_offset": offset.item() if isinstance(offset, torch.Tensor) and offset.numel() == 1 else None,
        }
    found = {key: plain(each) for key, each in tensors.items() if isinstance(each, torch.Tensor)}
    if found.keys() != tensors.keys():
        return None
    # The format that the library writes to state dicts.
    text = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
    parts = {f"{name}.{key}": each for key, each in found.items()}
    return Parts({name: plain(value), **parts, f"{name}.quant_state.bitsandbytes__{told['quant_type']}": text})


def _eight_bits(name: str, value: Any, owner: nn.Module | None) -> Parts | None:
    import torch

    scale = vars(value).get("SCB")
    if scale is None and owner is not None:  # a layer that has run keeps it
        scale = getattr(vars(owner).get("state"), "SCB", None)
    if value.dtype != torch.int8 or not isinstance(scale, torch.Tensor) or not name.endswith("weight"):
        return None
    stem = name.removesuffix("weight")
    rows = torch.zeros((), dtype=torch.uint8)  # the layout that the library writes to state dicts
    return Parts({name: plain(value), f"{stem}SCB": plain(scale), f"{stem}weight_format": rows})


def _torch(name: str, value: torch.Tensor) -> Parts | None:
    import torch

    codes = {torch.qint8: torch.int8, torch.quint8: torch.uint8}.get(value.dtype)
    if codes is None:
        return None
    # A view of the codes; `int_repr` would copy them.
    memory = torch.empty(0, dtype=codes).set_(
        value.untyped_storage(), value.storage_offset(), value.shape, value.stride()
    )
    scheme = value.qscheme()
    attributes: dict[str, Any] = {}
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero = torch.tensor([value.q_scale()]), torch.tensor([value.q_zero_point()], dtype=torch.int32)
    else:
        attributes["axis"] = value.q_per_channel_axis()
        scale, zero = value.q_per_channel_scales(), value.q_per_channel_zero_points()
    # torch computes with float32 scales, and keeps those of channels as float64.
    tensors = {"int_repr": memory, "scale": scale, "zero_point": zero}
    shown = unpacked_name(name)
    parts = {key: part_name(shown, key) for key in tensors}
    kind = str(value.dtype).removeprefix("torch.")
    structure = Structure(shown, kind, parts, attributes, tuple(value.shape), DType.of(torch.float32))
    return Parts({parts[key]: each for key, each in tensors.items()}, structure)
