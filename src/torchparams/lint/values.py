"""The least and the greatest value of many tensors, in one pass over their memory.

Two numbers answer what the rules ask of values: one of them is NaN or infinite where any value is, and they are equal
where all values are. A sketch would tell more, and costs more for a tensor of a few elements than reading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from torchparams.io.live import memory_of
from torchparams.sources.live.tensors import dispatches

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

Extremes: TypeAlias = "dict[int, tuple[float, float]]"
"""Least and greatest value by the identity of the tensor; both are NaN where any value is."""

SMALL = 4096
"""Elements up to which tensors are copied behind each other and reduced in one go: a call costs as much as these."""

TOGETHER = 1 << 22
"""Elements that are copied behind each other at most."""

SLICE = 1 << 24
"""Elements of a type of one byte that are widened at a time: torch cannot compare most of them."""


def read_extremes(tensors: Iterable[torch.Tensor]) -> tuple[Extremes, set[int]]:
    """The extremes of all tensors of floating point that have values, and the ids of those that could not be read.

    Of a complex tensor the real and imaginary parts count as elements, of a sparse one what is stored. Left out are
    tensors without values (lazy, on the meta device, of no elements) and those of integers.

    >>> import torch
    >>> weight = torch.tensor([1.0, 2.0])
    >>> read_extremes([weight])[0][id(weight)]
    (1.0, 2.0)
    """
    import torch

    found: Extremes = {}
    unread: set[int] = set()
    small: dict[torch.dtype, list[torch.Tensor]] = {}
    single: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    kinds: dict[type, str] = {}
    together = (torch.float32, torch.bfloat16, torch.float16)
    with torch.no_grad():
        for tensor in tensors:
            kind = kinds.get(type(tensor))
            if kind is None:
                kind = kinds[type(tensor)] = _kind(tensor)
            if kind == "lazy":
                continue
            try:
                dtype = tensor.dtype
                if not (dtype.is_floating_point or dtype.is_complex) or tensor.is_meta:
                    continue
                if kind == "foreign":
                    unread.add(id(tensor))
                    continue
                values = tensor if tensor.layout is torch.strided and not tensor.is_nested else _stored(tensor)
                numel = values.numel()
                if numel == 0:
                    continue
                if numel <= SMALL and values is tensor and values.is_cpu and dtype in together and not tensor.is_nested:
                    small.setdefault(dtype, []).append(tensor)
                    continue
                least, greatest = _pair(values)
                single.setdefault((least.device, least.dtype), []).append((id(tensor), least, greatest))
            except Exception:  # a kind of tensor may refuse any question with any error
                unread.add(id(tensor))
        for alike in small.values():
            _reduce(alike, found)
        for pairs in single.values():
            both = torch.stack([value for _, least, greatest in pairs for value in (least, greatest)])
            numbers = both.cpu().double().tolist()  # one transfer for all tensors of a device
            for (identity, _, _), least_of, greatest_of in zip(pairs, numbers[::2], numbers[1::2], strict=True):
                found[identity] = least_of, greatest_of
    return found, unread


def _kind(tensor: torch.Tensor) -> str:
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return "lazy"
    # A class that runs operations by code of its own has its values in other tensors, on other machines perhaps.
    return "foreign" if dispatches(type(tensor)) else "plain"


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    stored: torch.Tensor = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    return stored.detach()


def _pair(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.element_size() > 1:
        least, greatest = torch.aminmax(values)
        return least, greatest
    pairs = [torch.aminmax(part.float()) for part in torch.split(values.reshape(-1), SLICE)]
    return torch.stack([pair.min for pair in pairs]).amin(), torch.stack([pair.max for pair in pairs]).amax()


def _reduce(tensors: list[torch.Tensor], found: Extremes) -> None:
    """Extremes of small tensors of one type."""
    import numpy as np
    from torch._utils import _flatten_dense_tensors

    sizes = np.fromiter((tensor.numel() for tensor in tensors), np.int64, len(tensors))
    ends = np.cumsum(sizes)
    first = 0
    while first < len(tensors):
        # At least one, and then as many as there is room for.
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + TOGETHER, side="right")))
        # No Python object is made for each, of which there are tens of thousands.
        flat: Any = _flatten_dense_tensors(tensors[first:last])  # type: ignore[no-untyped-call]  # torch's own
        starts = ends[first:last] - sizes[first:last]
        starts -= starts[0]
        array = memory_of(flat.float())
        with np.errstate(invalid="ignore"):
            least = np.minimum.reduceat(array, starts).tolist()
            greatest = np.maximum.reduceat(array, starts).tolist()
        found.update(zip(map(id, tensors[first:last]), zip(least, greatest, strict=True), strict=True))
        first = last
