"""Norms, means and counts of many tensors at once, on their own device.

Tensors in CPU memory are measured with one kernel call over their addresses. Tensors on an accelerator are measured
with torch operations there, and one transfer fetches the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.dtypes import DType
from torchparams.sketch.moments import EXPONENTS, KINDS, Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers of tensors, a row for each.

    Attributes:
        counts: Number of elements; int64, shape (n,).
        sums, norms, most: Sum, L2 norm and largest magnitude of the finite elements; float64, (n,).
        zeros, nonfinite: Number of elements that are zero, and of NaN and infinities; int64, (n,).
        exponents: Histograms of magnitudes, see `sketch.moments.EXPONENTS`; int64, (n, 256). None if not requested.
    """

    counts: Array
    sums: Array
    norms: Array
    most: Array
    zeros: Array
    nonfinite: Array
    exponents: Array | None = None

    @classmethod
    def empty(cls, count: int, exponents: bool) -> Measured:
        """Rows of zeros."""
        integers, reals = np.zeros((3, count), np.int64), np.zeros((3, count))
        histogram = np.zeros((count, EXPONENTS), np.int64) if exponents else None
        return cls(integers[0], reals[0], reals[1], reals[2], integers[1], integers[2], histogram)

    @property
    def means(self) -> Array:
        """Mean of the finite elements; NaN if there are none."""
        with np.errstate(all="ignore"):
            found: Array = self.sums / (self.counts - self.nonfinite)
        return found

    @property
    def deviations(self) -> Array:
        """Standard deviation of the finite elements, with n - 1; NaN for a single element."""
        with np.errstate(all="ignore"):
            count = self.counts - self.nonfinite
            found: Array = np.sqrt(np.maximum(np.square(self.norms) - self.sums**2 / count, 0) / (count - 1))
        return found

    def grouped(self, members: Sequence[Sequence[int]]) -> Measured:
        """Combine rows into groups, given by row numbers."""
        sums = [getattr(self, key) for key in ("counts", "sums", "zeros", "nonfinite")]
        counts, total, zeros, nonfinite = (np.array([column[list(m)].sum() for m in members]) for column in sums)
        norms = np.array([together(self.norms[list(m)]) for m in members])
        most = np.array([self.most[list(m)].max(initial=0) for m in members])
        exponents = None if self.exponents is None else np.array([self.exponents[list(m)].sum(0) for m in members])
        return Measured(counts, total, norms, most, zeros, nonfinite, exponents)

    def packed(self) -> Array:
        """All columns as one float64 array, which ranks exchange; counts are exact below 2^53."""
        columns = [self.norms, self.most, self.counts, self.sums, self.zeros, self.nonfinite]
        return np.column_stack([*columns, *([] if self.exponents is None else [self.exponents])]).astype(np.float64)

    @classmethod
    def unpacked(cls, ranks: Array) -> Measured:
        """Combine the `packed` numbers of all parts, of shape (ranks, n, columns), for whole tensors."""
        norms, most, total = together(ranks[:, :, 0]), ranks[:, :, 1].max(axis=0), ranks[:, :, 2:].sum(axis=0)
        counts, zeros, nonfinite = (total[:, i].astype(np.int64) for i in (0, 2, 3))
        exponents = total[:, 4:].astype(np.int64) if total.shape[1] > 4 else None
        return cls(counts, total[:, 1], norms, most, zeros, nonfinite, exponents)


@dataclass(frozen=True, slots=True)
class _Alike:
    """Tensors that are measured together.

    Attributes:
        places: Indexes among all tensors.
        layout: Layout for the kernel; None for tensors that torch measures.
    """

    places: list[int]
    layout: Layout | None


