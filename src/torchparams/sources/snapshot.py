"""A snapshot of a live source: names, infos and tensors of one reading."""

from __future__ import annotations

from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.io.live import read_only_copy
from torchparams.reading import Reading
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
    """A live source at one point in time: its names, infos and tensors do not change afterwards.

    Tensors are not copied, so in-place changes to their values show.

    Args:
        source: The live source.
        reading: A reading of it, or of a part of it.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> weights = {"w": np.zeros(3)}
    >>> snapshot = tp.of(weights).snapshot()
    >>> weights["b"] = np.ones(1)
    >>> snapshot.names, tp.of(weights).names
    (['w'], ['w', 'b'])
    """

    def __init__(self, source: Source, reading: Reading) -> None:
        self.label = source.label
        self.format = source.format
        self._infos = {info.name: info for info in reading.infos}
        self._tensors = dict(source.items(self._infos) if reading.tensors is None else reading.tensors)
        self._coded = {name: code for name, code in source.coded().items() if name in self._infos}
        self._left_out = source.left_out
        self._metadata = dict(source.metadata)
        self._why_empty = () if self._infos else tuple(source.why_empty())

    @property
    def borrowed(self) -> bool:
        """True: the tensors belong to the model."""
        return True

    # --- listing ---------------------------------------------------------------------------

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Map canonical names to infos."""
        return MappingProxyType(self._infos)

    def reading(self) -> Reading:
        """The reading itself."""
        reading = Reading(self._infos.values())
        reading.tensors = self._tensors
        return reading

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Yield canonical name and tensor of every entry, or of `names`."""
        return iter(self._tensors.items()) if names is None else ((name, self._tensors[name]) for name in names)

    def coded(self, known: Reading | None = None) -> Mapping[str, Coded]:
        """Tensors that held codes instead of values."""
        return self._coded

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the source."""
        return self._metadata

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the source that its table did not list."""
        return self._left_out

    def why_empty(self) -> list[str]:
        """Sentences that explain why the source listed no tensors."""
        return list(self._why_empty)

    # --- values ----------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """The tensor or array itself, under any of its names."""
        found = self._tensors.get(name)
        return self._tensors[self.resolve(name)] if found is None else found

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, detached; it shares memory.

        Raises:
            NotReadable: torch has no such dtype.
        """
        return self._alone(name).tensor(name)

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Values as a read-only array: a view of the memory if possible.

        Raises:
            NotReadable: The tensor has no values (lazy, meta), or its class does not give them.
        """
        return MappingSource({name: self.tensor(name)}, self.label).numpy(name)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of the values, which stays valid if the memory of the tensor is freed.

        Raises:
            NotReadable: See `numpy`.
        """
        return read_only_copy(self.numpy(name))

    def _alone(self, name: str) -> MappingSource:
        return MappingSource({name: self.value(name)}, self.label)

    # --- names -----------------------------------------------------------------------------

    def find(self, name: str) -> str | None:
        """Canonical name for a canonical name, raw name or alias."""
        return name if name in self._infos else self._spelled.get(name)

    @cached_property
    def _spelled(self) -> dict[str, str]:
        return {other: info.name for info in self._infos.values() for other in (info.raw_name, *info.aliases)}
