"""What one reading of a live source found, kept: names, records and tensors that no later change of the model moves."""

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.io.live import read_only_copy
from torchparams.records import Records
from torchparams.sources.base import Source
from torchparams.sources.mapping import MappingSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import numpy as np
    import torch

    from torchparams.encodings.companions import Coded
    from torchparams.info import ParameterInfo
    from torchparams.left_out import LeftOut


class SnapshotSource(Source):
    """A live source as it was: the same names and records at every use, and the very tensors that it held.

    Tensors are referred to, not copied: what is written into one shows in its values.

    Args:
        source: The live source.
        records: A reading of it, or of a part of it.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> weights = {"w": np.zeros(3)}
    >>> snapshot = tp.of(weights).snapshot()
    >>> weights["b"] = np.ones(1)
    >>> snapshot.names, tp.of(weights).names
    (['w'], ['w', 'b'])
    """

    def __init__(self, source: Source, records: Records) -> None:
        self.label = source.label
        self.format = source.format
        self._infos = {info.name: info for info in records.infos}
        self._tensors = dict(source.items(self._infos) if records.tensors is None else records.tensors)
        self._coded = {name: code for name, code in source.coded().items() if name in self._infos}
        self._left_out = source.left_out
        self._metadata = dict(source.metadata)
        self._why_empty = () if self._infos else tuple(source.why_empty())

    @property
    def borrowed(self) -> bool:
        """Its tensors are the model's own."""
        return True

    # --- listing ---------------------------------------------------------------------------

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Canonical name → record."""
        return MappingProxyType(self._infos)

    def records(self) -> Records:
        """The reading itself."""
        records = Records(self._infos.values())
        records.tensors = self._tensors
        return records

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Canonical name and tensor of every entry, or of `names`."""
        return iter(self._tensors.items()) if names is None else ((name, self._tensors[name]) for name in names)

    def coded(self, known: Records | None = None) -> Mapping[str, Coded]:
        """The tensors whose elements were no values by themselves."""
        return self._coded

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the source said of itself."""
        return self._metadata

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the source that its table did not list."""
        return self._left_out

    def why_empty(self) -> list[str]:
        """Sentences that say why the source listed nothing."""
        return list(self._why_empty)

    # --- values ----------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """The very tensor or array, under any of its names."""
        found = self._tensors.get(name)
        return self._tensors[self.resolve(name)] if found is None else found

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor without its history; it shares the memory.

        Raises:
            NotReadable: torch has no such type.
        """
        return self._alone(name).tensor(name)

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """The values as a read-only array: a view of the memory that they lie in, where that is possible.

        Raises:
            NotReadable: It has no values (lazy, meta), or its class keeps them to itself.
        """
        return MappingSource({name: self.tensor(name)}, self.label).numpy(name)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of the values: whoever frees the tensor's memory leaves no array without it.

        Raises:
            NotReadable: See `numpy`.
        """
        return read_only_copy(self.numpy(name))

    def _alone(self, name: str) -> MappingSource:
        return MappingSource({name: self.value(name)}, self.label)

    # --- names -----------------------------------------------------------------------------

    def find(self, name: str) -> str | None:
        """The canonical name for any spelling of it: canonical, raw, or an alias."""
        return name if name in self._infos else self._spelled.get(name)

    @cached_property
    def _spelled(self) -> dict[str, str]:
        return {other: info.name for info in self._infos.values() for other in (info.raw_name, *info.aliases)}
