"""Parameters that share memory: exactly, partly, or with themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from torchparams.sources.live.network import Member

MASK = 1 << 28
"""Maximum number of elements marked one by one to find out if strided views share an element."""


@dataclass(slots=True)
class View:
    """Memory range of a parameter.

    Attributes:
        entry: The parameter.
        device: Key of the memory: the device, and the storage for tensors without an address.
        start, stop: Address of its first byte, and address after its last byte.
        dense: True if it owns all bytes in between.
        itself: True if several of its indices share an element.
    """

    entry: Member
    device: object
    start: int
    stop: int
    dense: bool
    itself: bool


@dataclass(slots=True)
class Sharing:
    """Parameters that share memory, by kind.

    Attributes:
        exact: Groups of different parameters with exactly the same elements.
        partial: Pairs that share some elements, in the order of the entries.
        itself: Parameters in which several indices share an element.
    """

    exact: list[list[Member]]
    partial: list[tuple[Member, Member]]
    itself: list[Member]


def view_of(entry: Member, strided: torch.layout) -> View | None:
    """Memory range of a parameter; None if it has none, as with layouts other than `torch.strided`."""
    tensor = entry.tensor
    try:
        numel, size = tensor.numel(), tensor.element_size()
        if numel == 0 or tensor.layout is not strided:
            return None
        start: int = tensor.data_ptr()
        device: object = tensor.device
        if start == 0 or tensor.is_meta:  # no address
            storage = tensor.untyped_storage()
            device, start = storage._cdata, int(tensor.storage_offset()) * size
        if tensor.is_contiguous():
            return View(entry, device, start, start + numel * size, True, False)
        pairs = [(n, stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
        extent = 1 + sum((n - 1) * stride for n, stride in pairs)
        itself = any(stride == 0 for _, stride in pairs) or numel > extent
        return View(entry, device, start, start + extent * size, numel == extent and not itself, itself)
    except Exception:  # a tensor subclass may raise any error
        return None


def sharing(entries: Sequence[Member]) -> Sharing:
    """Find parameters that share memory, by sorting their addresses."""
    import torch

    strided = torch.strided
    found = Sharing([], [], [])
    places: dict[object, list[tuple[int, int, int]]] = {}
    for row, entry in enumerate(entries):
        view = view_of(entry, strided)
        if view is not None:
            places.setdefault(view.device, []).append((view.start, view.stop, row))
            if view.itself:
                found.itself.append(entry)
    for on_device in places.values():
        on_device.sort()
        cluster: list[int] = []
        end = -1
        for start, stop, row in on_device:
            # Compare with the greatest end so far, not the last end: a long view may span several short ones.
            if start >= end:
                if len(cluster) > 1:
                    _split([view for i in cluster if (view := view_of(entries[i], strided))], found)
                cluster.clear()
            cluster.append(row)
            end = max(end, stop)
        if len(cluster) > 1:
            _split([view for i in cluster if (view := view_of(entries[i], strided))], found)
    if found.partial:
        rows = {id(entry.tensor): row for row, entry in enumerate(entries)}
        ordered = [sorted(pair, key=lambda entry: rows[id(entry.tensor)]) for pair in found.partial]
        found.partial = sorted(((a, b) for a, b in ordered), key=lambda pair: [rows[id(e.tensor)] for e in pair])
    return found


def _split(cluster: list[View], found: Sharing) -> None:
    """Separate exact ties from partial overlaps in a cluster of views sorted by start."""
    kinds: dict[tuple[object, ...], list[View]] = {}
    for view in cluster:
        tensor = view.entry.tensor
        kinds.setdefault((view.start, tensor.shape, tensor.stride(), tensor.dtype), []).append(view)
    found.exact += [[view.entry for view in same] for same in kinds.values() if len(same) > 1]
    distinct = [same[0] for same in kinds.values()]
    if len(distinct) == 1:
        return
    if all(view.dense for view in distinct):
        longest = distinct[0]
        for view in distinct[1:]:
            if view.start < longest.stop:
                found.partial.append((longest.entry, view.entry))
            if view.stop > longest.stop:
                longest = view
    else:
        found.partial += _marked(distinct)


def _marked(cluster: list[View]) -> list[tuple[Member, Member]]:
    """Pairs that share an element, found by marking the elements of each view in a map of the memory.

    Byte ranges are not enough: columns of one matrix interleave without sharing elements.
    """
    import math

    import numpy as np

    start, stop = cluster[0].start, max(view.stop for view in cluster)
    sizes = [view.entry.tensor.element_size() for view in cluster]
    unit = math.gcd(*sizes, *(view.start - start for view in cluster))
    count = (stop - start) // unit
    if count > MASK:
        return []  # unknown: better no finding than a false one
    owner = np.full(count, -1, np.int32)
    pairs = []
    for place, (view, size) in enumerate(zip(cluster, sizes, strict=True)):
        tensor = view.entry.tensor
        shape = (*tensor.shape, size // unit)
        strides = (*(stride * size // unit * owner.itemsize for stride in tensor.stride()), owner.itemsize)
        here = np.lib.stride_tricks.as_strided(owner[(view.start - start) // unit :], shape, strides)
        taken = here[here >= 0]
        if taken.size:
            pairs.append((cluster[int(taken.flat[0])].entry, view.entry))
        here[...] = place
    return pairs
