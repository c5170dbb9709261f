"""Minimum and maximum of many tensors, in one pass over their memory.

These two numbers are enough for the rules: one of them is NaN or infinite if any value is, and they are equal if all
values are. A sketch has more information, but costs more than reading for a tensor of a few elements.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

from torchparams.expressions.work import ThreadWork
from torchparams.io.live import memory_of
from torchparams.sources.live.tensors import dispatches

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from torchparams.expressions.base import Expression

Extremes: TypeAlias = "dict[int, tuple[float, float]]"
"""Minimum and maximum by the tensor's `id`; both are NaN if any value is NaN."""

SMALL = 4096
"""Maximum size of tensors that are concatenated and reduced together: a call costs as much as this many elements."""

TOGETHER = 1 << 22
"""Maximum number of concatenated elements."""

SLICE = 1 << 24
"""Number of elements widened at a time for one-byte dtypes: torch cannot compare most of these."""


def read_extremes(tensors: Iterable[torch.Tensor]) -> tuple[Extremes, set[int]]:
    """Extremes of all floating-point tensors with values, and the ids of those that could not be read.

    For complex tensors, real and imaginary parts count as elements; for sparse tensors, the stored values. Tensors
    without values (lazy, meta or empty) and tensors of integers are left out.

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
            except Exception:  # a tensor subclass may raise any error
                unread.add(id(tensor))
        for alike in small.values():
            _reduce(alike, found)
        for pairs in single.values():
            both = torch.stack([value for _, least, greatest in pairs for value in (least, greatest)])
            numbers = both.cpu().double().tolist()  # one transfer for all tensors of a device
            for (identity, _, _), least_of, greatest_of in zip(pairs, numbers[::2], numbers[1::2], strict=True):
                found[identity] = least_of, greatest_of
    return found, unread


def extremes_of(row: Expression) -> tuple[float, float]:
    """Extremes of a row that is computed, block by block.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> extremes_of(tp.of({"w": np.float32([1, -2])}).source.row("w"))
    (-2.0, 1.0)
    """
    import numpy as np

    least, greatest = math.inf, -math.inf
    with ThreadWork() as work:
        for block in work.blocks(row, begin=True):
            values = block.astype(np.float32)
            # In this order, NaN stays.
            least, greatest = float(np.minimum(least, values.min())), float(np.maximum(greatest, values.max()))
    return least, greatest


def _kind(tensor: torch.Tensor) -> str:
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return "lazy"
    # A subclass that dispatches operations keeps its values in other tensors, possibly on other machines.
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
    """Extremes of small tensors of one dtype."""
    import numpy as np
    from torch._utils import _flatten_dense_tensors

    sizes = np.fromiter((tensor.numel() for tensor in tensors), np.int64, len(tensors))
    ends = np.cumsum(sizes)
    first = 0
    while first < len(tensors):
        # At least one tensor, then as many as fit.
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + TOGETHER, side="right")))
        # Avoid one Python object per tensor: there may be tens of thousands.
        flat: Any = _flatten_dense_tensors(tensors[first:last])  # type: ignore[no-untyped-call]  # torch's own
        starts = ends[first:last] - sizes[first:last]
        starts -= starts[0]
        array = memory_of(flat.float())
        with np.errstate(invalid="ignore"):
            least = np.minimum.reduceat(array, starts).tolist()
            greatest = np.maximum.reduceat(array, starts).tolist()
        found.update(zip(map(id, tensors[first:last]), zip(least, greatest, strict=True), strict=True))
        first = last
