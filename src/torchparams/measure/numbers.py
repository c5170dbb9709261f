"""Sort rows of a table by a column."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from torchparams.errors import SelectorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Keys = Mapping[str, Callable[[Any], Any]]

Each = TypeVar("Each")


def sort_key(keys: Keys, by: str) -> Callable[[Any], Any]:
    """Sort key for a column.

    Args:
        keys: Column name → function from a row to its value.
        by: Column name, with an optional leading `-`.

    Raises:
        SelectorError: There is no such column.
    """
    key = by.removeprefix("-")
    if key not in keys:
        raise SelectorError(f"no column {key!r} to sort by", exists="columns are " + ", ".join(keys))
    return keys[key]


def in_order(rows: Iterable[Each], keys: Keys, by: str) -> tuple[Each, ...]:
    """Sort rows by a column, descending with a leading `-`. NaN comes last.

    >>> in_order([1.0, float("nan"), 2.0], {"value": lambda row: row}, "-value")
    (2.0, 1.0, nan)

    Raises:
        SelectorError: There is no such column.
    """
    value = sort_key(keys, by)
    numbers: list[Each] = []
    others: list[Each] = []
    for row in rows:
        found = value(row)
        (others if isinstance(found, float) and math.isnan(found) else numbers).append(row)
    return (*sorted(numbers, key=value, reverse=by.startswith("-")), *others)
