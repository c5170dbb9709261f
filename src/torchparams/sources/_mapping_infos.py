"""Infos of a mapping: a row for each tensor or array, and which of them are tied."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.errors import TorchParamsError, UnsupportedSource
from torchparams.info import ParameterInfo, Storage, live_tensor, view_of
from torchparams.reading import Reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]


class MappingReading(Reading):
    """The entries of one listing; infos are made when they are needed.

    Args:
        entries: Canonical name → tensor or array.
        aliases: Canonical name → other names, for tensors that have any.
        maker: Makes the infos.
    """

    tensors: Mapping[str, Any]

    def __init__(self, entries: Mapping[str, Any], aliases: Mapping[str, list[str]], maker: Maker) -> None:
        super().__init__(())
        self.tensors = entries
        self._tied, self._maker = aliases, maker

    @cached_property
    def names(self) -> list[str]:
        """Canonical names."""
        return list(self.tensors)

    @cached_property
    def infos(self) -> list[ParameterInfo]:
        """All infos."""
        make, tied = self._maker.make, self._tied
        return [make(name, value, tuple(tied.get(name, ()))) for name, value in self.tensors.items()]

    @property
    def raws(self) -> Iterable[tuple[int, str]]:
        """Empty: raw names are the canonical names."""
        return ()

    @property
    def aliases(self) -> Iterable[tuple[int, str]]:
        """Yield row number and alias, for every alias."""
        tied = self._tied
        return [(row, other) for row, name in enumerate(self.tensors) for other in tied.get(name, ())] if tied else ()

    def _find(self, field: str) -> Sequence[Any]:
        values = self.tensors.values()
        if field == "persistent":
            return [True] * len(values)
        if field == "dtype":
            return [self._maker.dtype(name, value) for name, value in self.tensors.items()]
        if field == "shape":
            return self._maker.shapes(values)
        if field == "dense":
            from torchparams.sources.live.tensors import dense_of

            return list(dense_of(values))
        return super()._find(field)


class Maker:
    """Make infos; caches values that many tensors share.

    Args:
        label: Label of the mapping, for messages.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._dtypes: dict[Any, DType] = {}
        self._devices: dict[Any, str] = {}

    def make(self, name: str, value: Any, aliases: tuple[str, ...]) -> ParameterInfo:
        dtype = self.dtype(name, value)
        if is_array(value):
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

        # A subclass may run its own code even for its shape; the tensor itself does not.
        with DisableTorchFunctionSubclass():
            device = self._devices.get(value.device)
            if device is None:
                device = self._devices[value.device] = str(value.device)
            shape, count = sizes_of(value)
            layout = layout_of(value)
            nbytes = stored_bytes(value, dtype, count, layout)
            # `isinstance` with `nn.Parameter` is slow.
            plain = type(value) is torch.Tensor
            kind = "tensor" if plain or not isinstance(value, torch.nn.Parameter) else "parameter"
            # state_dict() detaches tensors, so `requires_grad=False` of a plain tensor is parameter a fact about the
            # parameter.
            grad = True if value.requires_grad else False if kind == "parameter" else None
            storage = _tensor_storage(value, device)
            return live_tensor(
                *(name, shape, dtype, count, device, kind, grad, (None, ())),
                *(name, aliases, storage, True, nbytes, layout, None if layout is None else sharding_of(value)),
            )

    def shapes(self, values: Iterable[Any]) -> list[tuple[int, ...] | None]:
        """Shapes of tensors and arrays; None for a lazy tensor."""
        found: list[tuple[int, ...] | None] = []
        tensors = []
        for value in values:
            found.append(value.shape if is_array(value) else None)
            if found[-1] is None:
                tensors.append((len(found) - 1, value))
        if tensors:
            from torch._C import DisableTorchFunctionSubclass

            from torchparams.sources.live.tensors import sizes_of

            with DisableTorchFunctionSubclass():
                for at, value in tensors:
                    found[at] = sizes_of(value)[0]
        return found

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
    """The memory that a tensor is a view of; None if it has none of its own (sparse, lazy, wrapper)."""
    import torch

    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return None  # its values are in other tensors; its own memory is not real
    try:
        memory = tensor.untyped_storage()
        # Without an address (meta, or no bytes), the storage object identifies the memory.
        key = f"{device}:{memory.data_ptr() or memory._cdata:#x}"
        return view_of(key, int(tensor.storage_offset()), tensor.stride(), memory.nbytes())
    except Exception:  # as for the shape
        return None


def _array_storage(array: Array) -> Storage | None:
    numpy = sys.modules["numpy"]
    owner = array
    while isinstance(owner.base, numpy.ndarray):
        owner = owner.base
    # If another object owns the memory, only the part that the outermost array covers is known.
    low, high = _bounds(owner)
    offset = _address(array) - low
    if any(step % array.itemsize for step in (offset, *array.strides)):
        return None  # offsets are not whole elements
    stride = tuple(step // array.itemsize for step in array.strides)
    return Storage(f"cpu:{low:#x}", offset // array.itemsize, stride, high - low)


def _bounds(array: Array) -> tuple[int, int]:
    """Addresses of the first byte of an array and of the byte after its last."""
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


def aliases_of(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Other names by canonical name, for tensors that have any."""
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
    """Address of the first element, or the id of the object if there is no element or address."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return _address(value) if value.size else id(value)
    # A tensor that keeps its values in others has an address that is not real. Sparse, lazy and wrapping tensors have
    # none, and may raise any error.
    if type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        try:
            return value.data_ptr() or id(value)
        except Exception:
            return id(value)
    return id(value)


def _view(value: Any) -> Any:
    """A key that is equal for tensors and arrays of one place that show the same elements."""
    if is_array(value):
        dtype = value.dtype
        return dtype.name if dtype.isnative else dtype.str, value.shape, value.strides
    try:
        strides = tuple(step * value.element_size() for step in value.stride())
        shown = value.is_conj(), value.is_neg()
        spelled = str(value.dtype).removeprefix("torch.")
        return (spelled, tuple(value.shape), strides, *(shown if any(shown) else ()))
    except Exception:  # as for the address
        return id(value)


def is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
