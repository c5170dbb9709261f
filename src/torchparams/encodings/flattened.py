"""What torchao writes into the header of a safetensors file: which tensors each of its parameters was taken apart into.

The key `tensor_names` lists the parameters as JSON, and a key for each names its class, its plain attributes and the
attributes that are tensors. The tensors are called `{module}._{parameter}_{attribute}`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.encodings.base import Structure, part_name
from torchparams.errors import TorchParamsError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

NAMES = "tensor_names"
"""The key that lists the parameters."""

_PLAIN = "Tensor"


def structures_of(metadata: Mapping[str, Any], names: Container[str]) -> Iterator[Structure]:
    """The parameters of torchao's classes that the metadata of a file describes, and of which a part is in it.

    Args:
        metadata: The header's metadata.
        names: The names of the tensors that there are.

    >>> told = '{"_type": "Float8Tensor", "_data": {"block_size": [1, 8]}, "_tensor_data_names": ["qdata", "scale"]}'
    >>> list(structures_of({"tensor_names": '["l.weight"]', "l.weight": told}, {"l._weight_qdata"}))[0].kind
    'Float8Tensor'
    """
    listed = _json(metadata.get(NAMES))
    for name in dict.fromkeys(listed) if isinstance(listed, list) and all(isinstance(x, str) for x in listed) else ():
        told = _json(metadata.get(name))
        if not isinstance(told, dict) or told.get("_type") == _PLAIN:
            continue
        kind, data, attributes = told.get("_type"), told.get("_data", {}), told.get("_tensor_data_names")
        if not isinstance(kind, str) or not isinstance(data, dict) or not isinstance(attributes, list):
            continue
        parts = {each: part_name(name, each) for each in attributes if isinstance(each, str)}
        if any(part in names for part in parts.values()):
            # The codes come first, whatever comes first in the file.
            ordered = {each: parts[each] for each in sorted(parts, key=lambda each: each != "qdata")}
            plain = {key: _plain(value) for key, value in data.items()}
            yield Structure(name, kind, ordered, plain, _shape(plain.get("shape")), _dtype(plain.get("dtype")))


def described(metadata: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """The metadata of a file for other tensors than it was written with.

    A parameter that is there under its own name is a plain tensor now; one of which nothing is there is left out.

    Args:
        metadata: The metadata.
        names: The names of the tensors that there are.

    >>> told = {"tensor_names": '["w"]', "w": '{"_type": "Int8Tensor", "_tensor_data_names": ["qdata"]}', "by": "me"}
    >>> described(told, {"w"}), described(told, {"_w_qdata"}) == told
    ({'by': 'me'}, True)
    """
    listed = _json(metadata.get(NAMES))
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return dict(metadata)
    kept = {each.name for each in structures_of(metadata, names) if each.name not in names}
    found = {key: value for key, value in metadata.items() if key != NAMES and key not in listed}
    if not kept:
        return found
    left = [name for name in listed if name in names or name in kept]
    for name in left:
        found[name] = metadata[name] if name in kept else json.dumps({"_type": _PLAIN})
    return {NAMES: json.dumps(left), **found}


def _json(text: object) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    """A value, of a type its name."""
    if isinstance(value, dict) and value.get("_type") == "torch.dtype":
        return value.get("_data")
    return value


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(type(size) is int for size in value) else None


def _dtype(value: object) -> DType | None:
    try:
        return DType.of(value) if isinstance(value, str) else None
    except TorchParamsError:
        return None
