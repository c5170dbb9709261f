"""A mapping in memory: a state dict, an optimizer's state, or any nesting of dicts and lists with tensors or arrays."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.dtypes import DType
from torchparams.encodings.companions import CODES
from torchparams.errors import LimitExceeded, NotReadable, SourceError, TorchParamsError, UnsupportedSource
from torchparams.info import ParameterInfo, Storage, live_tensor, view_of
from torchparams.io.live import read_only_copy
from torchparams.left_out import LeftOut, state_of_layer
from torchparams.records import Lone, Records
from torchparams.sources.base import Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import torch

    from torchparams.encodings.base import Structure
    from torchparams.encodings.companions import Coded

    Array = np.ndarray[Any, Any]

_CERTAIN = frozenset(("shape", "ndim", "numel", "nbytes", "dtype", "device", "owner"))
"""The fields that all names of a tensor agree on: the same memory may stand there as different objects."""

Path = tuple[Any, ...]
"""The keys and indexes that lead to an entry."""


class MappingSource(Source):
    """The tensors and arrays in a mapping, under the keys that lead to them, joined by dots.

    The mapping is read anew at every use, so a change to it shows. Lists and tuples that hold tensors count as mappings
    of their indexes. Everything without a tensor in it, numpy's scalars too, is metadata. A tensor that stands in
    several places, as one object or as the same elements of the same memory, is listed at the first, and its other
    names are its aliases.

    Args:
        mapping: Keys → `torch.Tensor`s, numpy arrays, further mappings, anything. Keys that are no text are spelled
            with `str`, as those of an optimizer's state.
        label: What tables and messages call it; the class's name unless given.

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
        self._paths: Mapping[str, Path] = {}  # where names led at the last listing; a guess, checked at each use

    # Tables that were made at different times of one mapping are tables of one source.
    def __eq__(self, other: object) -> bool:
        return self.mapping is other.mapping if isinstance(other, MappingSource) else NotImplemented

    def __hash__(self) -> int:
        return hash((MappingSource, id(self.mapping)))

    # --- listing ---------------------------------------------------------------------------

    def keys(self) -> Mapping[str, Any]:
        """Canonical name → tensor or array; makes no records."""
        tensors, aliases, *_ = self._list()
        others = {other for names in aliases.values() for other in names}
        return {name: tensor for name, tensor in tensors.items() if name not in others} if others else tensors

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Canonical name and object of every entry, or of `names`, as they are at the time of the call."""
        tensors = self.keys()
        return iter(tensors.items()) if names is None else ((name, tensors[name]) for name in names)

    def infos(self) -> Mapping[str, ParameterInfo]:
        """The records, as they are at the time of the call.

        Raises:
            UnsupportedSource: An entry is of a kind that has no parameters: an array of objects, a module.
            SourceError: Two entries come to one name.
        """
        records = self.records()
        return dict(zip(records.names, records.infos, strict=True))

    def records(self) -> Records:
        """One reading, of which as much is looked up as is asked for.

        Raises:
            UnsupportedSource, SourceError: See `infos`.
        """
        tensors, aliases, *_ = self._list()
        others = {other for names in aliases.values() for other in names}
        canonical = {name: tensor for name, tensor in tensors.items() if name not in others} if others else tensors
        return _Reading(canonical, aliases, _Maker(self.label))

    def info(self, name: str) -> ParameterInfo:
        """The record of one entry; makes no others."""
        tensors, aliases, *_ = self._list()
        return _Maker(self.label).make(name, tensors[name], tuple(aliases.get(name, ())))

    def alone(self, name: str) -> Lone | None:
        """The tensor or array that `name` leads to, without a look at the others."""
        found = self._reach(name)
        if found is None:
            return None
        return Lone(Records([_Maker(self.label).make(name, found, ())]), _CERTAIN)

    def coded(self, known: Records | None = None) -> Mapping[str, Coded]:
        """See `Source.coded`. Where no entry has a type that codes have, nothing but the types is looked at."""
        if known is None:
            dtype = _Maker(self.label).dtype
            entries = [(name, value) for name, path, value in _leaves(self.mapping, self.label) if path is not None]
            if CODES.isdisjoint({dtype(*entry) for entry in entries}) and not any(_have_parts(entries)):
                return {}
        return super().coded(known)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Everything that holds no tensor, as it stands there."""
        return self._list()[2]

    @property
    def structures(self) -> Sequence[Structure]:
        """The tensors of classes that keep their values in others, which are listed by these."""
        return self._list()[3]

    # --- values ----------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """The very object that stands in the mapping, under any of its names."""
        found = self._reach(name)
        return self.keys()[self.resolve(name)] if found is None else found

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor without its history, or one of an array's memory where torch can take it.

        Raises:
            NotReadable: torch has no such type.
        """
        from torchparams.sources.totorch import from_numpy

        value = self.value(name)
        if _is_array(value):
            return from_numpy(value, _Maker(self.label).make(name, value, ()))
        detached: torch.Tensor = value.detach()
        return detached

    def numpy(self, name: str) -> Array:
        """The values as a read-only view of the memory they lie in; of a copy where the byte order is foreign.

        Raises:
            NotReadable: It is on the meta device, lazy, sparse, or of a type that numpy lacks.
        """
        value = self.value(name)
        array: Array
        if _is_array(value):
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
        """The values to keep: a read-only view of an array's memory, a copy of a tensor, whose memory may be freed.

        Raises:
            NotReadable: See `numpy`.
        """
        values = self.numpy(name)
        return values if _is_array(self.value(name)) else read_only_copy(values)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The entries that hold a layer's state and are no tensors: extra state, packed weights."""
        return tuple(
            LeftOut(name, f"{type(value).__module__}.{type(value).__qualname__}", reason)
            for name, value in self._list()[2].items()
            if value is not None and (reason := state_of_layer(name, type(value).__name__))
        )

    # --- names -----------------------------------------------------------------------------

    def takes(self, name: str) -> bool:
        """Whether `name` leads to a tensor now."""
        return self._reach(name) is not None

    def find(self, name: str) -> str | None:
        """The canonical name for any name of a tensor."""
        tensors, aliases, *_ = self._list()
        if name not in tensors:
            return None
        return next((canonical for canonical, others in aliases.items() if name in others), name)

    # --- the walk --------------------------------------------------------------------------

    def _reach(self, name: str) -> Any | None:
        """The tensor that `name` leads to, without a look at the others; None where that is not known."""
        here: Any = self.mapping
        for key in self._paths.get(name) or (name,):
            if isinstance(here, Mapping):
                here = here.get(key)  # indexing would put what is missing into a defaultdict
            elif isinstance(here, list | tuple) and isinstance(key, int) and key < len(here):
                here = here[key]
            else:
                return None
        if _is_array(here):
            return here
        return here if _is_tensor(here) and not any(_have_parts([(name, here)])) else None

    def _list(self) -> tuple[dict[str, Any], dict[str, list[str]], dict[str, Any], list[Structure]]:
        """Every name → tensor or array; canonical name → its other names; metadata; tensors that are taken apart."""
        paths: dict[str, Path] = {}
        tensors: dict[str, Any] = {}
        metadata: list[tuple[str, Any]] = []
        records = _Maker(self.label)
        for name, path, value in _leaves(self.mapping, self.label):
            if path is None:
                metadata.append((name, value))
                continue
            if name in tensors:
                raise SourceError(
                    f"two tensors come to the name {name!r} when keys are joined by dots",
                    where=self.label,
                    hint="pass one of the mappings inside",
                )
            records.dtype(name, value)
            tensors[name], paths[name] = value, path
        self._paths = paths
        entries = list(tensors.items())
        apart = [name for (name, _), has_parts in zip(entries, _have_parts(entries), strict=True) if has_parts]
        structures: list[Structure] = []
        if apart:
            tensors, structures = _taken_apart(tensors, apart, self.label)
        return tensors, _aliases(tensors), dict(metadata), structures


