"""Move elements of a sharded tensor between two layouts: each rank sends what others need of its part, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.engines.ranks import bytes_of, exchange_device
from torchparams.expressions.sharded import Box, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class Move(NamedTuple):
    """A box of elements that one rank sends to another, or copies if it is both.

    Attributes:
        sender, receiver: Global ranks.
        box: The elements, by offsets in the whole tensor.
    """

    sender: int
    receiver: int
    box: Box


def moves(source: Layout, target: Layout) -> Iterator[Move]:
    """The moves between two layouts of one tensor on the same ranks; each needed element moves once.

    A rank that keeps a replica of a part uses its own. The others share the work of sending.

    >>> rows = Layout((2, 2), (0, 1), {0: Box((0, 0), (1, 2)), 1: Box((1, 0), (1, 2))})
    >>> columns = Layout((2, 2), (0, 1), {0: Box((0, 0), (2, 1)), 1: Box((0, 1), (2, 1))})
    >>> [(move.sender, move.receiver, move.box.offsets) for move in moves(rows, columns)]
    [(0, 0, (0, 0)), (1, 0, (1, 0)), (0, 1, (0, 1)), (1, 1, (1, 1))]
    """
    replicas: dict[Box, list[int]] = {}
    for rank in source.ranks:
        if source.boxes[rank].numel:
            replicas.setdefault(source.boxes[rank], []).append(rank)
    for receiver in target.ranks:
        for box, ranks in replicas.items():
            common = _common(box, target.boxes[receiver])
            if common is not None:
                yield Move(receiver if receiver in ranks else ranks[receiver % len(ranks)], receiver, common)


def whole_on(layout: Layout) -> Layout:
    """A layout with the whole tensor on each rank."""
    whole = Box((0,) * len(layout.grid), layout.grid)
    return Layout(layout.grid, layout.ranks, dict.fromkeys(layout.ranks, whole))


def redistribute(part: torch.Tensor, into: torch.Tensor, source: Layout, target: Layout) -> None:
    """Copy the elements of a sharded tensor into this rank's part in another layout.

    All ranks of the layouts call it. Elements go directly between ranks, as point-to-point messages; the receiver
    casts them to the dtype of `into`.

    Args:
        part: This rank's part in the layout `source`.
        into: This rank's part in the layout `target`; written in place.
        source, target: Layouts of one tensor on the same ranks.
    """
    import torch
    import torch.distributed as dist

    here, device = dist.get_rank(), exchange_device()
    operations: list[Any] = []
    received: list[tuple[list[slice], tuple[int, ...], Any]] = []
    for move in moves(source, target):
        outgoing, incoming = move.sender == here, move.receiver == here
        if incoming:
            inside = _slices(move.box, target.boxes[here])
        if outgoing:
            values = part[tuple(_slices(move.box, source.boxes[here]))]
            if incoming:
                into[tuple(inside)].copy_(values)
            else:
                operations.append(dist.P2POp(dist.isend, bytes_of(values).to(device), move.receiver))
        elif incoming:
            buffer = torch.empty(move.box.numel * part.element_size(), dtype=torch.uint8, device=device)
            operations.append(dist.P2POp(dist.irecv, buffer, move.sender))
            received.append((inside, move.box.sizes, buffer))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    for inside, sizes, buffer in received:
        into[tuple(inside)].copy_(buffer.view(part.dtype).reshape(sizes))


def _common(a: Box, b: Box) -> Box | None:
    """Elements in both boxes; None if there are none."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    ends = (min(x + n, y + m) for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))
    sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
    return Box(offsets, sizes) if all(size > 0 for size in sizes) else None


def _slices(box: Box, part: Box) -> list[slice]:
    """Slices of a box in a part that contains it."""
    return [
        slice(offset - begin, offset - begin + size)
        for offset, size, begin in zip(box.offsets, box.sizes, part.offsets, strict=True)
    ]