class Meter:
    """Measures the same tensors, or others of the same shapes, at many steps.

    Args:
        by_torch: Measure all tensors with torch, as for an accelerator.
    """

    def __init__(self, *, by_torch: bool = False) -> None:
        self._by_torch = by_torch
        self._plans: dict[tuple[Any, ...], list[_Alike]] = {}

    def measure(self, tensors: Sequence[torch.Tensor | None], *, exponents: bool = False) -> Measured:
        """Measure tensors: one row each, with zeros for None.

        For a sparse tensor, its stored values are measured; for a DTensor, the part on this rank.

        Args:
            tensors: The tensors.
            exponents: Compute histograms of magnitudes too.
        """
        found = Measured.empty(len(tensors), exponents)
        held = [None if tensor is None else plain(tensor) for tensor in tensors]
        remote: list[tuple[_Alike, torch.Tensor]] = []
        for alike in self._plan(held):
            some = [each for i in alike.places if (each := held[i]) is not None]
            if alike.layout is None:
                remote.append((alike, _measured(some, exponents)))
                continue
            got = alike.layout.measure([each.data_ptr() for each in some], exponents=exponents)
            at = alike.places
            found.counts[at], found.sums[at], found.most[at] = got.counts, got.sums, got.most
            found.zeros[at], found.nonfinite[at] = got.zeros, got.nonfinite
            found.norms[at] = _roots(got.squares, got.most, some)
            if found.exponents is not None:
                found.exponents[at] = got.exponents
        for alike, rows in remote:  # all transfers start before the first is awaited
            _fill(found, alike.places, rows.cpu().numpy())
        return found

    def distance(self, tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Array:
        """Norms of `tensors` - `others`, and norms of `others`; float64, shape (n, 2).

        Args:
            tensors: The tensors.
            others: Tensors with the same shapes, strides and dtypes.
        """
        import torch

        found = np.zeros((len(tensors), 2))
        a, b = [plain(tensor) for tensor in tensors], [plain(tensor) for tensor in others]
        remote = []
        for alike in self._plan(a):
            x, y = [a[i] for i in alike.places], [b[i] for i in alike.places]
            if alike.layout is not None:
                squares = alike.layout.distance([t.data_ptr() for t in x], [t.data_ptr() for t in y])
                found[alike.places] = np.sqrt(squares)
            else:
                norms = [
                    torch.linalg.vector_norm(t, dtype=_wide(t))
                    for u, v in zip(map(_wider, x), map(_wider, y), strict=True)
                    for t in (u - v, v)
                ]
                remote.append((alike, torch.stack(norms)))
        for alike, pairs in remote:
            found[alike.places] = pairs.cpu().numpy().reshape(-1, 2)
        return found

    def nonfinite(self, tensors: Sequence[torch.Tensor | None]) -> Flags:
        """Whether tensors have NaN or infinities; does not wait for an accelerator."""
        import torch

        held = [None if tensor is None else plain(tensor) for tensor in tensors]
        local: list[int] = []
        flags = []
        for alike in self._plan(held):
            some = [each for i in alike.places if (each := held[i]) is not None]
            if alike.layout is not None:
                odd = alike.layout.nonfinite([each.data_ptr() for each in some])
                local += [alike.places[i] for i in np.flatnonzero(odd)]
            else:
                where = [i for i, each in zip(alike.places, some, strict=True) if each.numel()]
                some = [each for each in some if each.numel()]
                if not some:
                    continue
                norms = torch._foreach_norm([_floating(each) for each in some], torch.inf)
                flags.append((where, ~torch.isfinite(torch.stack([norm.float() for norm in norms]))))
        return Flags(sorted(local), flags)

    def _plan(self, held: Sequence[torch.Tensor | None]) -> list[_Alike]:
        key = tuple(None if each is None else (each.dtype, each.device.type, each.numel()) for each in held)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 8:
                self._plans.clear()
            plan = self._plans[key] = self._planned(held)
        return plan

    def _planned(self, held: Sequence[torch.Tensor | None]) -> list[_Alike]:
        groups: dict[Any, list[int]] = {}
        for i, each in enumerate(held):
            if each is not None:
                groups.setdefault((each.dtype, each.device), []).append(i)
        found = []
        for (dtype, device), places in groups.items():
            kind = str(dtype).removeprefix("torch.")
            if kind in KINDS and device.type == "cpu" and not self._by_torch:
                numels = [each.numel() for i in places if (each := held[i]) is not None]
                found.append(_Alike(places, Layout(DType.of(kind), numels)))
            else:
                found.append(_Alike(places, None))
        return found


class Flags:
    """Which tensors have NaN or infinities.

    Args:
        local: Indexes of tensors that are known to have some.
        flags: Indexes, and a tensor with their flags on an accelerator.
    """

    def __init__(self, local: list[int], flags: list[tuple[list[int], torch.Tensor]]) -> None:
        self._local, self._flags = local, flags

    @property
    def is_here(self) -> bool:
        """Whether the result is available without waiting for an accelerator."""
        return not self._flags

    def places(self) -> list[int]:
        """Sorted indexes of these tensors; waits for an accelerator."""
        found = list(self._local)
        for places, flags in self._flags:
            found += [place for place, flag in zip(places, flags.cpu().tolist(), strict=True) if flag]
        return sorted(found)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor as a strided, dense, real tensor; the tensor itself if possible."""
    import torch

    tensor = tensor.detach()
    local = getattr(tensor, "_local_tensor", None)
    if local is not None:  # of a DTensor
        tensor = local
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_contiguous():
        return tensor
    # The order of the elements does not matter if the memory is dense.
    strides, shape = tuple(tensor.stride()), tuple(tensor.shape)
    dense = tensor.permute(sorted(range(tensor.dim()), key=lambda d: (-strides[d], -shape[d])))
    return dense if dense.is_contiguous() else tensor.contiguous()


def _floating(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1 else tensor.float()


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to at least float32, so that differences keep precision."""
    return tensor if tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 4 else tensor.float()


def _wide(tensor: torch.Tensor) -> torch.dtype | None:
    import torch

    return torch.float64 if tensor.device.type in ("cpu", "cuda") else None


def _measured(tensors: Sequence[Any], exponents: bool) -> torch.Tensor:
    """Numbers for each tensor, on its device: count, sum, norm, maximum, zeros, nonfinite, histogram."""
    import torch

    rows = []
    for tensor in tensors:
        values = _floating(tensor)
        finite = torch.isfinite(values)
        clean = torch.where(finite, values, torch.zeros((), dtype=values.dtype, device=values.device)).reshape(-1)
        wide = _wide(clean)
        norm = torch.linalg.vector_norm(clean, dtype=wide)
        most = clean.abs().max() if clean.numel() else clean.new_zeros(())
        parts = [
            torch.full((), clean.numel(), device=clean.device),
            clean.sum(dtype=wide),
            norm,
            most,
            (values == 0).sum(),
            (~finite).sum(),
        ]
        parts = [part.to(wide or torch.float32).reshape(1) for part in parts]
        if exponents:
            _, exponent = torch.frexp(clean.float() if clean.dtype.itemsize < 4 else clean)
            at = (exponent + 126).clamp(0, EXPONENTS - 2)
            at = torch.where(clean == 0, torch.zeros_like(at), at)
            at = torch.where(finite.reshape(-1), at, torch.full_like(at, EXPONENTS - 1))
            counts = torch.zeros(EXPONENTS, dtype=torch.int32, device=clean.device)
            counts.scatter_add_(0, at.long(), torch.ones_like(at, dtype=torch.int32))
            parts.append(counts.to(wide or torch.float32))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _fill(found: Measured, places: list[int], rows: Array) -> None:
    found.counts[places] = rows[:, 0]
    found.sums[places], found.norms[places], found.most[places] = rows[:, 1], rows[:, 2], rows[:, 3]
    found.zeros[places], found.nonfinite[places] = rows[:, 4], rows[:, 5]
    if found.exponents is not None:
        found.exponents[places] = rows[:, 6:]


def _roots(squares: Array, most: Array, tensors: Sequence[torch.Tensor]) -> Array:
    """Norms; float64 tensors whose squares overflow or underflow are scaled first."""
    with np.errstate(invalid="ignore"):
        norms: Array = np.sqrt(squares)
    lost = np.isinf(squares) | ((squares < 1e-280) & (most > 0))
    for i in np.flatnonzero(lost).tolist():
        values = tensors[i].double().cpu().numpy().reshape(-1)
        norms[i] = most[i] * np.linalg.norm(values[np.isfinite(values)] / most[i])
    return norms


def together(norms: Array) -> Array:
    """Combine the norms of several tensors along the first dimension.

    >>> together(np.array([[3.0], [4.0]])).tolist()
    [5.0]
    """
    most: Array = norms.max(axis=0, initial=0)
    scale = np.where((most > 0) & np.isfinite(most), most, 1)
    found: Array = scale * np.sqrt(np.square(norms / scale).sum(axis=0))
    return found
