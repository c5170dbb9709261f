"""The quantised parameters of a live network, decoded from the tensors that their class or layer keeps."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torchparams.sources.decoded import DecodedSource
from torchparams.sources.live.parts import may_have_parts, take_apart
from torchparams.sources.mapping import MappingSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from torchparams.encodings.base import Structure
    from torchparams.sources.base import Source
    from torchparams.sources.live.parts import Parts
    from torchparams.sources.live.tensors import LiveReading


class PartsSource(MappingSource):
    """The stored tensors of one parameter of a live network.

    Args:
        parts: The tensors.
        label: Label of the network.
    """

    def __init__(self, parts: Parts, label: str) -> None:
        super().__init__(parts.tensors, label)
        self._structure = parts.structure

    @property
    def structures(self) -> Sequence[Structure]:
        """How the tensors belong together, if names do not tell."""
        return () if self._structure is None else (self._structure,)


def decoded_parts(name: str, value: Any, owner: nn.Module, label: str) -> DecodedSource | None:
    """A source of one quantised parameter; None for a plain parameter or an unknown class.

    Args:
        name: Canonical name.
        value: The tensor.
        owner: The module that holds it.
        label: Label of the network.
    """
    parts = take_apart(name, value, owner)
    if parts is None:
        return None
    source = DecodedSource(PartsSource(parts, label))
    source.live = False  # it is made for one reading
    info = source.infos().get(name)
    return None if info is None or info.encoded is None else source


def quantised(rows: Iterable[tuple[str, Any, nn.Module]], label: str) -> dict[str, DecodedSource]:
    """Sources of the supported quantised parameters, by canonical name.

    Args:
        rows: Canonical name, tensor and owner of all tensors.
        label: Label of the network.
    """
    found: dict[str, DecodedSource] = {}
    candidates: dict[type, bool] = {}
    for name, value, owner in rows:
        cls = type(value)
        candidate = candidates.get(cls)
        if candidate is None:
            candidate = candidates[cls] = may_have_parts(cls)
        if candidate or value.is_quantized:
            source = decoded_parts(name, value, owner, label)
            if source is not None:
                found[name] = source
    return found


class StoredModule(MappingSource):
    """The tensors of a live network, with the stored tensors of each quantised parameter.

    Args:
        source: Source of the network.
        read: Callable that returns a reading of it.
    """

    format = "module"

    def __init__(self, source: Source, read: Callable[[], LiveReading]) -> None:
        self.source, self.read = source, read
        super().__init__(_StoredTensors(read), source.label)

    def __eq__(self, other: object) -> bool:
        return self.source == other.source if isinstance(other, StoredModule) else NotImplemented

    def __hash__(self) -> int:
        return hash((StoredModule, self.source))

    @property
    def structures(self) -> Sequence[Structure]:
        """How the stored tensors belong together, if names do not tell."""
        return [each for parts in self.read().quantised.values() for each in parts.stored.structures]


class _StoredTensors(Mapping[str, Any]):
    """Name → tensor, read at each use."""

    def __init__(self, read: Callable[[], LiveReading]) -> None:
        self._read = read

    def _now(self) -> dict[str, Any]:
        reading = self._read()
        found: dict[str, Any] = {}
        for name, tensor in reading.tensors.items():
            parts = reading.quantised.get(name)
            found |= {name: tensor} if parts is None else dict(parts.stored.items())
        return found

    def __getitem__(self, name: str) -> Any:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def items(self) -> ItemsView[str, Any]:
        """All entries, from one reading."""
        return self._now().items()