def _have_parts(entries: Iterable[tuple[str, Any]]) -> Iterator[bool]:
    """Whether each tensor may be of a class that keeps its values in other tensors."""
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
    """The tensors, some of them by the tensors that they keep their values in; and how those belong together."""
    from torchparams.sources.live.parts import take_apart

    found = {name: parts for name in names if (parts := take_apart(name, tensors[name])) is not None}
    listed: dict[str, Any] = {}
    structures: dict[int, Structure] = {}
    for name, value in tensors.items():
        parts = found.get(name)
        known = structures.get(id(value))
        if parts is None:
            listed[name] = value
        elif known is not None:  # the same object under another name
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
    """Name, path and value of every tensor, in order; a path of None marks metadata."""
    found: list[tuple[str, Path | None, Any]] = []
    kinds = _kinds()
    count = 0
    path: list[Any] = []
    on_path = {id(root)}
    # A container, its children, and how many tensors and entries there were before it.
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
                    raise SourceError(f"the mapping holds itself, at {name!r}", where=label)
                if len(stack) >= limits.NESTING or len(found) > 10 * limits.ALIASES:
                    raise LimitExceeded(
                        f"the mapping nests deeper than {limits.NESTING:,} levels"
                        if len(stack) >= limits.NESTING
                        else "mappings that are shared give it too many names",
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
                if count == tensors_before:  # without a tensor it is one value, whatever it is made of
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


# What is not imported has no instances: neither package needs to be asked for.


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _kinds() -> tuple[type, ...]:
    modules = sys.modules.get("torch"), sys.modules.get("numpy")
    return tuple(getattr(m, name) for m, name in zip(modules, ("Tensor", "ndarray"), strict=True) if m is not None)


# --- records ---------------------------------------------------------------------------------


class _Reading(Records):
    """The entries of one listing; their records are made when one is asked for.

    Args:
        entries: Canonical name → tensor or array.
        aliases: Canonical name → its other names, of those that have any.
        maker: Makes the records.
    """

    tensors: Mapping[str, Any]

    def __init__(self, entries: Mapping[str, Any], aliases: Mapping[str, list[str]], maker: _Maker) -> None:
        super().__init__(())
        self.tensors = entries
        self._tied, self._maker = aliases, maker

    @cached_property
    def names(self) -> list[str]:
        """The canonical names."""
        return list(self.tensors)

    @cached_property
    def infos(self) -> list[ParameterInfo]:
        """The records themselves, all of them."""
        make, tied = self._maker.make, self._tied
        return [make(name, value, tuple(tied.get(name, ()))) for name, value in self.tensors.items()]

    @property
    def raws(self) -> Iterable[tuple[int, str]]:
        """None: the names are spelled as the mapping spells them."""
        return ()

    @property
    def aliases(self) -> Iterable[tuple[int, str]]:
        """Place and alias, for every alias."""
        tied = self._tied
        return [(row, other) for row, name in enumerate(self.tensors) for other in tied.get(name, ())] if tied else ()

    def _find(self, field: str) -> Sequence[Any]:
        values = self.tensors.values()
        if field == "persistent":
            return [True] * len(values)
        if field == "dtype":
            return [self._maker.dtype(name, value) for name, value in self.tensors.items()]
        if field == "dense":
            from torchparams.sources.live.tensors import dense_of

            return list(dense_of(values))
        return super()._find(field)


class _Maker:
    """Makes records; remembers what many tensors have in common.

    Args:
        label: The mapping's, for messages.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._dtypes: dict[Any, DType] = {}
        self._devices: dict[Any, str] = {}

    def make(self, name: str, value: Any, aliases: tuple[str, ...]) -> ParameterInfo:
        dtype = self.dtype(name, value)
        if _is_array(value):
            count, storage = value.size, _array_storage(value)
            return ParameterInfo(
                name,
                value.shape,
                dtype,
                count,
                dtype.nbytes(count),
                "cpu",
                "tensor",
                None,
                None,
                name,
                aliases,
                storage,
            )
        import torch
        from torch._C import DisableTorchFunctionSubclass

        from torchparams.sources.live.sharding import sharding_of
        from torchparams.sources.live.tensors import layout_of, sizes_of, stored_bytes

        # A subclass may answer even a question for its shape with code of its own; the tensor itself does not.
        with DisableTorchFunctionSubclass():
            device = self._devices.get(value.device)
            if device is None:
                device = self._devices[value.device] = str(value.device)
            shape, count = sizes_of(value)
            layout = layout_of(value)
            nbytes = stored_bytes(value, dtype, count, layout)
            # `isinstance` asks the class of parameters, which takes its time.
            plain = type(value) is torch.Tensor
            kind = "tensor" if plain or not isinstance(value, torch.nn.Parameter) else "parameter"
            # state_dict() detaches: whether the parameter requires grad is lost.
            grad = True if value.requires_grad else False if kind == "parameter" else None
            storage = _tensor_storage(value, device)
            return live_tensor(
                *(name, shape, dtype, count, device, kind, grad, (None, ())),
                *(name, aliases, storage, True, nbytes, layout, None if layout is None else sharding_of(value)),
            )

    def dtype(self, name: str, value: Any) -> DType:
        known = self._dtypes.get(value.dtype)
        if known is not None:
            return known
        try:
            made = self._dtypes[value.dtype] = DType.of(value.dtype)
        except TorchParamsError:
            raise UnsupportedSource(
                f"the entry {name!r} is an array of {value.dtype}, which no tensor can hold",
                where=self.label,
                hint="leave it out, or convert it",
            ) from None
        return made


def _tensor_storage(tensor: torch.Tensor, device: str) -> Storage | None:
    """The memory that a tensor is a view of; None where it has none of its own (sparse, lazy, a wrapper)."""
    import torch

    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return None  # it keeps its values in other tensors; its own memory is made up
    try:
        memory = tensor.untyped_storage()
        # Without an address (meta, or no bytes) the object that stands for the memory is what tells two apart.
        key = f"{device}:{memory.data_ptr() or memory._cdata:#x}"
        return view_of(key, int(tensor.storage_offset()), tensor.stride(), memory.nbytes())
    except Exception:  # as for the shape
        return None


def _array_storage(array: Array) -> Storage | None:
    numpy = sys.modules["numpy"]
    owner = array
    while isinstance(owner.base, numpy.ndarray):
        owner = owner.base
    # Of memory that belongs to something else, as much as the outermost array shows.
    low, high = _bounds(owner)
    offset = _address(array) - low
    if any(step % array.itemsize for step in (offset, *array.strides)):
        return None  # it cannot be told in elements
    stride = tuple(step // array.itemsize for step in array.strides)
    return Storage(f"cpu:{low:#x}", offset // array.itemsize, stride, high - low)


def _bounds(array: Array) -> tuple[int, int]:
    """The addresses of an array's first byte and of the one behind its last."""
    low = high = _address(array)
    if array.size == 0:
        return low, high
    for size, step in zip(array.shape, array.strides, strict=True):
        if step < 0:
            low += (size - 1) * step
        else:
            high += (size - 1) * step
    return low, high + array.itemsize


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


# --- tied tensors ----------------------------------------------------------------------------


def _aliases(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Canonical name → its other names, of those that have any."""
    places: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        places.setdefault(_place(tensor), []).append(name)
    found: dict[str, list[str]] = {}
    if len(places) == len(tensors):
        return found
    for names in places.values():
        first: dict[Any, str] = {}
        for name in names if len(names) > 1 else ():
            canonical = first.setdefault(_view(tensors[name]), name)
            if canonical is not name:
                found.setdefault(canonical, []).append(name)
    return found


def _place(value: Any) -> int:
    """The address of the first element; of the object where there is no element or no address."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return _address(value) if value.size else id(value)
    # A tensor that keeps its values in others has an address that is made up. Sparse, lazy and wrapping tensors
    # have none, and refuse with an error of any kind.
    if type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        try:
            return value.data_ptr() or id(value)
        except Exception:
            return id(value)
    return id(value)


def _view(value: Any) -> Any:
    """Of tensors and arrays at one place: equal for those that show the same elements."""
    if _is_array(value):
        dtype = value.dtype
        return dtype.name if dtype.isnative else dtype.str, value.shape, value.strides
    try:
        strides = tuple(step * value.element_size() for step in value.stride())
        shown = value.is_conj(), value.is_neg()
        spelled = str(value.dtype).removeprefix("torch.")
        return (spelled, tuple(value.shape), strides, *(shown if any(shown) else ()))
    except Exception:  # as for the address
        return id(value)
