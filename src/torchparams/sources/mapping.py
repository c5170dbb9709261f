"""A mapping in memory: a state dict, an optimizer state, or nested dicts and lists with tensors or arrays."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.encodings.companions import CODES
from torchparams.errors import LimitExceeded, NotReadable, SourceError, UnsupportedSource
from torchparams.io.live import read_only_copy
from torchparams.left_out import LeftOut, state_of_layer
from torchparams.reading import Lone, Reading
from torchparams.sources._mapping_infos import Maker, MappingReading, aliases_of, is_array
from torchparams.sources.base import Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import torch

    from torchparams.encodings.base import Structure
    from torchparams.encodings.companions import Coded
    from torchparams.info import ParameterInfo

    Array = np.ndarray[Any, Any]

_CERTAIN = frozenset(("shape", "ndim", "numel", "nbytes", "dtype", "device", "owner"))
"""Fields that are equal for all names of a tensor, even if different objects show the same memory."""

Path = tuple[Any, ...]
"""Keys and indexes that lead to an entry."""


class MappingSource(Source):
    """Tensors and arrays in a mapping, named by their keys joined with dots.

    The mapping is read at every use, so changes show. Lists and tuples with tensors count as mappings of their indexes.
    Entries without tensors, including numpy scalars, are metadata. A tensor that occurs several times, as one object or
    as the same elements of the same memory, is listed once; its other names are aliases.

    Args:
        mapping: Mapping of keys to tensors, numpy arrays, nested mappings, or other values. Keys that are not str, such
            as those of an optimizer state, are converted with `str`.
        label: Name in tables and messages; by default, the class name.

    >>> import numpy as np
    >>> from torchparams.sources.mapping import MappingSource
    >>> source = MappingSource({"step": 3, "model": {"w": np.zeros(2), "b": np.ones(1)}})
    >>> list(source.infos()), dict(source.metadata)
    (['model.w', 'model.b'], {'step': 3})
    """

    format = "mapping"
    live = True

    def __init__(self, mapping: Mapping[Any, Any], label: str | None = None) -> None:
        self.mapping = mapping
        self.label = type(mapping).__name__ if label is None else label
        self._paths: Mapping[str, Path] = {}  # paths of the last listing; checked at each use

    # Tables made of one mapping at different times are tables of one source.
    def __eq__(self, other: object) -> bool:
        return self.mapping is other.mapping if isinstance(other, MappingSource) else NotImplemented

    def __hash__(self) -> int:
        return hash((MappingSource, id(self.mapping)))

    # --- listing ---------------------------------------------------------------------------

    def keys(self) -> Mapping[str, Any]:
        """Map canonical names to tensors or arrays, without making infos."""
        tensors, aliases, *_ = self._list()
        others = {other for names in aliases.values() for other in names}
        return {name: tensor for name, tensor in tensors.items() if name not in others} if others else tensors

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Yield canonical name and object of every tensor, or of `names`, at the time of the call."""
        tensors = self.keys()
        return iter(tensors.items()) if names is None else ((name, tensors[name]) for name in names)

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos at the time of the call.

        Raises:
            UnsupportedSource: An entry is an array of objects or a module.
            SourceError: Two entries have the same name.
        """
        reading = self.reading()
        return dict(zip(reading.names, reading.infos, strict=True))

    def reading(self) -> Reading:
        """One reading; fields are looked up when they are needed.

        Raises:
            UnsupportedSource, SourceError: See `infos`.
        """
        tensors, aliases, *_ = self._list()
        others = {other for names in aliases.values() for other in names}
        canonical = {name: tensor for name, tensor in tensors.items() if name not in others} if others else tensors
        return MappingReading(canonical, aliases, Maker(self.label))

    def info(self, name: str) -> ParameterInfo:
        """Info of one tensor, without making the others."""
        tensors, aliases, *_ = self._list()
        return Maker(self.label).make(name, tensors[name], tuple(aliases.get(name, ())))

    def alone(self, name: str) -> Lone | None:
        """The tensor or array `name`, without listing the others."""
        found = self._reach(name)
        if found is None:
            return None
        return Lone(Reading([Maker(self.label).make(name, found, ())]), _CERTAIN)

    def coded(self, known: Reading | None = None) -> Mapping[str, Coded]:
        """See `Source.coded`. Only dtypes are checked if no tensor has a dtype used for codes."""
        if known is None:
            dtype = Maker(self.label).dtype
            entries = [(name, value) for name, path, value in _leaves(self.mapping, self.label) if path is not None]
            if CODES.isdisjoint({dtype(*entry) for entry in entries}) and not any(_have_parts(entries)):
                return {}
        return super().coded(known)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Entries without tensors, unchanged."""
        return self._list()[2]

    @property
    def structures(self) -> Sequence[Structure]:
        """Tensors whose class keeps its values in other tensors, which are listed instead."""
        return self._list()[3]

    # --- values ----------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """The object in the mapping, under any of its names."""
        found = self._reach(name)
        return self.keys()[self.resolve(name)] if found is None else found

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, detached; an array as a tensor of the same memory where torch supports it.

        Raises:
            NotReadable: torch has no such dtype.
        """
        from torchparams.sources.totorch import from_numpy

        value = self.value(name)
        if is_array(value):
            return from_numpy(value, Maker(self.label).make(name, value, ()))
        detached: torch.Tensor = value.detach()
        return detached

    def numpy(self, name: str) -> Array:
        """Values as a read-only view of the memory; a copy if the byte order is foreign.

        Raises:
            NotReadable: The tensor is on the meta device, lazy or sparse, or numpy lacks its dtype.
        """
        value = self.value(name)
        array: Array
        if is_array(value):
            array = value.view() if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))
        else:
            from torch.nn.parameter import is_lazy

            from torchparams.sources.totorch import to_numpy

            try:
                if is_lazy(value):
                    raise NotReadable("a lazy parameter has no shape or values yet")
                array = to_numpy(value).view()
            except NotReadable as error:
                error.where = f"{self.label}: {name!r}"
                raise
        array.flags.writeable = False
        return array

    def array(self, name: str) -> Array:
        """Values that stay valid: a read-only view of an array, or a copy of a tensor, whose memory may be freed.

        Raises:
            NotReadable: See `numpy`.
        """
        values = self.numpy(name)
        return values if is_array(self.value(name)) else read_only_copy(values)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Entries that hold the state of a layer but are not tensors: extra state, packed weights."""
        return tuple(
            LeftOut(name, f"{type(value).__module__}.{type(value).__qualname__}", reason)
            for name, value in self._list()[2].items()
            if value is not None and (reason := state_of_layer(name, type(value).__name__))
        )

    # --- names -----------------------------------------------------------------------------

    def takes(self, name: str) -> bool:
        """Whether `name` currently leads to a tensor."""
        return self._reach(name) is not None

    def find(self, name: str) -> str | None:
        """Canonical name for any name of a tensor."""
        tensors, aliases, *_ = self._list()
        if name not in tensors:
            return None
        return next((canonical for canonical, others in aliases.items() if name in others), name)

    # --- the walk --------------------------------------------------------------------------

    def _reach(self, name: str) -> Any | None:
        """The tensor `name`, without listing the others; None if its path is not known."""
        here: Any = self.mapping
        for key in self._paths.get(name) or (name,):
            if isinstance(here, Mapping):
                here = here.get(key)  # indexing would add a missing key to a defaultdict
            elif isinstance(here, list | tuple) and isinstance(key, int) and key < len(here):
                here = here[key]
            else:
                return None
        if is_array(here):
            return here
        return here if _is_tensor(here) and not any(_have_parts([(name, here)])) else None

    def _list(self) -> tuple[dict[str, Any], dict[str, list[str]], dict[str, Any], list[Structure]]:
        """Tensors by name; other names by canonical name; metadata; tensors whose class keeps other tensors."""
        paths: dict[str, Path] = {}
        tensors: dict[str, Any] = {}
        metadata: list[tuple[str, Any]] = []
        reading = Maker(self.label)
        for name, path, value in _leaves(self.mapping, self.label):
            if path is None:
                metadata.append((name, value))
                continue
            if name in tensors:
                raise SourceError(
                    f"two tensors have the name {name!r} when keys are joined with dots",
                    where=self.label,
                    hint="pass one of the mappings inside",
                )
            reading.dtype(name, value)
            tensors[name], paths[name] = value, path
        self._paths = paths
        entries = list(tensors.items())
        apart = [name for (name, _), has_parts in zip(entries, _have_parts(entries), strict=True) if has_parts]
        structures: list[Structure] = []
        if apart:
            tensors, structures = _taken_apart(tensors, apart, self.label)
        return tensors, aliases_of(tensors), dict(metadata), structures


