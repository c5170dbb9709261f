"""Norms, means and counts of many tensors at once, on their own device.

Tensors in CPU memory are measured with one kernel call over their addresses. Tensors on an accelerator are measured
with torch operations there, and one transfer fetches the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.dtypes import DType
from torchparams.record.measured import Measured
from torchparams.record.on_device import distances, floating, measured
from torchparams.record.transfer import Flags, Transfer
from torchparams.sketch.moments import KINDS, Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _Alike:
    """Tensors that are measured together.

    Attributes:
        places: Indexes among all tensors.
        layout: Layout for the kernel; None for tensors that torch measures.
    """

    places: list[int]
    layout: Layout | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to measure tensors of certain dtypes, sizes and strides.

    Attributes:
        key: What tensors must have in common with those of the plan.
        groups: The tensors, by kernel.
        direct: Whether the memory of every tensor is read unchanged, so that none needs `plain`.
    """

    key: Any
    groups: list[_Alike]
    direct: bool


class Meter:
    """Measures the same tensors, or others of the same shapes, at many steps.

    Methods take a `Transfer`: then numbers of tensors on an accelerator are missing until its `fetch`.

    Args:
        by_torch: Measure all tensors with torch, as for an accelerator.
    """

    def __init__(self, *, by_torch: bool = False) -> None:
        self._by_torch = by_torch
        self._plans: list[_Plan] = []

    def measure(
        self,
        tensors: Sequence[torch.Tensor | None],
        *,
        exponents: bool = False,
        transfer: Transfer | None = None,
    ) -> Measured:
        """Measure tensors: one row each, with zeros for None.

        For a sparse tensor, its stored values are measured.

        Args:
            tensors: The tensors.
            exponents: Compute histograms of magnitudes too.
            transfer: See the class.
        """
        import torch

        found = Measured.empty(len(tensors), exponents)
        later = transfer or Transfer()
        with torch.no_grad():
            held, groups = self._look(tensors)
            for alike in groups:
                some = [held[i] for i in alike.places]
                at = alike.places
                if alike.layout is None:
                    reals, integers = measured(some, exponents)
                    later.add(reals, partial(_fill_reals, found, at))
                    later.add(integers, partial(_fill_integers, found, at))
                    continue
                got = alike.layout.measure(list(map(torch.Tensor.data_ptr, some)), exponents=exponents)
                found.counts[at], found.sums[at], found.most[at] = got.counts, got.sums, got.most
                found.zeros[at], found.nonfinite[at] = got.zeros, got.nonfinite
                found.norms[at] = _roots(got.squares, got.most, some)
                if found.exponents is not None:
                    found.exponents[at] = got.exponents
            if transfer is None:
                later.fetch()
        return found

    def distance(
        self, tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor], *, transfer: Transfer | None = None
    ) -> Array:
        """Norms of `tensors` - `others`, and norms of `others`; float64, shape (n, 2).

        Args:
            tensors: The tensors.
            others: Tensors with the same shapes, strides and dtypes.
            transfer: See the class.
        """
        import torch

        found = np.zeros((len(tensors), 2))
        later = transfer or Transfer()
        with torch.no_grad():
            a, groups = self._look(tensors)
            b, _ = self._look(others)
            for alike in groups:
                x, y = [a[i] for i in alike.places], [b[i] for i in alike.places]
                if alike.layout is not None:
                    squares = alike.layout.distance(*(list(map(torch.Tensor.data_ptr, each)) for each in (x, y)))
                    found[alike.places] = np.sqrt(squares)
                else:
                    later.add(distances(x, y), partial(_fill_pairs, found, alike.places))
            if transfer is None:
                later.fetch()
        return found

    def nonfinite(self, tensors: Sequence[torch.Tensor | None]) -> Flags:
        """Find tensors with NaN or infinities; does not wait for an accelerator."""
        import torch

        local: dict[int, float] = {}
        flags = []
        with torch.no_grad():
            held, groups = self._look(tensors)
            for alike in groups:
                some = [held[i] for i in alike.places]
                if alike.layout is not None:
                    odd = alike.layout.nonfinite(list(map(torch.Tensor.data_ptr, some)))
                    local.update((alike.places[i], float(odd[i])) for i in np.flatnonzero(odd).tolist())
                    continue
                where = [i for i, each in zip(alike.places, some, strict=True) if each.numel()]
                if where:
                    norms = torch._foreach_norm([floating(held[i]) for i in where], torch.inf)
                    flags.append((where, ~torch.isfinite(torch.stack(norms))))
        return Flags(local, flags)

    def _look(self, tensors: Sequence[torch.Tensor | None]) -> tuple[Sequence[Any], list[_Alike]]:
        """The tensors as `plain` ones, and how to measure them; quick if they are like those of an earlier call."""
        key = _key(tensors)
        plan = next((plan for plan in self._plans if plan.key == key), None) if key is not None else None
        if plan is not None and plan.direct:
            return tensors, plan.groups
        held = [None if tensor is None else plain(tensor) for tensor in tensors]
        if plan is None:
            direct = all(_same_memory(a, b) for a, b in zip(tensors, held, strict=True))
            plan = _Plan(key, self._groups(held), direct)
            if key is not None:
                self._plans = [plan, *self._plans[: PLANS - 1]]
        return held, plan.groups

    def _groups(self, held: Sequence[torch.Tensor | None]) -> list[_Alike]:
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


