"""Tensors of a pickle in every form that files use, including those of old versions of torch."""

from __future__ import annotations

from typing import Any

from torchparams.sources.torchfile._pickle_values import Global, Reduced
from torchparams.sources.torchfile._refs import ArrayRef, StorageRef, TensorRef, fits


class Tensors:
    """Tensors of a pickle by their node; each is made once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, TensorRef | None]] = {}

    def of(self, node: Any) -> TensorRef | None:
        """`node` as a tensor, in any of the forms that files use."""
        kind = type(node)
        if kind is TensorRef:
            return node  # type: ignore[no-any-return]  # its type was just looked at
        if kind is ArrayRef:
            return node.tensor  # type: ignore[no-any-return]
        if kind is not StorageRef and kind is not Reduced:
            return None
        known = self._known.get(id(node))
        if known is None:
            made = _storage_tensor(node) if kind is StorageRef else _old_tensor(node)
            known = self._known[id(node)] = (node, made)  # with the node, which keeps its id taken
        return known[1]


def _storage_tensor(storage: StorageRef) -> TensorRef:
    return TensorRef(storage, storage.dtype, 0, (storage.numel,), (1,))


def _old_tensor(node: Reduced) -> TensorRef | None:
    """A tensor or parameter as pickled by torch before version 0.4: a class and a state."""
    func = node.func
    if type(func) is not Global or func.name not in ("Parameter", "Variable"):
        return _old_data(node)
    for values in (node.state, node.args):
        if type(values) is tuple and values:
            data = values[0] if type(values[0]) is TensorRef else _old_data(values[0])
            if data is not None:
                flags = [value for value in values[1:4] if type(value) is bool]
                is_parameter = func.name == "Parameter"
                return data.replaced(is_parameter=is_parameter, requires_grad=flags[0] if flags else is_parameter)
    return None


def _old_data(node: Any) -> TensorRef | None:
    """`torch.FloatTensor` with the state `(storage, offset, shape, stride)`."""
    if type(node) is not Reduced or type(node.func) is not Global or type(node.state) is not tuple:
        return None
    if not node.func.module.startswith("torch") or not node.func.name.endswith("Tensor") or len(node.state) != 4:
        return None
    storage, offset, shape, stride = node.state
    if type(storage) is not StorageRef or not fits(offset, shape, stride):
        return None
    return TensorRef(storage, storage.dtype, offset, shape, stride)