def _have_parts(entries: Iterable[tuple[str, Any]]) -> Iterator[bool]:
    """Whether each tensor may belong to a class that keeps its values in other tensors."""
    kinds: dict[type, bool] = {}
    for _, value in entries:
        cls = type(value)
        found = kinds.get(cls)
        if found is None:
            found = kinds[cls] = cls.__module__.startswith(("torchao.", "bitsandbytes."))
        yield found or getattr(value, "is_quantized", False)


def _taken_apart(
    tensors: Mapping[str, Any], names: Iterable[str], label: str
) -> tuple[dict[str, Any], list[Structure]]:
    """Replace tensors whose class keeps other tensors by those; return the structures too."""
    from torchparams.sources.live.parts import take_apart

    found = {name: parts for name in names if (parts := take_apart(name, tensors[name])) is not None}
    listed: dict[str, Any] = {}
    structures: dict[int, Structure] = {}
    for name, value in tensors.items():
        parts = found.get(name)
        known = structures.get(id(value))
        if parts is None:
            listed[name] = value
        elif known is not None:  # an alias
            structures[id(value)] = replace(known, aliases=(*known.aliases, name))
        else:
            if parts.structure is not None:
                structures[id(value)] = parts.structure
            clash = next((part for part in parts.tensors if part != name and part in tensors), None)
            if clash is not None:
                raise SourceError(f"{clash!r} is the name of a part of {name!r}, and of another tensor", where=label)
            listed |= parts.tensors
    return listed, list(structures.values())


