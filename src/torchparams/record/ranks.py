"""Ranks of a training: which rank writes, and how numbers of sharded parameters are combined."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.record.meter import Measured, together
from torchparams.sources.live.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, Any]


class Team:
    """The ranks of a training, as seen from one rank.

    Args:
        tensors: The parameters.

    Attributes:
        is_first: Whether this rank writes the record: rank 0, or the only one.
        is_sharded: Whether any parameter is sharded.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        dist = sys.modules.get("torch.distributed")
        active = dist is not None and dist.is_available() and dist.is_initialized()
        self._dist = dist if active else None
        self.is_first = not active or dist.get_rank() == 0  # type: ignore[union-attr]
        self.is_sharded = bool(self._dist) and any(map(is_dtensor, tensors))
        self._tensors = tensors

    def agree(self, number: int) -> int:
        """Return the number of rank 0; a collective if parameters are sharded."""
        if not self.is_sharded:
            return number
        return int(self._gather(np.array([[float(number)]]))[0][0, 0])

    def collect(
        self, parts: Sequence[Measured], apart: Array | None, first: Array
    ) -> tuple[list[Measured], Array | None, Array]:
        """Combine the numbers of whole parameters with one collective, if any parameter is sharded.

        Args:
            parts: Numbers of the parts on this rank, one row per parameter.
            apart: Norms of differences and of weights, see `Meter.distance`; None if they were not measured.
            first: The first step with a gradient that is not finite; infinite for none.
        """
        if not self.is_sharded:
            return list(parts), apart, first
        counted = np.array([self._counts(tensor) for tensor in self._tensors])
        packed = [part.packed() for part in parts] + ([] if apart is None else [apart])
        widths = np.cumsum([each.shape[1] for each in packed])
        sent = np.column_stack([np.where(counted[:, None], np.hstack(packed), 0), first])
        ranks = np.stack(self._gather(sent))
        pieces = np.split(ranks[:, :, :-1], widths[:-1], axis=2)
        whole = [Measured.unpacked(piece) for piece in pieces[: len(parts)]]
        return whole, None if apart is None else together(pieces[-1]), ranks[:, :, -1].min(axis=0)

    def _counts(self, tensor: Any) -> bool:
        """Whether the part on this rank counts: one of several replicas, and rank 0 for a plain tensor."""
        if not is_dtensor(tensor):
            return self.is_first
        place = tensor.device_mesh.get_coordinate()
        if place is None:
            return False
        return all(at == 0 for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate())

    def _gather(self, array: Array) -> list[Array]:
        import torch

        assert self._dist is not None
        device = next((t.device for t in self._tensors if is_dtensor(t)), torch.device("cpu"))
        sent = torch.from_numpy(np.ascontiguousarray(array, np.float64)).to(device)
        got = [torch.empty_like(sent) for _ in range(self._dist.get_world_size())]
        self._dist.all_gather(got, sent)
        return [each.cpu().numpy() for each in got]
