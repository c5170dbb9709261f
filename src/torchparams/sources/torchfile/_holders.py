"""References between the parts of a pickle, and the containers that hold tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from torchparams.sources.torchfile._pickle_values import Blob, Global, OddKey, Reduced
from torchparams.sources.torchfile._refs import NumpyType, TensorRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEAVES = frozenset({str, int, float, bool, type(None), bytes, complex, Global, Blob, OddKey, NumpyType})
"""Types that refer to nothing."""

_CONTAINERS = (dict, list, tuple)

Child: TypeAlias = tuple[str, Any, str | None, str | None]
"""Component of the name, value, kind and module."""

TensorOf: TypeAlias = "Callable[[Any], TensorRef | None]"
"""Function from a node to its tensor, if it is one."""


class _Parents(list[Any]):
    """Several parents: a separate type, because a parent may be a list."""


def find_holders(root: Any, tensor: TensorOf) -> tuple[set[int], int]:
    """Ids of all containers that hold a tensor at any depth, and the number of references seen."""
    # Most have one parent; a list is created only for several.
    parents: dict[int, Any] = {id(root): None}
    found: list[Any] = []
    edges = 0
    stack = [root]
    while stack:
        node = stack.pop()
        if tensor(node) is not None:
            continue  # its parts are the tensor
        holds = False
        for child in parts(node):
            edges += 1
            kind = type(child)
            if kind in LEAVES:
                continue
            if kind is TensorRef or tensor(child) is not None:
                holds = True
                continue
            if not child and kind in _CONTAINERS:
                continue
            known = parents.get(id(child), parents)
            if known is parents:
                stack.append(child)
            if known is parents or known is None:
                parents[id(child)] = node
            elif type(known) is _Parents:
                known.append(node)
            else:
                parents[id(child)] = _Parents((known, node))
        if holds:
            found.append(node)
    holders: set[int] = set()
    while found:
        node = found.pop()
        if id(node) not in holders:
            holders.add(id(node))
            above = parents[id(node)]
            if type(above) is _Parents:
                found.extend(above)
            elif above is not None:
                found.append(above)
    return holders, edges


def parts(node: Any) -> Iterator[Any]:
    """Yield everything that `node` refers to."""
    kind = type(node)
    if kind is dict:
        yield from node.values()
    elif kind is list or kind is tuple:
        yield from node
    elif kind is Reduced:
        yield from (node.func, node.args, node.state, node.items, node.pairs)
    elif kind is TensorRef and node.storage is None:
        yield node.state
