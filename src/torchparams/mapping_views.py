"""Views of the names and tensors of a table; each reads its source once, at first use."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.sources.base import Source


class Keys(KeysView[str]):
    """View of the names of a table.

    Args:
        table: Table.
        read: Reads the table: returns a mapping with the names as keys.
    """

    def __init__(self, table: Mapping[str, Any], read: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__(table)
        self._read = read

    @cached_property
    def _reading(self) -> Mapping[str, Any]:
        return self._read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reading)

    def __len__(self) -> int:
        return len(self._reading)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._reading


class _Held:
    """Reading that a view of tensors holds: the tensors of a live source, or the names of any other.

    Args:
        table: Table.
        source: Source of the table.
        read: Reads the table.
    """

    _mapping: Mapping[str, Any]

    def __init__(self, table: Mapping[str, Any], source: Source, read: Callable[[], Mapping[str, Any]]) -> None:
        self._mapping = table
        self._source = source
        self._read = read

    @cached_property
    def _reading(self) -> Mapping[str, Any]:
        return self._read()

    def _pairs(self) -> Iterator[tuple[str, Any]]:
        if self._source.live:
            return iter(self._reading.items())
        return self._source.items(self._reading)

    def __len__(self) -> int:
        return len(self._reading)


class Items(_Held, ItemsView[str, Any]):
    """View of the names and tensors of a table."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self._pairs()

    def __contains__(self, pair: object) -> bool:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            return False
        name, value = pair
        if name not in self._reading:
            return False
        if self._source.live:
            return self._reading[name] is value  # identity, as for values
        return bool(self._mapping[name] == value)


class Values(_Held, ValuesView[Any]):
    """View of the tensors of a table."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self._reading.values()) if self._source.live else (value for _, value in self._pairs())

    def __contains__(self, value: object) -> bool:
        # `==` of two tensors is a tensor, so membership means identity.
        return any(other is value for other in self)
