"""Optimizer state for sharded parameters: each rank makes its part, from whole tensors or from other shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.engines.ranks import Ranks, fingerprint
from torchparams.engines.redistribute import redistribute, whole_on
from torchparams.errors import MismatchError
from torchparams.expressions.sharded import part_of
from torchparams.render.tree import plural
from torchparams.sources.live.sharded import layout_of, local_of
from torchparams.sources.live.sharding import is_dtensor, mesh_of
from torchparams.sources.view import ViewSource
from torchparams.train._placeholders import copied, row_of
from torchparams.train._shards import box_here, dtensor_like, is_alike, part_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def reshard(value: Any, parameter: Any, current: Any, name: str, where: str) -> Any:
    """A copy of a value of an optimizer state, sharded like its parameter.

    Of a tensor in a file, only this rank's part is read. Of a DTensor with other sharding, ranks exchange elements: all
    of them call it, after `meet_to_reshard`.

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
    if not isinstance(value, torch.Tensor):
        return copied(value)
    like = _like(value, parameter, current)
    if is_dtensor(value):
        return copied(value) if _stays(value, like) else _redistributed(value, like, name, where)
    if is_dtensor(like) and like.shape == value.shape:
        return _part_like(like, value, name, where)
    if is_dtensor(parameter) and value.dim():
        raise MismatchError(
            f"{name!r} has the shape {list(value.shape)}, but its parameter has {list(parameter.shape)}",
            where=where,
            exists="its sharding is unknown before the first step",
            hint="step once before loading, or start without the saved state",
        )
    return copied(value)


def meet_to_reshard(states: Iterable[tuple[str, Any, Any, Any]], where: str) -> None:
    """Wait for the other ranks if DTensors of optimizer states are sharded in another way than their parameters.

    Args:
        states: Name, saved state, parameter and current state of each parameter.
        where: The optimizer, for errors.

    Raises:
        MismatchError: Other ranks keep the saved state than the parameter.
        RanksError: A rank does not make the same call in time.
    """
    moved: dict[str, tuple[int, ...]] = {}
    for name, state, parameter, current in states:
        for path, value, now in _tensors(state, current, name):
            like = _like(value, parameter, now)
            if is_dtensor(value) and not _stays(value, like):
                ranks = tuple(sorted(mesh_of(value.device_mesh)[1]))
                if is_dtensor(like) and tuple(sorted(mesh_of(like.device_mesh)[1])) != ranks:
                    raise MismatchError(
                        f"{path!r} is kept by other ranks than its parameter",
                        where=where,
                        hint="save the state with torchparams.save, and load the file",
                    )
                moved[path] = ranks
    if moved:
        team = Ranks(rank for ranks in moved.values() for rank in ranks)
        common = [path for path, ranks in moved.items() if ranks == team.members]
        team.meet(
            f"load_optimizer_state of {plural(len(common), 'tensor')} between different shards ({fingerprint(common)})"
        )


def _tensors(value: Any, current: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Tensors in a value, each with its path and the current tensor."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value, current
    elif isinstance(value, dict):
        inside = current if isinstance(current, dict) else {}
        for key, each in value.items():
            yield from _tensors(each, inside.get(key), f"{name}.{key}")
    elif isinstance(value, list):
        several = current if isinstance(current, list) and len(current) == len(value) else [None] * len(value)
        for i, (each, now) in enumerate(zip(value, several, strict=True)):
            yield from _tensors(each, now, f"{name}.{i}")


def _like(value: Any, parameter: Any, current: Any) -> Any:
    """The tensor that a value is sharded like: its parameter, or the current value if the shapes differ."""
    return parameter if value.shape == parameter.shape else current


def _stays(value: Any, like: Any) -> bool:
    return is_dtensor(like) and is_alike(value, like)


def _redistributed(value: Any, like: Any, name: str, where: str) -> Any:
    """A DTensor in the layout of another, or whole if that is not a DTensor of its shape."""
    import torch

    if any(placement.is_partial() for placement in value.placements):
        whole = value.full_tensor()
        return _part_like(like, whole, name, where) if is_dtensor(like) and like.shape == whole.shape else whole
    layout = layout_of(value, name, where)
    if not is_dtensor(like) or like.shape != value.shape:
        whole = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        redistribute(local_of(value), whole, layout, whole_on(layout))
        return whole
    target = layout_of(like, name, where)
    part = torch.empty(box_here(target).sizes, dtype=value.dtype, device=like.device)
    redistribute(local_of(value), part, layout, target)
    return dtensor_like(like, part)


def _part_like(like: Any, value: Any, name: str, where: str) -> Any:
    """A DTensor of this rank's part of a whole tensor, which may be in a file."""
    row = row_of(value)
    if row is None:
        return dtensor_like(like, part_in(like, value, name, where).clone().contiguous())
    layout = layout_of(like, name, where)
    part = part_of(row, layout.grid, box_here(layout))
    return dtensor_like(like, ViewSource([(name, part)], label=where).tensor(name).to(like.device))
