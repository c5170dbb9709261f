"""Positions of shards in their tensors, as DTensor and ShardedTensor record them; nothing is executed.

The arithmetic is that of `torch.distributed.tensor.placement_types`. `Shard` splits like `torch.chunk`, and
`_StridedShard` splits what a later mesh dimension splits again.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.errors import shorten
from torchparams.expressions.tiling import Box
from torchparams.sources.torchfile.nodes import Global, Reduced, TensorRef, describe, fields_of, is_size, sizes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Runs = list[tuple[int, int]]
"""Indexes along a dimension, as consecutive ranges (start, stop)."""

_RANKS = 1 << 20  # more than any cluster has
_RUNS = 1 << 16  # of one shard


class Unplaced(Exception):
    """The tensor cannot be placed; the message follows its name."""


class Piece(NamedTuple):
    """The part of a tensor that one rank holds.

    Attributes:
        box: Its position in the whole tensor.
        local: The tensor that holds it.
        inside: Its position in the local tensor.
    """

    box: Box
    local: TensorRef
    inside: Box


class Placed(NamedTuple):
    """A sharded tensor, as described by one rank.

    Attributes:
        shape: Shape of the whole tensor.
        pieces: Parts that this rank holds.
        world: Number of ranks, if it is recorded; otherwise None.
    """

    shape: tuple[int, ...]
    pieces: list[Piece]
    world: int | None


def placed(node: TensorRef, rank: int) -> Placed | None:
    """Positions of the parts of a tensor; None if it is not sharded.

    Raises:
        Unplaced: Its kind of sharding is not supported.
    """
    if node.layout not in ("DTensor", "ShardedTensor"):
        return None
    state = node.state
    if node.layout == "ShardedTensor":
        return _sharded(state)
    fields = state[1] if type(state) is tuple and len(state) == 2 else state
    if type(fields) is not dict:
        raise Unplaced(f"is a DTensor with {describe(state)} for its state")
    return _dtensor(fields, rank)


# --- ShardedTensor ---------------------------------------------------------------------------


def _sharded(state: Any) -> Placed:
    if type(state) is not tuple or len(state) < 3 or type(state[0]) is not list:
        raise Unplaced(f"is a ShardedTensor with {describe(state)} for its state")
    about = fields_of(state[1], "ShardedTensorMetadata")
    shape = None if about is None else sizes_of(about.get("size"))
    if shape is None:
        raise Unplaced("is a ShardedTensor that does not say its shape")
    pieces = []
    for shard in state[0]:
        fields = _slots(shard, "Shard")
        place = _slots(fields.get("metadata"), "ShardMetadata")
        offsets, sizes = sizes_of(place.get("shard_offsets")), sizes_of(place.get("shard_sizes"))
        local = fields.get("tensor")
        if offsets is None or sizes is None or type(local) is not TensorRef:
            raise Unplaced(f"has a shard {describe(local)} at {describe(place.get('shard_offsets'))}")
        if local.shape != sizes:
            raise Unplaced(f"has a shard of shape {list(local.shape or ())} in place of {list(sizes)}")
        pieces.append(Piece(Box(offsets, sizes), local, Box((0,) * len(sizes), sizes)))
    group = state[2].state if type(state[2]) is Reduced else None
    world = group.get("global_world_size") if type(group) is dict else None
    return Placed(shape, pieces, world if is_size(world) else None)


def _slots(node: Any, kind: str) -> Mapping[Any, Any]:
    """Attributes of an object, which may have slots."""
    if type(node) is Reduced and type(node.func) is Global and node.func.name == kind:
        state = node.state[1] if type(node.state) is tuple and len(node.state) == 2 else node.state
        if type(state) is dict:
            return state
    raise Unplaced(f"holds {describe(node)} in place of a {kind}")


# --- DTensor ---------------------------------------------------------------------------------


def _dtensor(fields: Mapping[Any, Any], rank: int) -> Placed:
    local = fields.get("_local_tensor")
    spec = fields_of(fields.get("_spec"), "DTensorSpec")
    if type(local) is not TensorRef or local.shape is None or spec is None:
        raise Unplaced(f"is a DTensor of {describe(local)} and {describe(fields.get('_spec'))}")
    about = spec.get("tensor_meta")
    meta = about.args if type(about) is Reduced and type(about.args) is tuple and about.args else (None,)
    shape = sizes_of(meta[0])
    if shape is None:
        raise Unplaced("is a DTensor that does not say its shape")
    mesh, coordinates, world = _mesh(spec.get("mesh"), rank)
    placements = spec.get("placements")
    if type(placements) not in (tuple, list) or len(placements or ()) != len(mesh):
        raise Unplaced(f"has {describe(placements)} for the placements on a mesh of {len(mesh)} dimensions")
    runs: list[Runs] = [[(0, size)] for size in shape]
    for count, at, placement in zip(mesh, coordinates, placements or (), strict=True):
        _place(runs, placement, count, at)
    sizes = tuple(sum(stop - start for start, stop in each) for each in runs)
    if local.shape != sizes:
        raise Unplaced(f"has a local part of shape {list(local.shape)}, where its placements give {list(sizes)}")
    return Placed(shape, list(_pieces(runs, local)), world)


def _place(runs: list[Runs], placement: Any, count: int, at: int) -> None:
    """Narrow the indexes of a shard by the placement on one dimension of the mesh."""
    kind = placement.func.name if type(placement) is Reduced and type(placement.func) is Global else ""
    fields = placement.state if type(placement) is Reduced and type(placement.state) is dict else {}
    if kind == "Replicate":
        return
    dim: Any = fields.get("dim")
    factor: Any = fields.get("split_factor", 1)
    if kind not in ("Shard", "_StridedShard") or not is_size(dim) or dim >= len(runs):
        raise Unplaced(f"has the placement {describe(placement)}, which is not supported")
    if kind == "Shard":
        runs[dim] = _chunk(runs[dim], count, at)
        return
    if not is_size(factor) or not 0 < factor <= _RUNS:
        raise Unplaced(f"is split into {describe(factor)} strides")
    runs[dim] = _joined(run for piece in range(factor) for run in _chunk(_chunk(runs[dim], factor, piece), count, at))


def _chunk(runs: Runs, count: int, at: int) -> Runs:
    """Chunk `at` of the `count` chunks that `torch.chunk` makes of the indexes."""
    total = sum(stop - start for start, stop in runs)
    size = -(-total // count)
    first, last = min(size * at, total), min(size * (at + 1), total)
    found = []
    before = 0
    for start, stop in runs:
        low, high = max(first - before, 0), min(last - before, stop - start)
        if low < high:
            found.append((start + low, start + high))
        before += stop - start
    return found


def _joined(runs: Any) -> Runs:
    """Ranges, with adjacent ones joined."""
    found: Runs = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
            if len(found) > _RUNS:
                raise Unplaced("has more pieces than are supported")
    return found


def _pieces(runs: Sequence[Runs], local: TensorRef) -> Any:
    """Boxes made of the ranges along each dimension, with their positions in the local tensor."""
    if prod(len(each) for each in runs) > _RUNS:
        raise Unplaced("has more pieces than are supported")
    sides = []
    for each in runs:
        at, side = 0, []
        for start, stop in each:
            side.append((start, at, stop - start))
            at += stop - start
        sides.append(side)
    for corner in product(*sides):
        sizes = tuple(size for _, _, size in corner)
        offsets, inside = tuple(start for start, _, _ in corner), tuple(at for _, at, _ in corner)
        yield Piece(Box(offsets, sizes), local, Box(inside, sizes))


def _mesh(node: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """Shape of a DeviceMesh, coordinates of a rank in it, and the number of its ranks."""
    fields = node.state if type(node) is Reduced and type(node.state) is dict else {}
    layout = fields.get("_layout")
    if layout is None:
        mesh, flat = fields.get("mesh"), sizes_of_many(fields.get("_flatten_mesh_list"))
        shape = mesh.shape if type(mesh) is TensorRef else None
        if shape is None or flat is None or prod(shape) != len(flat):
            raise Unplaced(f"is on {describe(node)}, a mesh of an unknown form")
        axes: list[tuple[tuple[int, ...], tuple[int, ...]]]
        axes = [((size,), (prod(shape[dim + 1 :]),)) for dim, size in enumerate(shape)]
    else:
        flat = sizes_of_many(fields.get("_flatten_rank_map"))
        axes = _axes(layout)
        if flat is None:
            raise Unplaced(f"is on {describe(node)}, a mesh of an unknown form")
    if rank not in flat:
        raise Unplaced(f"is on a mesh of the ranks {shorten(str(list(flat[:8])), 40)}, without rank {rank}")
    at = flat.index(rank)
    sizes, coordinates = [], []
    for shape, strides in axes:
        coordinate = 0
        for size, stride in zip(shape, strides, strict=True):
            coordinate = coordinate * size + (at // stride if stride else 0) % size
        sizes.append(prod(shape))
        coordinates.append(coordinate)
    return tuple(sizes), tuple(coordinates), max(flat) + 1


def _axes(layout: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sizes and strides of each dimension of a mesh, which may combine several dimensions of the root mesh."""
    fields = layout.state if type(layout) is Reduced and type(layout.state) is dict else {}
    axes = fields.get("axes")
    if type(axes) is tuple:
        pairs = [each.state if type(each) is Reduced and type(each.state) is dict else {} for each in axes]
        found = [(pair.get("shape"), pair.get("stride")) for pair in pairs]
    else:  # one pair for all of them
        shapes, strides = fields.get("shape"), fields.get("stride")
        if type(shapes) is not tuple or type(strides) is not tuple or len(shapes) != len(strides):
            raise Unplaced(f"is on a mesh with {describe(layout)}, an unknown form")
        found = list(zip(shapes, strides, strict=True))
    made = []
    for shape, stride in ((_ints(a), _ints(b)) for a, b in found):
        if shape is None or stride is None or len(shape) != len(stride) or 0 in shape:
            raise Unplaced(f"is on a mesh with {describe(layout)}, an unknown form")
        made.append((shape, stride))
    return made


def _ints(value: Any) -> tuple[int, ...] | None:
    return (value,) if is_size(value) else sizes_of(value)


def sizes_of_many(value: Any) -> tuple[int, ...] | None:
    """Ranks of a mesh; there may be more than a tensor has dimensions."""
    if type(value) not in (tuple, list) or not 0 < len(value) <= _RANKS or not all(map(is_size, value)):
        return None
    return tuple(value)
