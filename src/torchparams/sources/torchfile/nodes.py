"""What a pickle holds, for the sources of other rooms: its nodes, the words for them, and a machine for one pickle."""

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
    """What a pickle holds; nothing of it was made.

    Attributes:
        root: The outermost node.
        imported: Every global that it names.
    """

    root: Any
    imported: list[Global]


def unpickled(data: bytes, label: str, weight: int) -> Pickled:
    """Run a pickle that is a file of its own.

    Args:
        data: The file.
        label: Its path, for messages.
        weight: Bytes that the allowance of operations grows with: see `limits.PICKLE_OPERATIONS`.

    Raises:
        FileFormatError: It is no pickle, or more than one.
        LimitExceeded: It runs too many operations.
    """
    machine = Machine(data, len(data), label, CONSTRUCTORS, Storages.refuse, weight, in_file=True)
    root, end = machine.load(0)
    if end != len(data):
        raise TrailingBytes(
            f"{plural(len(data) - end, 'byte')} after the end of the pickle, at byte {end}", where=label
        )
    return Pickled(root, machine.imported)


def fields_of(node: Any, kind: str) -> Mapping[Any, Any] | None:
    """The attributes of an object of torch's class of that name; None where it is no such object."""
    if type(node) is Reduced:
        func, state = node.func, node.state
        if type(func) is Global and func.name == kind and func.module.startswith("torch.") and type(state) is dict:
            return state
    return None


def is_size(value: Any) -> bool:
    """Whether it is a count that torch can hold."""
    return type(value) is int and 0 <= value <= SIZE_LIMIT


def sizes_of(value: Any) -> tuple[int, ...] | None:
    """A shape or offsets as a tuple; None where it is none."""
    if (type(value) is not tuple and type(value) is not list) or len(value) > _DIMENSIONS:
        return None
    for size in value:
        if type(size) is not int or not 0 <= size <= SIZE_LIMIT:
            return None
    return tuple(value)


_DIMENSIONS = 64
