"""Ranks of a training: which rank writes, and how numbers of sharded parameters are combined."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.engines.ranks import Ranks, fingerprint
from torchparams.errors import UnsupportedSource
from torchparams.record.measured import Measured, together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.expressions.sharded import Layout

    Array = np.ndarray[Any, Any]


class Team:
    """The ranks that record a training together, as seen from one of them.

    Args:
        names: The parameters.
        layouts: Which part of each parameter every rank keeps; None for a whole one.

    Attributes:
        here: This rank.
        is_first: Whether this rank writes the record.
        is_sharded: Whether any parameter is sharded, so that a record needs a collective.
    """

    def __init__(self, names: Sequence[str], layouts: Sequence[Layout | None]) -> None:
        dist = sys.modules.get("torch.distributed")
        active = dist is not None and dist.is_available() and dist.is_initialized()
        self.here = dist.get_rank() if active and dist is not None else 0
        self.is_sharded = active and any(layout is not None for layout in layouts)
        members = {rank for layout in layouts if layout is not None for rank in layout.ranks}
        self._ranks = Ranks(members) if self.is_sharded else None
        self.is_first = self.here == 0 if self._ranks is None else self._ranks.is_first
        if self._ranks is not None:
            self._ranks.meet(f"Recorder of {len(names)} parameters ({fingerprint(names)})")
        self.place(layouts)

    def place(self, layouts: Sequence[Layout | None]) -> None:
        """Set the parameters of the next records.

        Raises:
            UnsupportedSource: They are sharded, and were not before.
        """
        if self._ranks is None and any(layout is not None for layout in layouts):
            raise UnsupportedSource("the model was sharded after its recorder was created", hint="shard it before")
        owners: dict[int, tuple[int, ...]] = {}  # many parameters share a layout
        counted = []
        for layout in layouts:
            if layout is None:
                counted.append(self.is_first)  # the same on every rank
            else:
                ranks = owners.get(id(layout))
                if ranks is None:
                    ranks = owners[id(layout)] = layout.owners()
                counted.append(self.here in ranks)
        self._counted = np.array(counted, bool)

    def agree(self, number: int, error: Exception | None) -> int:
        """Return the number of the first rank; an error on one rank is raised on all.

        Raises:
            RanksError: Another rank failed.
        """
        if self._ranks is None:
            if error is not None:
                raise error
            return number
        self._ranks.agree(error)
        return int(self._ranks.gather_numbers([float(number)])[0][0])

    def earliest(self, first: Array) -> Array:
        """Minimum over all ranks, by one collective if any parameter is sharded.

        Args:
            first: First step with a gradient that is not finite, for each parameter; infinite for none.
        """
        return first if self._ranks is None else np.min(self._ranks.gather_array(first), axis=0)

    def collect(
        self, parts: Sequence[Measured], update: Array | None, first: Array, living: Sequence[Array | None]
    ) -> tuple[list[Measured], Array | None, Array, list[Array | None]]:
        """Combine the numbers of whole parameters with one collective, if any parameter is sharded.

        Args:
            parts: Numbers of the parts on this rank, one row per parameter.
            update: Norms of updates and of parameters, see `Meter.distance`; None if they were not measured.
            first: First step with a gradient that is not finite; infinite for none.
            living: Rows with a gradient, for some parameters; None without a gradient.
        """
        if self._ranks is None:
            return list(parts), update, first, list(living)
        packed = [part.packed() for part in parts] + ([] if update is None else [update])
        widths = np.cumsum([each.shape[1] for each in packed])
        table = np.column_stack([np.where(self._counted[:, None], np.hstack(packed), 0), first])
        rows = [np.zeros(0) if each is None else each.astype(np.float64) for each in living]
        heard = np.array(self._ranks.gather_array(np.concatenate([table.ravel(), *rows])))
        tables = heard[:, : table.size].reshape(len(heard), *table.shape)
        pieces = np.split(tables[:, :, :-1], widths[:-1], axis=2)
        whole = [Measured.unpacked(piece) for piece in pieces[: len(parts)]]
        ends = np.cumsum([len(each) for each in rows])
        alive = np.split(heard[:, table.size :].max(axis=0), ends[:-1]) if rows else []
        return (
            whole,
            None if update is None else together(pieces[-1]),
            tables[:, :, -1].min(axis=0),
            [None if each is None else found for each, found in zip(living, alive, strict=True)],
        )
