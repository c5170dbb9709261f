"""torchao's metadata in safetensors headers: which tensors hold the parts of each parameter.

The key `tensor_names` lists the parameters as JSON. A key for each parameter holds its class, its plain attributes and
its tensor attributes. The tensors are named `{module}._{parameter}_{attribute}`.
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
"""Key that lists the parameters."""

_PLAIN = "Tensor"


def structures_of(metadata: Mapping[str, Any], names: Container[str]) -> Iterator[Structure]:
    """Parameters of torchao's classes that the metadata describes, and that have a part in the file.

    Args:
        metadata: Metadata of the header.
        names: Names of the stored tensors.

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
            # Codes first, whatever the order in the file.
            ordered = {each: parts[each] for each in sorted(parts, key=lambda each: each != "qdata")}
            plain = {key: _plain(value) for key, value in data.items()}
            yield Structure(name, kind, ordered, plain, _shape(plain.get("shape")), _dtype(plain.get("dtype")))


def described(metadata: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """Metadata of a file adapted to another set of tensors.

    A parameter under its own name is a plain tensor now, and a parameter without parts is removed.

    Args:
        metadata: Metadata of the header.
        names: Names of the tensors.

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
    """Attribute value; dtypes become their names."""
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
