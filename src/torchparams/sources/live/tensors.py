"""Infos of live tensors: one reading of an `nn.Module`, whose fields are looked up when needed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from torchparams.dtypes import DType
from torchparams.encodings.companions import CODES, Coded, coded
from torchparams.info import live_tensor, view_of
from torchparams.names import script_class
from torchparams.reading import Reading
from torchparams.sources.live.flat import all_modules, shardings
from torchparams.sources.live.parts import may_have_parts
from torchparams.sources.live.sharding import sharding_of
from torchparams.sources.live.traverse import Traversal, aliases_of, list_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from torchparams.info import ParameterInfo, Sharding, Storage
    from torchparams.sources.live.reach import Spot


Decode: TypeAlias = "Callable[[Iterable[tuple[str, Any, nn.Module]], str], Mapping[str, Any]]"
"""Callable that returns the sources of quantised parameters by canonical name; see `quantised.py`."""


def is_leaf(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not the result of an operation.

    A view from an operation with several outputs, as in FSDP's flat parameter, raises once its base has changed; it
    counts as a result.

    >>> import torch
    >>> is_leaf(torch.ones(2)), is_leaf(torch.ones(2, requires_grad=True) * 2)
    (True, False)
    """
    try:
        return tensor.is_leaf
    except RuntimeError:
        return False


class LiveReading(Reading):
    """One traversal of a network; each field is then read from the tensors.

    Args:
        listing: Result of the traversal.
        aliases: Callable that returns the other names by canonical name.
        root: The network.
        decode: Callable that returns sources of quantised parameters, given name, tensor and owner of all tensors and
            the name of the network. The infos of these parameters then describe the values, not the codes.
    """

    tensors: Mapping[str, Any]

    def __init__(
        self,
        listing: Traversal,
        aliases: Callable[[], Mapping[str, list[str]]],
        root: nn.Module,
        decode: Decode | None = None,
    ) -> None:
        super().__init__(())
        self.root = root
        self.decode = decode
        self.path: tuple[nn.Module, ...] | None = None
        """For a reading of one tensor, the modules on its path."""
        self.tensors = listing.tensors
        self._listing = listing
        self._find_aliases = aliases
        self._owner_of: dict[str, nn.Module] | None = None

    @classmethod
    def of(cls, module: nn.Module, buffers: bool, *, decode: Decode | None = None, packed: bool = False) -> LiveReading:
        """Read a network.

        Args:
            module: The network.
            buffers: Include buffers.
            decode: See the class.
            packed: Include tensors in packed weights, which no module holds.
        """
        listing = list_tensors(module, buffers, packed)
        return cls(listing, lambda: aliases_of(module, buffers, listing) if listing.tied else {}, module, decode)

    @classmethod
    def alone(cls, module: nn.Module, spot: Spot, decode: Decode | None = None) -> LiveReading:
        """A reading of one tensor at one spot, as if it had no other names."""
        name = spot.name
        raws = {} if spot.raw == name else {name: spot.raw}
        buffers = {} if spot.persistent is None else {name: spot.persistent}
        made = cls(Traversal({name: spot.tensor}, [spot.modules[-1]], raws, buffers, False, []), dict, module, decode)
        made.path = spot.modules
        return made

    @cached_property
    def names(self) -> list[str]:
        """Canonical names."""
        return list(self.tensors)

    @property
    def packed(self) -> frozenset[str]:
        """Canonical names of tensors in packed weights, which no module holds."""
        return self._listing.packed

    @property
    def owners(self) -> Sequence[nn.Module]:
        """Modules that hold the tensors."""
        return self._listing.owners

    @property
    def raws(self) -> Iterable[tuple[int, str]]:
        """Yield row number and raw name, if it differs from the canonical name."""
        raws = self._listing.raws
        return [(row, raws[name]) for row, name in enumerate(self.tensors) if name in raws] if raws else ()

    @property
    def aliases(self) -> Iterable[tuple[int, str]]:
        """Yield row number and alias, for every alias."""
        tied = self._tied
        return [(row, alias) for row, name in enumerate(self.tensors) for alias in tied.get(name, ())] if tied else ()

    @cached_property
    def _tied(self) -> Mapping[str, list[str]]:
        return self._find_aliases()

    def one(self, name: str) -> ParameterInfo:
        """Info of one canonical name at the time of the call, without making the others."""
        if self._owner_of is None:
            self._owner_of = dict(zip(self.tensors, self.owners, strict=True))
        listed = self._listing
        alone = replace(listed, tensors={name: self.tensors[name]}, owners=[self._owner_of[name]])
        (info,) = LiveReading(alone, lambda: self._tied, self.root, self.decode).infos
        return info

    def only(self, names: Container[str]) -> LiveReading:
        """The tensors in `names`, in the same order."""
        all_of = self._listing
        tensors: dict[str, Any] = {}
        owners: list[nn.Module] = []
        for (name, tensor), owner in zip(all_of.tensors.items(), all_of.owners, strict=True):
            if name in names:
                tensors[name] = tensor
                owners.append(owner)
        return LiveReading(replace(all_of, tensors=tensors, owners=owners), lambda: self._tied, self.root, self.decode)

    @property
    def infos(self) -> list[ParameterInfo]:
        """All infos."""
        if not self._made:
            rows = self.quantised
            columns = map(self._held_column if rows else self.column, _MADE_OF)
            made = list(map(live_tensor, self.tensors, *columns))
            self._made = [rows[info.name].infos()[info.name] if info.name in rows else info for info in made]
            for place, info in enumerate(made if rows else ()):
                if info.name in rows:
                    self._made[place] = _as_held(self._made[place], info)
        return self._made

    @property
    def kept(self) -> Iterable[Any]:
        """Parameters and buffers that determine the sharding of each tensor, in order."""
        return self.tensors.values()

    @cached_property
    def quantised(self) -> Mapping[str, Any]:
        """Sources of supported quantised parameters, by canonical name; empty if they are not decoded."""
        kinds = set(map(type, self.tensors.values()))
        if self.decode is None or not (self.packed or any(map(may_have_parts, kinds))):
            return {}
        rows = zip(self.tensors, self.tensors.values(), self.owners, strict=True)
        return self.decode(rows, type(self.root).__name__)

    def _find(self, field: str) -> Sequence[Any]:
        found = self._held_column(field)
        if self.quantised and field in _OF_VALUES:
            found = list(found)
            for row, name in enumerate(self.tensors):
                if name in self.quantised:
                    found[row] = _of_values(self.quantised[name].infos()[name], field)
        return found

    def _held_column(self, field: str) -> Sequence[Any]:
        from torch._C import DisableTorchFunctionSubclass

        # A subclass may run its own code even for its shape; the tensor itself does not.
        with DisableTorchFunctionSubclass():
            return list(_COLUMNS[field](self))


