"""Results that wait on an accelerator, and their transfer to the host."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Array = np.ndarray[Any, Any]


class Transfer:
    """Tensors on accelerators that are fetched together, with one transfer for each device."""

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.Tensor, Callable[[Array], object]]] = []

    def add(self, tensor: torch.Tensor, use: Callable[[Array], object]) -> None:
        """Fetch a tensor with the next `fetch`, which passes it as an array to `use`."""
        self._waiting.append((tensor, use))

    def fetch(self) -> None:
        """Fetch all tensors; waits for their devices."""
        import torch

        devices: dict[Any, list[int]] = {}
        for i, (tensor, _) in enumerate(self._waiting):
            devices.setdefault(tensor.device, []).append(i)
        for places in devices.values():
            tensors = [self._waiting[i][0] for i in places]
            flat = to_host(torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]))
            parts = torch.split(flat, [tensor.numel() * tensor.element_size() for tensor in tensors])
            for i, tensor, part in zip(places, tensors, parts, strict=True):
                aligned = part.clone().view(tensor.dtype)  # a part may begin at any byte
                self._waiting[i][1](aligned.reshape(tensor.shape).numpy())
        self._waiting.clear()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the memory of the CPU."""
    return tensor.cpu()


class Flags:
    """Which tensors have NaN or infinities.

    Args:
        local: Index of a tensor that is known to have some → how many.
        flags: Indexes, and a tensor with their flags on an accelerator.
    """

    def __init__(self, local: dict[int, float], flags: list[tuple[list[int], torch.Tensor]]) -> None:
        self._local, self._flags = local, flags

    @property
    def is_here(self) -> bool:
        """Whether the result is available without waiting for an accelerator."""
        return not self._flags

    def ask(self, transfer: Transfer) -> None:
        """Fetch the flags on accelerators with a transfer."""
        for places, flags in self._flags:
            transfer.add(flags, partial(self._add, places))
        self._flags = []

    def _add(self, places: list[int], flags: Array) -> None:
        self._local.update((places[i], math.nan) for i in np.flatnonzero(flags).tolist())

    def counts(self) -> dict[int, float]:
        """Index → number of elements that are not finite, NaN if unknown; waits for an accelerator."""
        if self._flags:
            transfer = Transfer()
            self.ask(transfer)
            transfer.fetch()
        return dict(sorted(self._local.items()))