_Frame = tuple[str, Any, Iterator[tuple[Any, Any]], int, int]


def _leaves(root: Any, label: str) -> Iterator[tuple[str, Path | None, Any]]:
    """Yield name, path and value of every tensor, in order; the path is None for metadata."""
    found: list[tuple[str, Path | None, Any]] = []
    kinds = _kinds()
    count = 0
    path: list[Any] = []
    on_path = {id(root)}
    # A container, its children, and the number of tensors and entries before it.
    stack: list[_Frame] = [("", root, _children(root), 0, 0)]
    while stack:
        prefix, node, children, tensors_before, found_before = stack[-1]
        for key, child in children:
            component = key if type(key) is str else str(key)
            name = f"{prefix}.{component}" if path else component
            if isinstance(child, kinds):
                found.append((name, (*path, key), child))
                count += 1
            elif isinstance(child, Mapping | list | tuple):
                if id(child) in on_path:
                    raise SourceError(f"the mapping contains itself, at {name!r}", where=label)
                if len(stack) >= limits.NESTING or len(found) > 10 * limits.ALIASES:
                    raise LimitExceeded(
                        f"the mapping is nested deeper than {limits.NESTING:,} levels"
                        if len(stack) >= limits.NESTING
                        else "shared mappings give it too many names",
                        where=label,
                        hint="pass one of the mappings inside",
                    )
                path.append(key)
                on_path.add(id(child))
                stack.append((name, child, _children(child), count, len(found)))
                break
            else:
                found.append((name, None, _plain(child, name, label)))
        else:
            stack.pop()
            on_path.discard(id(node))
            if stack:
                path.pop()
                if count == tensors_before:  # without a tensor, it is one metadata value
                    found[found_before:] = [(prefix, None, node)]
    return iter(found)


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    return iter(list(node.items()) if isinstance(node, Mapping) else list(enumerate(node)))


def _plain(value: Any, name: str, label: str) -> Any:
    if hasattr(value, "named_parameters") and hasattr(value, "state_dict"):
        raise UnsupportedSource(
            f"the entry {name!r} is a module, a {type(value).__name__}",
            where=label,
            hint="pass its state_dict(), or the module itself",
        )
    return value


# A package that is not imported has no instances, so no import is needed.


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _kinds() -> tuple[type, ...]:
    modules = sys.modules.get("torch"), sys.modules.get("numpy")
    return tuple(getattr(m, name) for m, name in zip(modules, ("Tensor", "ndarray"), strict=True) if m is not None)