# --- fields --------------------------------------------------------------------------------------


def _each(
    ask: Callable[[Any], Any], make: Callable[[Any], Any] | None = None
) -> Callable[[LiveReading], Iterator[Any]]:
    """A column of `ask` for each tensor; `make` is called once for each distinct answer."""

    def column(reading: LiveReading) -> Iterator[Any]:
        answers = map(ask, reading.tensors.values())
        # Networks have few distinct dtypes and devices, but tens of thousands of tensors.
        return answers if make is None else map(_Once(make).__getitem__, answers)

    return column


class _Once(dict[Any, Any]):
    """Make a value for each key on first use."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __missing__(self, key: Any) -> Any:
        made = self[key] = self.make(key)
        return made


def _sizes(reading: LiveReading) -> Iterator[tuple[tuple[int, ...] | None, int]]:
    shapes, own_memory = _Once(tuple), _Once(lambda cls: not dispatches(cls))
    for tensor, sharding in zip(reading.tensors.values(), reading.column("sharding"), strict=True):
        if sharding is not None and sharding.part is not None:
            yield sharding.part.shape, prod(sharding.part.shape)
            continue
        try:
            yield (shapes[tensor.shape], tensor.numel()) if own_memory[type(tensor)] else sizes_of(tensor)
        except Exception:  # lazy and nested tensors have no shape; some tensors may raise any error
            yield sizes_of(tensor)


def _shardings(reading: LiveReading) -> Iterable[Sharding | None]:
    by_fsdp = shardings(all_modules(reading.root) if reading.path is None else reading.path, reading.kept)
    tensors = reading.tensors.values()
    own_memory = _Once(lambda cls: not dispatches(cls))
    found = [None if own_memory[type(tensor)] else sharding_of(tensor) for tensor in tensors]
    return found if by_fsdp is None else [a or b for a, b in zip(by_fsdp, found, strict=True)]


def sizes_of(tensor: Any) -> tuple[tuple[int, ...] | None, int]:
    """Shape and number of elements of a tensor; a lazy tensor has neither, a nested tensor has no shape."""
    if getattr(tensor, "is_nested", False):
        # The sizes of a jagged tensor are symbols; other nested tensors raise.
        return None, int(tensor.numel() if layout_of(tensor) == "nested" else tensor.values().numel())
    try:
        return tuple(tensor.shape), tensor.numel()
    except Exception:  # as above
        return None, 0


def layout_of(tensor: Any) -> str | None:
    """Layout of a tensor; see `ParameterInfo.layout`."""
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return "lazy"
    spelled = str(tensor.layout).removeprefix("torch.")
    if spelled != "strided":
        return spelled
    if tensor.is_nested:
        return "nested"
    return type(tensor).__name__ if dispatches(type(tensor)) else None


def stored_bytes(tensor: Any, dtype: DType, numel: int, layout: str | None) -> int:
    """Bytes of a tensor as stored: indices and values of a sparse tensor, otherwise its elements."""
    parts = _SPARSE_PARTS.get(layout or "", ())
    if not parts:
        return dtype.nbytes(numel)
    return sum(getattr(tensor, part)().nbytes for part in parts)


_COMPRESSED_ROWS = ("crow_indices", "col_indices", "values")
_COMPRESSED_COLUMNS = ("ccol_indices", "row_indices", "values")
_SPARSE_PARTS: dict[str, tuple[str, ...]] = {
    "sparse_coo": ("_indices", "_values"),
    "sparse_csr": _COMPRESSED_ROWS,
    "sparse_bsr": _COMPRESSED_ROWS,
    "sparse_csc": _COMPRESSED_COLUMNS,
    "sparse_bsc": _COMPRESSED_COLUMNS,
}


def _layouts(reading: LiveReading) -> Iterator[str | None]:
    import torch

    strided = torch.strided
    own_memory = _Once(lambda cls: not dispatches(cls))
    columns = reading.tensors.values(), reading.column("shape"), reading.column("sharding")
    for tensor, shape, sharding in zip(*columns, strict=True):
        if sharding is not None and sharding.part is not None:
            yield sharding.kind
            continue
        plain = shape is not None and tensor.layout is strided and own_memory[type(tensor)]
        yield None if plain else layout_of(tensor)


def dense_of(values: Iterable[Any]) -> Iterator[tuple[tuple[int, ...], DType] | None]:
    """Yield shape and dtype of each plain, contiguous tensor with memory; None for any other value."""
    import torch

    plain, strided = (torch.nn.Parameter, torch.Tensor), torch.strided
    dtypes = _Once(_copied)
    for value in values:
        dense = None
        if type(value) in plain:
            try:
                # Freed memory and the meta device have no address.
                if value.layout is strided and value.data_ptr() and value.is_contiguous() and not value.is_nested:
                    dtype = dtypes[value.dtype]
                    dense = None if dtype is None else (value.shape, dtype)
            except Exception:  # tensors in a transform have these classes and may raise any error
                dense = None
        yield dense


def _copied(dtype: Any) -> DType | None:
    """The dtype, if elements can be copied one by one; quantised tensors also have a scale."""
    made = DType.of(dtype)
    return None if made.kind == "opaque" else made


def _nbytes(reading: LiveReading) -> Iterator[int]:
    columns = reading.tensors.values(), *map(reading.column, ("dtype", "numel", "layout"))
    dense = _Once(lambda size: size[0].nbytes(size[1]))
    for tensor, dtype, numel, layout in zip(*columns, strict=True):
        yield dense[dtype, numel] if layout is None else stored_bytes(tensor, dtype, numel, layout)


def _kinds(listing: Traversal) -> Iterator[str]:
    for name in listing.tensors:
        yield "buffer" if name in listing.buffers else "tensor" if name in listing.packed else "parameter"


def _nth(place: int) -> Callable[[LiveReading], Iterator[Any]]:
    return lambda reading: (size[place] for size in reading.column("sizes"))


def _owners(reading: LiveReading) -> Iterator[tuple[str, tuple[str, ...]]]:
    import torch

    known: dict[type, tuple[str, tuple[str, ...]]] = {}
    for owner in reading.owners:
        names = known.get(type(owner))
        if names is None:
            names = class_names(owner)
            if not isinstance(owner, torch.jit.ScriptModule):  # all of these are of one class
                known[type(owner)] = names
        yield names


def _storages(reading: LiveReading) -> Iterator[Storage | None]:
    own_memory, strides = _Once(lambda cls: not dispatches(cls)), _Once(lambda stride: stride)
    columns = reading.tensors.values(), *map(reading.column, ("shape", "device", "sharding"))
    for tensor, shape, device, sharding in zip(*columns, strict=True):
        if shape is None or not own_memory[type(tensor)] or (sharding is not None and sharding.part is not None):
            yield None
            continue
        try:
            memory = tensor.untyped_storage()
            # Without an address (meta, or no bytes), the storage object identifies the memory.
            key = f"{device}:{hex(memory.data_ptr() or memory._cdata)}"
            yield view_of(key, tensor.storage_offset(), strides[tensor.stride()], memory.nbytes())
        except Exception:  # sparse, or wrapped by a transform
            yield None


_MADE_OF = (
    *("shape", "dtype", "numel", "device", "kind", "requires_grad", "owner", "raw_name"),
    *("aliases", "storage", "persistent", "nbytes", "layout", "sharding"),
)
"""The columns that `live_tensor` takes, after the name."""

_OF_VALUES = frozenset({
    "shape", "numel", "ndim", "nbytes", "layout", "dense", "dtype", "storage", "encoded", "encoding", "bpw"
})  # fmt: skip
"""Columns that differ between a stored tensor and the quantised parameter that it belongs to."""


def _of_values(info: ParameterInfo, field: str) -> Any:
    if field == "dense":
        return None  # it is computed
    return info.ndim if field == "ndim" else getattr(info, field)


def _as_held(row: ParameterInfo, held: ParameterInfo) -> ParameterInfo:
    """The info of a quantised parameter at its place in the network."""
    return row._replace(
        kind=held.kind,
        requires_grad=held.requires_grad,
        module=held.module,
        bases=held.bases,
        raw_name=held.raw_name,
        aliases=held.aliases,
        persistent=held.persistent,
        device=held.device,
    )


_COLUMNS: dict[str, Callable[[LiveReading], Iterable[Any]]] = {
    "name": lambda reading: reading.tensors,
    "sizes": _sizes,
    "shape": _nth(0),
    "numel": _nth(1),
    "ndim": lambda reading: (None if shape is None else len(shape) for shape in reading.column("shape")),
    "nbytes": _nbytes,
    "layout": _layouts,
    "dense": lambda reading: (
        dense if sharding is None else None
        for dense, sharding in zip(dense_of(reading.tensors.values()), reading.column("sharding"), strict=True)
    ),
    "sharding": _shardings,
    "dtype": _each(attrgetter("dtype"), DType.of),
    "device": _each(attrgetter("device"), str),
    "requires_grad": _each(attrgetter("requires_grad")),
    "kind": lambda reading: _kinds(reading._listing),
    "persistent": lambda reading: (reading._listing.buffers.get(name, True) for name in reading.tensors),
    "owner": _owners,
    "module": lambda reading: (owner[0] for owner in reading.column("owner")),
    "bases": lambda reading: (owner[1] for owner in reading.column("owner")),
    "raw_name": lambda reading: (reading._listing.raws.get(name, name) for name in reading.tensors),
    "aliases": lambda reading: (tuple(reading._tied.get(name, ())) for name in reading.tensors),
    "storage": _storages,
    "location": lambda reading: (None for _ in reading.tensors),
    "encoded": lambda reading: (None for _ in reading.tensors),
    "encoding": lambda reading: (None for _ in reading.tensors),
    "bpw": lambda reading: (
        8 * nbytes / numel if numel else None
        for nbytes, numel in zip(reading.column("nbytes"), reading.column("numel"), strict=True)
    ),
}


def class_names(module: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Qualified name of the class of a module, and of the class and its bases up to `nn.Module`.

    For a class module, the class that it was compiled from comes first.
    """
    import torch

    mro = type(module).__mro__
    names = tuple(f"{c.__module__}.{c.__qualname__}" for c in mro[: mro.index(torch.nn.Module) + 1])
    if isinstance(module, torch.jit.ScriptModule):
        with suppress(AttributeError):  # under construction
            names = (script_class(module._c._type().qualified_name()), *names)
    return names[0], names


