"""Fetch elements of sharded tensors from the ranks that hold them: one rank asks, the others serve.

The asking rank reads whole rows along the first dimension in chunks, and keeps the latest chunks, so memory does not
depend on the size of the tensor. It sends a message when it finishes, also after an error, so that the others continue.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from math import prod
from typing import TYPE_CHECKING, Any, Self

from torchparams.engines.ranks import bytes_of, receive, send

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import numpy as np
    import torch

    from torchparams.engines.ranks import Ranks
    from torchparams.expressions.sharded import Sharded

    Array = np.ndarray[Any, Any]

CHUNK_BYTES = 1 << 24
"""Bytes of a tensor per fetch: whole rows, at least one."""

_CHUNKS = 4  # cached chunks: threads read different parts of a tensor

_DONE, _ROWS, _REDUCE = range(3)


class Fetching:
    """Context that connects sharded tensors to the ranks that hold them.

    Args:
        team: Ranks; this rank is the first.
        shards: Sharded tensors, in the same order on all ranks.
    """

    def __init__(self, team: Ranks, shards: Sequence[Sharded]) -> None:
        self._team, self._shards = team, shards
        self._number = {id(shard): number for number, shard in enumerate(shards)}
        self._lock = threading.Lock()
        self._chunks: OrderedDict[tuple[int, int], Array] = OrderedDict()
        self._whole: tuple[int, torch.Tensor] | None = None

    def __enter__(self) -> Self:
        for shard in self._shards:
            shard.remote = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for shard in self._shards:
            shard.remote = None
        self._chunks.clear()
        self._whole = None
        for rank in self._team.others:
            _say(rank, _DONE)

    def read(self, x: Sharded, start: int, stop: int) -> Array:
        """Elements `[start, stop)` of the whole tensor."""
        import numpy as np

        grid = x.layout.grid or (1,)
        row = max(prod(grid[1:]), 1)
        rows = max(CHUNK_BYTES // max(row * x.dtype.itemsize, 1), 1)
        out = np.empty(stop - start, x.dtype.numpy)
        at = start
        while at < stop:
            number = at // (rows * row)
            chunk = self._chunk(x, number, number * rows, min((number + 1) * rows, grid[0]))
            first = at - number * rows * row
            count = min(len(chunk) - first, stop - at)
            out[at - start : at - start + count] = chunk[first : first + count]
            at += count
        return out

    def _chunk(self, x: Sharded, number: int, first: int, last: int) -> Array:
        """Rows `[first, last)` of a tensor, flattened."""
        key = id(x), number
        with self._lock:
            found = self._chunks.get(key)
            if found is None:
                found = (self._rows if x.reduce is None else self._reduced)(x, first, last)
                self._chunks[key] = found
                while len(self._chunks) > _CHUNKS:
                    self._chunks.popitem(last=False)
            else:
                self._chunks.move_to_end(key)
        return found

    def _rows(self, x: Sharded, first: int, last: int) -> Array:
        import numpy as np
        import torch

        layout, here = x.layout, self._team.here
        grid = layout.grid or (1,)
        out = np.empty((last - first, *grid[1:]), x.dtype.numpy)
        asked: list[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]] = []
        # Prefer this rank's replica, then that of the lowest rank.
        for rank in (here, *layout.owners()):
            box = layout.boxes[rank]
            offsets, sizes = box.offsets or (0,), box.sizes or (1,)
            begin, end = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if begin >= end or not prod(sizes) or any(layout.boxes[other] == box for other, *_ in asked):
                continue
            asked.append((rank, begin, end, offsets, sizes))
        for rank, begin, end, offsets, _ in asked:
            if rank != here:
                _say(rank, _ROWS, self._number[id(x)], begin - offsets[0], end - offsets[0])
        for rank, begin, end, offsets, sizes in asked:
            shape = (end - begin, *sizes[1:])
            if rank == here:
                data = _rows_of(x, begin - offsets[0], end - offsets[0]).cpu()
            else:
                data = receive(torch.empty(prod(shape) * x.dtype.itemsize, dtype=torch.uint8), rank)
            inside = tuple(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True))
            out[(slice(begin - first, end - first), *inside)] = data.numpy().view(x.dtype.numpy).reshape(shape)
        return out.reshape(-1)

    def _reduced(self, x: Sharded, first: int, last: int) -> Array:
        """Rows of a tensor that is a sum over ranks: all ranks reduce it once, and this one keeps the result."""
        number = self._number[id(x)]
        if self._whole is None or self._whole[0] != number:
            for rank in self._team.others:
                _say(rank, _REDUCE, number)
            assert x.reduce is not None
            self._whole = number, x.reduce().detach().cpu().contiguous()
        grid = x.layout.grid or (1,)
        part = bytes_of(self._whole[1].reshape(grid)[first:last])
        made: Array = part.numpy().view(x.dtype.numpy)
        return made


def serve(team: Ranks, shards: Sequence[Sharded]) -> None:
    """Serve elements to the first rank until it finishes or fails.

    Args:
        team: Ranks; this rank is not the first.
        shards: Sharded tensors, in the same order on all ranks.
    """
    import torch

    first = team.members[0]
    while True:
        message = receive(torch.empty(4, dtype=torch.int64), first)
        what, number, begin, end = message.tolist()
        if what == _DONE:
            return
        if what == _REDUCE:
            reduce = shards[number].reduce
            assert reduce is not None
            reduce()
        else:
            send(_rows_of(shards[number], begin, end), first)


def _say(rank: int, what: int, number: int = 0, begin: int = 0, end: int = 0) -> None:
    import torch

    send(torch.tensor([what, number, begin, end]), rank)


def _rows_of(x: Sharded, begin: int, end: int) -> torch.Tensor:
    """Rows of this rank's part, as bytes."""
    part = x.tensor()
    return bytes_of(part.reshape(1) if not part.ndim else part[begin:end])
