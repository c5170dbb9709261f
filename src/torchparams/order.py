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
    listed = list(names)
    keys: list[str] = []
    # Neighbours mostly share a beginning, and equal layers share endings: each is parsed once.
    endings: dict[int, dict[str, str]] = {}
    start, size, key = "", 0, ""
    below: dict[str, str] = {}
    for name in listed:
        if name.startswith(start):
            ending = below.get(name[size:])
            if ending is not None:
                keys.append(key + ending)
                continue
        size = name.rfind(".", 0, name.rfind(".", 0, name.rfind("."))) + 1  # three components are the ending
        start = name[:size]
        node, key = tree.module(start[:-1]) if size else (0, "")
        below = endings.get(node) or endings.setdefault(node, {})
        ending = below.get(name[size:])
        if ending is None:
            ending = below[name[size:]] = tree.key(node, name[size:])[1]
        keys.append(key + ending)
    return [listed[i] for i in sorted(range(len(listed)), key=keys.__getitem__)]


class _Tree:
    """Tree of modules and tensors; layers that differ only in numbers share a node."""

    def __init__(self) -> None:
        self._children: list[dict[str, tuple[int, str]]] = [{}]
        self._components: dict[str, tuple[str, str]] = {}
        self._modules: dict[str, tuple[int, str]] = {}

    def module(self, path: str) -> tuple[int, str]:
        """Cached `key` of a path from the root."""
        found = self._modules.get(path)
        if found is None:
            above, dot, last = path.rpartition(".")
            known = self._modules.get(above) if dot else (0, "")
            if known is None:
                known = self._modules[above] = self.key(0, above)
            node, key = self._child(known[0], last)
            found = self._modules[path] = node, known[1] + key
        return found

    def key(self, node: int, path: str) -> tuple[int, str]:
        """Node at the end of a path from another node, and a sort key of the path."""
        key = ""
        for component in path.split("."):
            node, part = self._child(node, component)
            key += part
        return node, key

    def _child(self, node: int, component: str) -> tuple[int, str]:
        known = self._components.get(component)
        if known is None:
            word = component.rstrip("0123456789")
            if not word or word.isalpha():  # nearly all: a word, and a number
                known = (word, "") if word == component else (word + "\0", _number_key(component[len(word) :]))
            else:
                parts = _NUMBERS.split(component)  # words and numbers by turns
                known = "\0".join(parts[::2]), "".join(map(_number_key, parts[1::2]))
            self._components[component] = known
        siblings = self._children[node]
        child = siblings.get(known[0])
        if child is None:
            child = siblings[known[0]] = (len(self._children), _number_key(str(len(siblings))))
            self._children.append({})
        return child[0], child[1] + known[1]


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
_NUMBERS = re.compile("([0-9]+)")
_LONGEST = 1000  # numbers with more digits compare equal in length


def _number_key(number: str) -> str:
    digits = number.lstrip("0") or "0"
    return chr(ord("0") + min(len(digits), _LONGEST)) + digits  # the number of digits decides before the digits
