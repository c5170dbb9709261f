"""Natural order of names: numbers compare by value, so that `layers.2` comes before `layers.10`."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

T = TypeVar("T")


def natural_key(name: str) -> str:
    """Sort key that compares numbers in a name by value.

    >>> sorted(["layers.10.w", "layers.2.w", "layers-norm", "layers.w"], key=natural_key)
    ['layers.2.w', 'layers.10.w', 'layers.w', 'layers-norm']
    """
    return "\0".join(_NUMBER.sub(lambda found: _number_key(found[0]), component) for component in name.split("."))


def natural(names: Iterable[str]) -> list[str]:
    """Sort names as in a tree: numbers by value, otherwise modules and tensors by first occurrence.

    File order is often alphabetical or by dtype, which gives layers 0, 1, 10, 2. Names that differ in words keep file
    order, which for a state dict is the order of the model.

    >>> natural(["h.10.w", "h.9.w", "h.9.b", "h.10.b", "embed"])
    ['h.9.w', 'h.9.b', 'h.10.w', 'h.10.b', 'embed']
    """
    tree = _Tree()
    # Equal beginnings and equal layers make up most of a network: each beginning and ending is parsed once.
    beginnings: dict[str, tuple[int, str, dict[str, str]]] = {}
    endings: dict[int, dict[str, str]] = {}
    keys = []
    listed = list(names)
    for name in listed:
        dot = name.rfind(".", 0, name.rfind("."))
        if dot < 0:
            keys.append(tree.key(0, name)[1])
            continue
        known = beginnings.get(name[:dot])
        if known is None:
            node, key = tree.key(0, name[:dot])
            known = beginnings[name[:dot]] = (node, key, endings.setdefault(node, {}))
        node, key, below = known
        ending = below.get(name[dot:])
        if ending is None:
            ending = below[name[dot:]] = tree.key(node, name[dot + 1 :])[1]
        keys.append(key + ending)
    return [listed[i] for i in sorted(range(len(listed)), key=keys.__getitem__)]


class _Tree:
    """Tree of modules and tensors; layers that differ only in numbers share a node."""

    def __init__(self) -> None:
        self._children: list[dict[str, tuple[int, str]]] = [{}]
        self._components: dict[str, tuple[str, str]] = {}

    def key(self, node: int, path: str) -> tuple[int, str]:
        """Node at the end of a path from another node, and a sort key of the path."""
        key = ""
        for component in path.split("."):
            known = self._components.get(component)
            if known is None:
                numbers = "".join(map(_number_key, _NUMBER.findall(component)))
                known = self._components[component] = (_NUMBER.sub("\0", component), numbers)
            siblings = self._children[node]
            child = siblings.get(known[0])
            if child is None:
                child = siblings[known[0]] = (len(self._children), _number_key(str(len(siblings))))
                self._children.append({})
            node, rank = child
            key += rank + known[1]
        return node, key


def naturally(found: Mapping[str, T]) -> Mapping[str, T]:
    """Read-only copy of a mapping with names in natural order.

    >>> list(naturally({"h.10": 1, "h.9": 2}))
    ['h.9', 'h.10']
    """
    names = natural(found)
    same = names == list(found)  # usually the same string objects, which compare fast
    return MappingProxyType(found if same else {name: found[name] for name in names})


def in_order(found: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """Items of a mapping in the order of `names`, which may contain more.

    >>> in_order({"b": 1, "a": 2}, ["a", "b", "c"])
    {'a': 2, 'b': 1}
    """
    return {name: found[name] for name in names if name in found}


_NUMBER = re.compile("[0-9]+")
_LONGEST = 1000  # numbers with more digits compare equal in length


def _number_key(number: str) -> str:
    digits = number.lstrip("0") or "0"
    return chr(ord("0") + min(len(digits), _LONGEST)) + digits  # the number of digits decides before the digits
