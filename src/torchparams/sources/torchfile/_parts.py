"""Tensors of torchao classes in a pickle, split into the tensors that they keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.encodings.base import Structure, part_name
from torchparams.sources.torchfile._pickle_values import Global
from torchparams.sources.torchfile._refs import TensorRef

if TYPE_CHECKING:
    from collections.abc import Mapping

_HOME = "torchao."
_ATTRIBUTES = 64
"""Maximum number of attributes to examine; torchao classes have about ten."""


def take_apart(name: str, tensor: TensorRef) -> tuple[Structure, Mapping[str, TensorRef]] | None:
    """Describe a tensor, and return the tensors that it keeps under the names to list.

    Args:
        name: Name of the tensor.
        tensor: A tensor whose class keeps its values in other tensors.

    Returns:
        None if the class is not from torchao or its attributes are not plain; the tensor is then listed as one.
    """
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
