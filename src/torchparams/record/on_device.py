"""Measure tensors with torch, on their own device.

Small tensors are measured together: the number of operations hardly depends on the number of parameters. No operation
waits for the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchparams.sketch.moments import EXPONENTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

TOGETHER = 1 << 20
"""Elements of tensors that are measured together."""


def batches(tensors: Sequence[torch.Tensor]) -> Iterator[slice]:
    """Yield ranges of consecutive tensors, each with at most `TOGETHER` elements or a single tensor.

    >>> import torch
    >>> [(each.start, each.stop) for each in batches([torch.zeros(3), torch.zeros(4), torch.zeros(1 << 20)])]
    [(0, 2), (2, 3)]
    """
    start = size = 0
    for i, tensor in enumerate(tensors):
        if i > start and size + tensor.numel() > TOGETHER:
            yield slice(start, i)
            start, size = i, 0
        size += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))


def measured(tensors: Sequence[torch.Tensor], exponents: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of tensors of one dtype: a row each, on their device.

    Args:
        tensors: Contiguous real tensors.
        exponents: Compute histograms of magnitudes too.

    Returns:
        Sum, norm and maximum of the finite elements, shape (n, 3); and number of elements, of zeros and of non-finite
        elements, and the histogram, shape (n, 3) or (n, 259).
    """
    import torch

    rows = [
        (_alone(tensors[each.start], exponents) if each.stop - each.start == 1 else _together(tensors[each], exponents))
        for each in batches(tensors)
    ]
    reals, integers = zip(*rows, strict=True)
    return torch.cat(reals), torch.cat(integers)


def distances(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norms of `tensors` - `others`, and norms of `others`, on their device: shape (n, 2).

    Args:
        tensors, others: Real tensors of equal shapes and of one dtype.
    """
    import torch

    found = []
    for each in batches(tensors):
        x, y = list(map(_wider, tensors[each])), list(map(_wider, others[each]))
        norms = [torch._foreach_norm(some, 2, dtype=wide_of(y[0])) for some in (torch._foreach_sub(x, y), y)]
        found.append(torch.stack(list(map(torch.stack, norms)), dim=1))
    return torch.cat(found)


def floating(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype in which torch can compute."""
    return tensor if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 else tensor.float()


def wide_of(tensor: torch.Tensor) -> torch.dtype:
    """Dtype of sums: float64 where the device has it, otherwise float32."""
    import torch

    return torch.float64 if tensor.device.type in ("cpu", "cuda") else torch.float32


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to at least float32, so that differences keep precision."""
    return tensor if tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 4 else tensor.float()


def _alone(tensor: torch.Tensor, exponents: bool) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    values = floating(tensor).reshape(-1)
    finite, clean = _clean(values)
    wide = wide_of(values)
    most = clean.abs().max() if clean.numel() else clean.new_zeros(())
    if _may_overflow(clean):
        scale = _scale(most)
        norm = torch.linalg.vector_norm(clean.to(wide) / scale, dtype=wide) * scale
    else:
        norm = torch.linalg.vector_norm(clean, dtype=wide)
    parts = [clean.sum(dtype=wide), norm, most]
    reals = torch.stack([part.to(wide) for part in parts])
    count = torch.full((), clean.numel(), dtype=torch.int64, device=clean.device)
    integers = torch.stack([count, (values == 0).sum(), (~finite).sum()])
    if exponents:
        counts = torch.zeros(EXPONENTS, dtype=torch.int64, device=clean.device)
        bins = _bins(clean, finite)
        integers = torch.cat([integers, counts.scatter_add_(0, bins, torch.ones_like(bins))])
    return reals[None], integers[None]


def _together(tensors: Sequence[torch.Tensor], exponents: bool) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    values = floating(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    # From pageable memory, this copies the numbers at once and does not wait for the device.
    lengths = torch.tensor([tensor.numel() for tensor in tensors]).to(values.device, non_blocking=True)

    def each(kind: str, numbers: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.segment_reduce(numbers, kind, lengths=lengths, initial=0, unsafe=True)
        return found

    rows = torch.repeat_interleave(
        torch.arange(len(tensors), device=values.device), lengths, output_size=len(values)
    )  # of each element
    finite, clean = _clean(values)
    wide = clean.to(wide_of(clean))
    most = each("max", wide.abs())
    scale = _scale(most) if _may_overflow(clean) else None
    squares = (wide if scale is None else wide / scale[rows]).square()
    norms = each("sum", squares).sqrt()
    reals = torch.stack([each("sum", wide), norms if scale is None else norms * scale, most], dim=1)
    # float32 counts exactly up to 2^24.
    counted = [each("sum", marked.float()).long() for marked in (values == 0, ~finite)]
    integers = torch.stack([lengths, *counted], dim=1)
    if exponents:
        bins = rows * EXPONENTS + _bins(clean, finite)
        counts = torch.zeros(len(tensors) * EXPONENTS, dtype=torch.int64, device=values.device)
        counts.scatter_add_(0, bins, torch.ones_like(bins))
        integers = torch.cat([integers, counts.reshape(-1, EXPONENTS)], dim=1)
    return reals, integers


def _clean(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which elements are finite; and the elements, with zero in place of the others."""
    import torch

    finite = torch.isfinite(values)
    return finite, torch.where(finite, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _may_overflow(tensor: torch.Tensor) -> bool:
    """Whether the square of an element may be too large, or too small, for the dtype of sums."""
    import torch

    return torch.finfo(tensor.dtype).max > math.sqrt(torch.finfo(wide_of(tensor)).max)


def _scale(most: torch.Tensor) -> torch.Tensor:
    """Divisor of the elements before they are squared."""
    import torch

    return torch.where(most > 0, most, torch.ones_like(most))


def _bins(clean: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """Bin of each element, see `sketch.moments.EXPONENTS`."""
    import torch

    _, exponent = torch.frexp(clean.float() if clean.dtype.itemsize < 4 else clean)
    at = (exponent + 126).clamp(0, EXPONENTS - 2)
    at = torch.where(clean == 0, torch.zeros_like(at), at)
    return torch.where(finite, at, torch.full_like(at, EXPONENTS - 1)).long()
