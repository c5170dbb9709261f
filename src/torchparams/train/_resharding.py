"""Values and optimizer state for sharded parameters: compatibility, and the elements that a rank needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.engines.ranks import Ranks, fingerprint
from torchparams.errors import MismatchError
from torchparams.expressions.casts import Losses
from torchparams.expressions.sharded import Sharded, part_of
from torchparams.sources.live.flat import RESHARD
from torchparams.sources.live.sharded import layout_of, local_of
from torchparams.sources.live.sharding import is_dtensor
from torchparams.sources.mapping import MappingSource
from torchparams.sources.view import ViewSource
from torchparams.train._assignment import Assignment
from torchparams.train._shards import sharded_like, whole_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.expressions.base import Expression
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source


def sharded_problem(given: ParameterInfo, source: Source, wanted: ParameterInfo, target: Any) -> str:
    """Reason why values cannot be copied between two tensors if one is sharded; empty if they can.

    Args:
        given, source: Tensor of the source.
        wanted, target: Tensor of the model.
    """
    for sharding in (given.sharding, wanted.sharding):
        if sharding is not None and sharding.kind != "DTensor":
            return f"FSDP keeps it: {RESHARD}"
        if sharding is not None and any(placement.startswith("Partial") for placement in sharding.placements):
            return "ranks keep summands of it"
    if given.sharding is None:
        return ""
    if not is_dtensor(target):
        return "it is sharded, but the model's tensor is not: save it with torchparams.save, and load the file"
    value = source.value(given.name)
    if _is_alike(value, target):
        return ""
    return "it is sharded differently: save it with torchparams.save, and load the file"


def _is_alike(a: Any, b: Any) -> bool:
    """Whether two DTensors have equal sharding."""
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def parts_of(pairs: Sequence[Assignment]) -> list[Assignment]:
    """Replace each DTensor by its part on this rank, and each source by the elements of that part.

    So a rank reads only its own elements from a file.
    """
    targets = {id(pair.target) for pair in pairs}
    found: list[Assignment] = []
    rows: list[tuple[str, Expression]] = []
    places: list[int] = []
    for pair in pairs:
        if is_dtensor(pair.target):
            places.append(len(found))
            rows.append((pair.name, _part_of_row(pair, targets)))
        found.append(pair)
    if not rows:
        return list(pairs)
    view = ViewSource(rows, label=pairs[0].source.label)
    for place in places:
        pair = pairs[place]
        found[place] = Assignment(pair.name, local_of(pair.target), view, view.infos()[pair.name])
    return found


def _part_of_row(pair: Assignment, targets: set[int]) -> Expression:
    import torch.distributed as dist

    row = pair.source.row(pair.info.name, pair.info)
    if isinstance(row, Sharded):
        value = pair.source.value(pair.info.name)
        if value is not pair.target and id(value) in targets:  # another pair writes to it, perhaps earlier
            return MappingSource({pair.name: row.tensor().clone()}, pair.source.label).row(pair.name)
        return row.local
    layout = layout_of(pair.target, pair.name, pair.source.label)
    return part_of(row, layout.grid, layout.boxes[dist.get_rank()])


def losses_together(
    pairs: Sequence[Assignment], lost: Mapping[str, Losses], lossy: Sequence[str], where: str
) -> dict[str, Losses]:
    """Losses of casts: for DTensors summed over all ranks, and equal on every rank; for other tensors on this rank.

    All ranks of the tensors must call this: they meet, and gather once. It does nothing without casts that may lose
    values.

    Args:
        pairs: Pairs with DTensors as targets.
        lost: Losses of casts on this rank.
        lossy: Names of tensors whose cast may lose values.
        where: Label of the load.
    """
    names = frozenset(lossy)
    tensors = {pair.name: pair.target for pair in pairs if pair.name in names and is_dtensor(pair.target)}
    if not tensors:
        return dict(lost)
    layouts = {name: layout_of(tensor, name, where) for name, tensor in tensors.items()}
    team = Ranks(rank for layout in layouts.values() for rank in layout.ranks)
    team.meet(f"load {len(tensors)} sharded tensors with casts ({fingerprint(tensors)})")
    heard = dict(zip(team.members, team.gather(dict(lost)), strict=True))
    found = {name: losses for name, losses in lost.items() if name not in tensors}
    for name, layout in layouts.items():
        total = sum((heard[rank].get(name, Losses()) for rank in layout.owners()), Losses())
        if total:
            found[name] = total
    return found


def reshard(value: Any, parameter: Any, current: Any, name: str, where: str) -> Any:
    """Shard a value of an optimizer state like its parameter.

    A DTensor with different sharding is first gathered, with a collective.

    Args:
        value: The value, or a mapping or list of values.
        parameter: The parameter.
        current: Current value in the optimizer, or None.
        name, where: Name and optimizer, for errors.

    Raises:
        MismatchError: The shapes of value and parameter differ, so its sharding is unknown.
    """
    import torch

    if isinstance(value, dict):
        inside = current if isinstance(current, dict) else {}
        return {key: reshard(each, parameter, inside.get(key), f"{name}.{key}", where) for key, each in value.items()}
    if isinstance(value, list):
        several = current if isinstance(current, list) and len(current) == len(value) else [None] * len(value)
        pairs = zip(value, several, strict=True)
        return [reshard(each, parameter, now, f"{name}.{i}", where) for i, (each, now) in enumerate(pairs)]
    if not isinstance(value, torch.Tensor) or not (is_dtensor(value) or is_dtensor(parameter)):
        return value
    like = parameter if value.shape == parameter.shape else current
    if is_dtensor(value) and is_dtensor(like) and _is_alike(value, like):
        return value
    whole = whole_of(value)
    if is_dtensor(like) and like.shape == whole.shape:
        return sharded_like(like, whole, name, where)
    if is_dtensor(parameter) and whole.dim():
        raise MismatchError(
            f"{name!r} has the shape {list(whole.shape)}, but its parameter has {list(parameter.shape)}",
            where=where,
            exists="its sharding is unknown before the first step",
            hint="step once before loading, or start without the saved state",
        )
    return whole
