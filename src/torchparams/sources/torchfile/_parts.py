"""Tensors of torchao classes, and quantised tensors of torch, in a pickle: split into the tensors that they keep."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.encodings.base import Structure, part_name, unpacked_name
from torchparams.sources.torchfile._pickle_values import Global
from torchparams.sources.torchfile._refs import StorageRef, TensorRef

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeGuard

_HOME = "torchao."
_ATTRIBUTES = 64
"""Maximum number of attributes to examine; torchao classes have about ten."""


def take_apart(name: str, tensor: TensorRef) -> tuple[Structure, Mapping[str, TensorRef]] | None:
    """Describe a tensor, and return the tensors that it keeps under the names to list.

    Args:
        name: Name of the tensor.
        tensor: A tensor whose class keeps its values in other tensors, or a quantised tensor of torch.

    Returns:
        None if the class is not from torchao, or its attributes are not plain, or the scheme of a quantised tensor is
        not known; the tensor is then listed as one.
    """
    if tensor.quantizer is not None:
        return _quantised(name, tensor)
    cls, state = tensor.wrapper, tensor.state
    if cls is None or not cls.module.startswith(_HOME) or type(state) is not dict or len(state) > _ATTRIBUTES:
        return None
    parts: dict[str, TensorRef] = {}
    attributes: dict[str, Any] = {}
    for key, value in state.items():
        if type(key) is not str:
            return None
        if type(value) is TensorRef:
            if value.wrapper is not None or value.problem is not None:
                return None
            parts[key] = value
        elif type(value) is Global:
            attributes[key] = value.name
        elif type(value) in (list, tuple) and all(type(item) is int for item in value[:_ATTRIBUTES]):
            attributes[key] = list(value[:_ATTRIBUTES])
        elif type(value) in (int, float, str, bool, type(None)):
            attributes[key] = value
    if not parts:
        return None
    ordered = {key: part_name(name, key) for key in sorted(parts, key=lambda key: key != "qdata")}
    kind = cls.name.rpartition(".")[2]
    structure = Structure(name, kind, ordered, attributes, tensor.shape, tensor.dtype)
    return structure, {ordered[key]: parts[key] for key in ordered}


_CODES = {"qint8": DType.of("int8"), "quint8": DType.of("uint8")}
_FLOAT, _INT = DType.of("float32"), DType.of("int32")


def _quantised(name: str, tensor: TensorRef) -> tuple[Structure, Mapping[str, TensorRef]] | None:
    """The codes, scales and zero points of a quantised tensor; those of a whole tensor are numbers in the pickle."""
    scheme, *parameters = tensor.quantizer if type(tensor.quantizer) is tuple and tensor.quantizer else (None,)
    called = scheme.name if type(scheme) is Global and scheme.module == "torch" else ""
    attributes: dict[str, Any] = {}
    if called == "per_tensor_affine" and list(map(type, parameters)) == [float, int]:
        scale: Any = _number(parameters[0], _FLOAT)
        zero: Any = _number(parameters[1], _INT)
    elif called in ("per_channel_affine", "per_channel_affine_float_qparams") and len(parameters) == 3:
        scale, zero, attributes["axis"] = parameters
    else:
        return None
    codes = _CODES.get(tensor.dtype)
    if codes is None or not (_is_plain(scale) and _is_plain(zero)):
        return None
    plain = tensor.replaced(dtype=codes, problem=None, quantizer=None)
    tensors: dict[str, TensorRef] = {"int_repr": plain, "scale": scale, "zero_point": zero}
    shown = unpacked_name(name)
    parts = {key: part_name(shown, key) for key in tensors}
    structure = Structure(shown, str(tensor.dtype), parts, attributes, tensor.shape, _FLOAT)
    return structure, {parts[key]: each for key, each in tensors.items()}


def _is_plain(value: Any) -> TypeGuard[TensorRef]:
    return type(value) is TensorRef and value.wrapper is None and value.problem is None


def _number(value: float, dtype: DType) -> TensorRef | None:
    """A number of the pickle as a tensor of one element; None if the dtype does not have it."""
    try:
        data = struct.pack("<f" if dtype == _FLOAT else "<i", value)
    except (OverflowError, struct.error):
        return None
    storage = StorageRef("", dtype, 1)
    storage.inline = data
    return TensorRef(storage, dtype, 0, (1,), (1,))
