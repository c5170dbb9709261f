"""Descriptions and plain values for the contents of a pickle that are not tensors; nothing is executed."""

from __future__ import annotations

from typing import Any

from torchparams.errors import shorten
from torchparams.sources.torchfile._pickle_values import Blob, Global, NumberKey, OddKey, Reduced
from torchparams.sources.torchfile._refs import ArrayRef, NumpyType, StorageRef, TensorRef

_PLAIN_BITS = 1024  # longer integers are described: Python refuses to print one of some thousand digits


def describe(value: Any, depth: int = 2) -> str:
    """A short description of a value that is not plain; nothing is executed."""
    kind = type(value)
    if kind is int and value.bit_length() > _PLAIN_BITS:
        return f"an integer of {value.bit_length():,} bits"
    if kind in (str, int, float, bool, complex, type(None)):
        return shorten(repr(value[:100] if kind is str else value))
    if kind is bytes or kind is Blob:
        return f"{len(value):,} bytes"
    if kind is Global:
        return repr(value)
    if kind is TensorRef:
        shape = "lazy" if value.shape is None else " × ".join(map(str, value.shape)) or "scalar"
        return f"a tensor, {value.dtype} {shorten(shape)}"
    if kind is ArrayRef:
        return describe(value.tensor) if value.tensor is not None else "a numpy array that is not numeric"
    if kind is StorageRef:
        return f"a storage of {value.numel:,} × {value.dtype}"
    if kind is NumpyType:
        return f"numpy.dtype({value.spelling!r})"
    if kind is OddKey:
        return describe(value.value, depth)
    if kind in (dict, list, tuple):
        count = "1 item" if len(value) == 1 else f"{len(value):,} items"
        return f"a {kind.__name__} of {count}"
    if kind is Reduced:
        return _describe_call(value, depth)
    return f"a {kind.__name__}"


def _describe_call(node: Reduced, depth: int) -> str:
    if depth == 0:
        return f"{class_name(node)}(…)"
    said = []
    if type(node.args) is tuple:
        said += [describe(arg, depth - 1) for arg in node.args[:6]]
    for part in attributes_of(node):
        said += [
            f"{shorten(component_of(key)[:80], 40)}={describe(part[key], depth - 1)}"
            for key, _ in zip(part, range(8), strict=False)
        ]
    return shorten(f"{class_name(node)}({', '.join(said)})", 200)


def component_of(key: Any) -> str:
    kind = type(key)
    if kind is str:
        return key  # type: ignore[no-any-return]  # its type was just looked at
    if kind is bytes:
        return key.decode("utf-8", "backslashreplace")  # type: ignore[no-any-return]
    if kind is OddKey:
        return describe(key.value)
    return str(key.value if kind is NumberKey else key)


def plain_copy(value: Any, depth: int, budget: list[int]) -> Any:
    kind = type(value)
    if kind in (str, bool, float, type(None)):
        return value
    if kind is int:
        return value if value.bit_length() <= _PLAIN_BITS else describe(value)
    if kind not in (dict, list, tuple) or depth == 0:
        return describe(value)
    budget[0] -= len(value) + 1
    if budget[0] < 0:
        return None
    if kind is dict:
        return {component_of(key): plain_copy(item, depth - 1, budget) for key, item in value.items()}
    return [plain_copy(item, depth - 1, budget) for item in value]


def class_name(node: Reduced) -> str:
    return repr(node.func) if type(node.func) is Global else "something that was to be called"


def attributes_of(node: Reduced) -> list[dict[Any, Any]]:
    """The attribute dicts of an object: its `__dict__`, and its slots if it has any."""
    state = node.state
    if type(state) is tuple and len(state) == 2:  # how copyreg spells an object with slots
        parts = [part for part in state if part is not None]
        return parts if all(type(part) is dict for part in parts) else []
    return [state] if type(state) is dict else []
