"""Tensors of torchao's classes in a pickle, as the tensors that they keep their values in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.encodings.base import Structure, part_name
from torchparams.sources.torchfile._pickle_values import Global
from torchparams.sources.torchfile._refs import TensorRef

if TYPE_CHECKING:
    from collections.abc import Mapping

_HOME = "torchao."
_ATTRIBUTES = 64
"""Attributes that are looked at; torchao's classes have about ten."""


def take_apart(name: str, tensor: TensorRef) -> tuple[Structure, Mapping[str, TensorRef]] | None:
    """The description of a tensor, and the tensors that it keeps its values in, by the names they are listed under.

    Args:
        name: Its name.
        tensor: A tensor of a class that keeps its values in others.

    Returns:
        None where it is of no class of torchao, or its attributes are not plain: it is listed as one tensor then.
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