def dispatches(cls: type) -> bool:
    """Whether a tensor class runs its own code for operations: its values are in other tensors."""
    import torch

    return getattr(cls, "__torch_dispatch__", None) is not torch.Tensor.__torch_dispatch__


_STATES = ("SCB", "quant_state")
"""Attributes in which bitsandbytes parameters keep their scales, for 8 and for 4 bits."""


def coded_in(reading: LiveReading) -> dict[str, Coded]:
    """Tensors that hold codes instead of values, by their names or class.

    Args:
        reading: A reading of a network with its buffers.
    """
    return {**coded(reading), **_coded_parameters(reading)}


def _coded_parameters(reading: LiveReading) -> dict[str, Coded]:
    """Parameters of special classes that hold codes; the scales are attributes of them or of their layer."""
    import torch

    found: dict[str, Coded] = {}
    classes = set(map(type, reading.tensors.values())) - {torch.nn.Parameter, torch.Tensor}
    keeping = {cls for cls in classes if issubclass(cls, torch.nn.Parameter) and not dispatches(cls)}
    for name, tensor in reading.tensors.items() if keeping else ():
        cls = type(tensor)
        if cls not in keeping:
            continue
        state = next((key for key in _STATES if vars(tensor).get(key) is not None), None)
        if state is not None:
            found[name] = Coded(name, f"{name}.{state}", True)
        elif DType.of(tensor.dtype) in CODES:
            found[name] = Coded(name, cls.__name__, True, by_class=True)
    return found
