r"""Shapes of JSON values: what was seen, merged over examples, and compared with another value.

>>> shape = merged(shape_of({"a": 1, "b": []}), shape_of({"a": None, "b": ["x"]}))
>>> print("\n".join(lines(shape)))
a: integer or null
b: [text]
>>> [misfits(shape, {"a": 1}), misfits(shape, {"a": "x", "c": 0})]
[[], ['a: text', 'c']]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ORDER = ("boolean", "integer", "number", "text", "null")
ANY = "{name: …}"
"""Key of an object whose keys are names of the data."""


class Reference(str):
    """In place of a value that has a section of its own: the section's name."""


@dataclass(frozen=True)
class Shape:
    """The values that a field can have.

    Attributes:
        kinds: Kinds of scalars, a subset of `ORDER`.
        items: Shape of the items, if it can be a list; of an empty list, a shape without anything.
        keys: Shapes of the values by key, if it can be an object.
        sometimes: Keys that are not in every object.
    """

    kinds: frozenset[str] = frozenset()
    items: Shape | None = None
    keys: Mapping[str, Shape] | None = None
    sometimes: frozenset[str] = field(default_factory=frozenset)


NOTHING = Shape()


def shape_of(value: Any, named: Callable[[str], bool] = lambda key: False) -> Shape:
    """The shape of one value.

    Args:
        value: A value as `json.loads` gives it.
        named: Whether a key is a name of the data, which any data replaces by its own.
    """
    if isinstance(value, Mapping):
        keys: dict[str, Shape] = {}
        for key, each in value.items():
            key = ANY if named(key) else key
            keys[key] = merged(keys.get(key, NOTHING), shape_of(each, named))
        return Shape(keys=keys)
    if isinstance(value, list):
        items = NOTHING
        for each in value:
            items = merged(items, shape_of(each, named))
        return Shape(items=items)
    return Shape(frozenset((_kind(value),)))


def merged(a: Shape, b: Shape) -> Shape:
    """A shape that fits values of either of two shapes."""
    items = a.items if b.items is None else b.items if a.items is None else merged(a.items, b.items)
    keys, sometimes = a.keys, a.sometimes | b.sometimes
    if keys is None:
        keys = b.keys
    elif b.keys is not None:
        sometimes |= keys.keys() ^ b.keys.keys()
        keys = {key: merged(keys.get(key, NOTHING), b.keys.get(key, NOTHING)) for key in (*keys, *b.keys)}
    return Shape(a.kinds | b.kinds, items, keys, sometimes)


def misfits(shape: Shape, value: Any, path: str = "") -> list[str]:
    """Places of a value that a shape does not have, each with what is there.

    A shape of null alone, and an empty list or object, fit any value: the examples did not show more.
    """
    if shape.kinds <= {"null"} and shape.items in (None, NOTHING) and not shape.keys:
        return []
    if isinstance(value, Mapping):
        if shape.keys is None:
            return [f"{path}: object"] if value else []
        found = []
        for key, each in value.items():
            inner = shape.keys.get(key, shape.keys.get(ANY))
            where = f"{path}.{key}".lstrip(".")
            found += [where] if inner is None else misfits(inner, each, where)
        return found
    if isinstance(value, list):
        if shape.items is None:
            return [f"{path}: list"]
        return [line for each in value for line in misfits(shape.items, each, f"{path}[]")]
    kind = _kind(value)
    fits = kind in shape.kinds or (kind == "integer" and "number" in shape.kinds)
    return [] if fits else [f"{path}: {kind}"]


def lines(shape: Shape, indent: str = "") -> list[str]:
    """The shape in lines, as the page shows it."""
    return [
        line for key, each in (shape.keys or {}).items() for line in _keyed(key, each, key in shape.sometimes, indent)
    ]


def _keyed(key: str, shape: Shape, optional: bool, indent: str) -> list[str]:
    head = f"{indent}{key}{'?' if optional and key != ANY else ''}:"
    scalars = _scalars(shape)
    more = f" or {scalars}" if scalars else ""
    depth, inner = 0, shape
    while inner.items is not None and inner.keys is None and (not inner.kinds or not depth):
        depth, inner = depth + 1, inner.items
    if depth and inner.keys:
        return [f"{head} {'[' * depth}", *lines(inner, indent + "  "), f"{indent}{']' * depth}{more}"]
    if shape.keys:
        return [f"{head}{f' {scalars}, or' if scalars else ''}", *lines(shape, indent + "  ")]
    return [f"{head} {_phrase(shape)}"]


def _phrase(shape: Shape) -> str:
    parts = [] if shape.items is None else [f"[{_phrase(shape.items) if shape.items != NOTHING else '…'}]"]
    parts += [] if shape.keys is None else ["{}"]
    return " or ".join((*parts, *filter(None, (_scalars(shape),))))


def _scalars(shape: Shape) -> str:
    kinds = shape.kinds - {"integer"} if "number" in shape.kinds else shape.kinds
    return " or ".join(sorted(kinds, key=lambda kind: (ORDER.index(kind) if kind in ORDER else -1, kind)))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, Reference):
        return str(value)
    return "number" if isinstance(value, float) or value in ("nan", "inf", "-inf") else "text"