PLANS = 4
"""Number of plans that a meter keeps: of weights, and of gradients with different ones missing."""


def _key(tensors: Sequence[torch.Tensor | None]) -> Any:
    """Key of the plan for tensors: dtypes, devices, sizes and strides; None for tensors that need `plain`.

    All calls are `map` of C functions: this runs at every step, also for thousands of tensors.
    """
    import torch

    of = torch.Tensor
    types = list(map(type, tensors))
    if not {of, torch.nn.Parameter, type(None)}.issuperset(types):
        return None
    some = [tensor for tensor in tensors if tensor is not None]
    try:
        strides = list(map(of.stride, some))
    except RuntimeError:  # of sparse tensors
        return None
    missing = None if len(some) == len(types) else [tensor is None for tensor in tensors]
    return missing, strides, *(list(map(attribute, some)) for attribute in (*_ATTRIBUTES, of.numel))


_ATTRIBUTES = attrgetter("dtype"), attrgetter("device")


def _same_memory(tensor: torch.Tensor | None, held: torch.Tensor | None) -> bool:
    if tensor is None or held is None:
        return True
    return tensor.dtype == held.dtype and tensor.layout == held.layout and tensor.data_ptr() == held.data_ptr()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor as a strided, dense, real tensor; the tensor itself if possible."""
    import torch

    tensor = tensor.detach()
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


def _fill_reals(found: Measured, places: list[int], rows: Array) -> None:
    found.sums[places], found.norms[places], found.most[places] = rows.T


def _fill_integers(found: Measured, places: list[int], rows: Array) -> None:
    found.counts[places], found.zeros[places], found.nonfinite[places] = rows[:, :3].T
    if found.exponents is not None:
        found.exponents[places] = rows[:, 3:]


def _fill_pairs(found: Array, places: list[int], rows: Array) -> None:
    found[places] = rows


def _roots(squares: Array, most: Array, tensors: Sequence[torch.Tensor]) -> Array:
    """Norms; float64 tensors whose squares overflow or underflow are scaled first."""
    with np.errstate(invalid="ignore"):
        norms: Array = np.sqrt(squares)
    lost = np.isinf(squares) | ((squares < 1e-280) & (most > 0))
    for i in np.flatnonzero(lost).tolist():
        values = tensors[i].double().cpu().numpy().reshape(-1)
        norms[i] = most[i] * np.linalg.norm(values[np.isfinite(values)] / most[i])
    return norms
