"""The pickle interpreter for other packages: nodes, their descriptions, and a function that runs one pickle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.errors import TrailingBytes
from torchparams.render.tree import plural
from torchparams.sources.torchfile._describe import component_of, describe, plain_copy
from torchparams.sources.torchfile._pickle import Machine
from torchparams.sources.torchfile._pickle_values import Global, NumberKey, OddKey, Reduced
from torchparams.sources.torchfile._rebuild import CONSTRUCTORS
from torchparams.sources.torchfile._refs import DTYPES, SIZE_LIMIT, Storages, TensorRef

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "DTYPES",
    "SIZE_LIMIT",
    "Global",
    "NumberKey",
    "OddKey",
    "Pickled",
    "Reduced",
    "TensorRef",
    "component_of",
    "describe",
    "fields_of",
    "is_size",
    "plain_copy",
    "sizes_of",
    "unpickled",
]


class Pickled(NamedTuple):
    """Contents of a pickle; nothing was built.

    Attributes:
        root: The outermost node.
        imported: All globals that it names.
    """

    root: Any
    imported: list[Global]


def unpickled(data: bytes, label: str, weight: int) -> Pickled:
    """Run a pickle that is a whole file.

    Args:
        data: Contents of the file.
        label: Path of the file, for messages.
        weight: Bytes that the limit on operations is proportional to; see `limits.PICKLE_OPERATIONS`.

    Raises:
        FileFormatError: The file is not a pickle, or more than one.
        LimitExceeded: The pickle runs too many operations.
    """
    machine = Machine(data, len(data), label, CONSTRUCTORS, Storages.refuse, weight, in_file=True)
    root, end = machine.load(0)
    if end != len(data):
        raise TrailingBytes(
            f"{plural(len(data) - end, 'byte')} after the end of the pickle, at byte {end}", where=label
        )
    return Pickled(root, machine.imported)


def fields_of(node: Any, kind: str) -> Mapping[Any, Any] | None:
    """Attributes of an object of the torch class `kind`; None if it is not such an object."""
    if type(node) is Reduced:
        func, state = node.func, node.state
        if type(func) is Global and func.name == kind and func.module.startswith("torch.") and type(state) is dict:
            return state
    return None


def is_size(value: Any) -> bool:
    """Whether the value is a number of elements that torch can hold."""
    return type(value) is int and 0 <= value <= SIZE_LIMIT


def sizes_of(value: Any) -> tuple[int, ...] | None:
    """A shape or offsets as a tuple; None if it is not valid."""
    if (type(value) is not tuple and type(value) is not list) or len(value) > _DIMENSIONS:
        return None
    for size in value:
        if type(size) is not int or not 0 <= size <= SIZE_LIMIT:
            return None
    return tuple(value)


_DIMENSIONS = 64
