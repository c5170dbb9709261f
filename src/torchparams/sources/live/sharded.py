"""Rows of sharded live tensors: which part each rank keeps, and how to read the whole.

Nothing here communicates: the placements determine the part of each rank.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable
from torchparams.expressions.sharded import Box, Layout, Sharded
from torchparams.sources.live.flat import RESHARD, unsharded
from torchparams.sources.live.sharding import mesh_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.expressions.base import Expression
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source


# --- parts of the ranks ----------------------------------------------------------------------------


def layout_of(tensor: Any, name: str, label: str) -> Layout:
    """Which part of a DTensor each rank keeps.

    Raises:
        NotReadable: A placement is not supported, or the part on this rank does not match the placements.
    """
    return layouts_of({name: tensor}, label)[0]


def layouts_of(tensors: Mapping[str, Any], label: str) -> list[Layout]:
    """Which part of each DTensor every rank keeps.

    Raises:
        NotReadable: See `layout_of`.
    """
    import torch.distributed as dist

    here = dist.get_rank() if dist.is_initialized() else -1
    known: dict[Any, Layout] = {}  # per mesh, placements and shape: a model has few distinct ones
    found = []
    for name, tensor in tensors.items():
        spec = tensor._spec
        key = id(spec.mesh), spec.placements, spec.tensor_meta.shape
        layout = known.get(key)
        if layout is None:
            layout = known[key] = _layout(spec, name, label, here)
        box, local = layout.boxes[here], tensor._local_tensor.shape
        # A part without elements may have any shape without elements.
        if local != box.sizes and (prod(local) or box.numel):
            raise NotReadable(
                f"{name!r} has a part of shape {list(local)} on rank {here}, but its placements "
                f"{', '.join(map(str, spec.placements))} say {list(box.sizes)}",
                where=label,
                hint="call full_tensor() on it and pass the result",
            )
        found.append(layout)
    return found


def _layout(spec: Any, name: str, label: str, here: int) -> Layout:
    sizes, ranks = mesh_of(spec.mesh)
    try:
        layout = boxes_of(tuple(spec.tensor_meta.shape), sizes, ranks, tuple(map(_kind, spec.placements)))
    except ValueError as error:
        raise NotReadable(f"{name!r} is sharded by {error}, which is not supported", where=label) from None
    if here not in layout.boxes:
        raise NotReadable(
            f"{name!r} is kept by the ranks {_listed(ranks)}, and this is rank {here}"
            if here >= 0
            else f"{name!r} is a DTensor, and no process group is initialised",
            where=label,
            hint="call this on the ranks of its mesh",
        )
    return layout


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ranks)[:8])) + (" …" if len(ranks) > 8 else "")


_Kind = tuple[str, int, int]


def _kind(placement: Any) -> _Kind:
    """Kind, tensor dimension and split factor of a placement."""
    cls = type(placement).__name__
    if cls == "_StridedShard":
        return cls, placement.dim, placement.split_factor
    if cls == "Shard":
        return cls, placement.dim, 1
    return (cls if cls in ("Replicate", "Partial") else str(placement)), -1, 1


@lru_cache(maxsize=4096)
def boxes_of(
    shape: tuple[int, ...], sizes: tuple[int, ...], ranks: tuple[int, ...], placements: tuple[_Kind, ...]
) -> Layout:
    """Which part of a tensor each rank keeps.

    Mesh dimensions split a tensor dimension from left to right. A `_StridedShard` is applied later: after the mesh
    dimensions to its right whose sizes give its split factor. So FSDP splits what tensor parallelism has split.

    Args:
        shape: Shape of the whole tensor.
        sizes: Sizes of the mesh dimensions.
        ranks: Ranks of the mesh, in C order.
        placements: Kind, tensor dimension and split factor for each mesh dimension.

    Raises:
        ValueError: A placement is not supported; the message names it.

    >>> strided = boxes_of((8,), (2, 2), (0, 1, 2, 3), (("_StridedShard", 0, 2), ("Shard", 0, 1)))
    >>> [strided.boxes[rank].offsets for rank in range(4)]
    [(0,), (4,), (2,), (6,)]
    """
    order: dict[int, list[int]] = {}  # dimension of the tensor → dimensions of the mesh, in the order of splitting
    for place in reversed(range(len(sizes))):
        kind, dim, factor = placements[place]
        if kind in ("Replicate", "Partial"):
            continue
        if kind not in ("Shard", "_StridedShard") or not 0 <= dim < len(shape):
            raise ValueError(kind if dim < 0 else f"{kind}(dim={dim})")
        splits = order.setdefault(dim, [])
        at = 0
        if kind == "_StridedShard":
            product = 1
            while product < factor and at < len(splits):
                product *= sizes[splits[at]]
                at += 1
            if product != factor:
                raise ValueError(f"{kind}(dim={dim}, split_factor={factor})")
        splits.insert(at, place)
    boxes = {}
    for number, rank in enumerate(ranks):
        coordinate = _coordinate(number, sizes)
        offsets, lengths = [0] * len(shape), list(shape)
        for dim, splits in order.items():
            for place in splits:
                step = -(-lengths[dim] // sizes[place])  # as torch.chunk
                begin = min(step * coordinate[place], lengths[dim])
                offsets[dim] += begin
                lengths[dim] = min(step, lengths[dim] - begin)
        boxes[rank] = Box(tuple(offsets), tuple(lengths))
    return Layout(shape, tuple(sorted(ranks)), boxes)


def _coordinate(number: int, sizes: Sequence[int]) -> list[int]:
    found = []
    for size in reversed(sizes):
        number, here = divmod(number, size)
        found.append(here)
    return found[::-1]


# --- rows -----------------------------------------------------------------------------------------


def sharded_row(source: Source, info: ParameterInfo) -> Expression:
    """The row of a sharded tensor.

    Raises:
        NotReadable: FSDP2 has replaced the parameter by a temporary copy, or the placement is not supported.
    """
    from torchparams.sources.mapping import MappingSource

    tensor, label, name = source.value(info.name), source.label, info.name
    sharding = info.sharding
    assert sharding is not None and info.shape is not None
    if sharding.kind == "unsharded":
        raise NotReadable(unsharded(name), where=label, hint=RESHARD)
    reduce = None
    if sharding.part is not None:
        layout, part = sharding.part.layout(name, label), tensor.detach()
    else:
        layout, part = layout_of(tensor, name, label), local_of(tensor)
        if any(type(placement).__name__ == "Partial" for placement in tensor.placements):
            reduce = tensor.detach().full_tensor
    if not layout.is_complete:
        raise NotReadable(f"the parts of {name} on the ranks do not make up the whole tensor", where=label)
    local = MappingSource({name: part}, label).row(name)
    return Sharded(name, info.shape, local, layout, label, lambda: part, reduce)


def local_of(tensor: Any) -> Any:
    """The part of a DTensor on this rank; waits for a pending collective."""
    local = tensor._local_tensor.detach()
    return local.wait() if type(local).__name__ == "AsyncCollectiveTensor" else local
