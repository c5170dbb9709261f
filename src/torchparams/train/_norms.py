"""Norms of gradients, computed without overflow; for sharded gradients, over all ranks."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from torchparams.engines.ranks import Ranks, fingerprint
from torchparams.errors import NotReadable
from torchparams.sources.live.flat import RESHARD, unsharded
from torchparams.sources.live.sharded import layouts_of, local_of
from torchparams.sources.live.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from torchparams.expressions.sharded import Layout
    from torchparams.info import Sharding

    _Alike: TypeAlias = dict[tuple[torch.device, torch.dtype], Sequence[int]]


def norms_of(names: Sequence[str], grads: list[Any], p: float, where: str) -> list[float]:
    """The norm of each gradient."""
    import torch

    if not grads:
        return []
    kinds = set(map(attrgetter("dtype"), grads)), set(map(attrgetter("device"), grads)), set(map(type, grads))
    plain = all(len(kind) == 1 for kind in kinds) and type(grads[0]) is torch.Tensor
    with torch.no_grad():
        if plain and p != math.inf and set(map(attrgetter("layout"), grads)) == {torch.strided}:
            groups: _Alike = {(grads[0].device, grads[0].dtype): range(len(grads))}
        else:
            grads = [_dense(name, grad, p, where) for name, grad in zip(names, grads, strict=True)]
            groups = _alike(grads)
        stacks = []
        for (device, dtype), places in groups.items():
            if device.type == "meta":
                raise NotReadable(
                    f"the gradient of {names[places[0]]!r} is on the meta device, which holds no values", where=where
                )
            # Squares of half-precision values overflow and underflow in their own dtype.
            wide = torch.float32 if dtype.itemsize < 4 else None
            stacks.append(torch.stack(torch._foreach_norm([grads[place] for place in places], p, dtype=wide)))
        if len(stacks) == 1:
            return list(stacks[0].tolist())
        widest = torch.float64 if any(stack.dtype == torch.float64 for stack in stacks) else torch.float32
        values: list[float] = torch.cat([stack.to(stacks[0].device, widest) for stack in stacks]).tolist()
    ordered = [0.0] * len(grads)
    for place, value in zip((place for places in groups.values() for place in places), values, strict=True):
        ordered[place] = value
    return ordered


def settle(norms: list[float], grads: Sequence[Any], p: float) -> list[int]:
    """Recompute norms whose powers overflowed or underflowed. Returns the indices of gradients that are not finite."""
    import torch

    # Ordinary norms need no further check: a tensor that breaks this bound would not fit into memory.
    low = (1e15 * torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps) ** (1 / p)
    doubtful = [
        place for place, norm in enumerate(norms) if not low < norm < math.inf and not _settled(norm, grads[place], p)
    ]
    nonfinite = []
    with torch.no_grad():
        for place, peak in zip(doubtful, _peaks([grads[place] for place in doubtful]), strict=True):
            if not math.isfinite(peak):
                nonfinite.append(place)
            elif peak == 0:
                norms[place] = 0.0
            elif p != math.inf or not math.isfinite(norms[place]):
                norms[place] = _scaled_norm(grads[place], p, peak)
    return nonfinite


def _settled(norm: float, grad: Any, p: float) -> bool:
    """True if the sum of powers did not overflow, and its underflow is below the rounding of the dtype."""
    import torch

    if p == math.inf or not math.isfinite(norm):
        return math.isfinite(norm)
    kind = torch.finfo(torch.float64 if grad.dtype in (torch.float64, torch.complex128) else torch.float32)
    # Each power loses at most `tiny`.
    lost = grad.numel() * kind.tiny / kind.eps
    return bool(norm > lost ** (1 / p))


def _peaks(grads: Sequence[Any]) -> list[float]:
    """Largest absolute value in each gradient; for complex gradients, the largest component."""
    import torch

    found = [0.0] * len(grads)
    plain = []
    for grad in grads:
        values = _values(grad)
        plain.append(torch.view_as_real(values) if values.is_complex() else values)
    for places in _alike(plain).values():
        alike = [plain[place] for place in places]
        if all(not hasattr(grad, "full_tensor") for grad in alike):
            norms = list(torch._foreach_norm(alike, math.inf))
        else:
            norms = [_full(torch.linalg.vector_norm(grad, math.inf)) for grad in alike]
        for place, peak in zip(places, torch.stack(norms).tolist(), strict=True):
            found[place] = peak
    return found


def _scaled_norm(grad: Any, p: float, peak: float) -> float:
    import torch

    values = _values(grad)
    if values.device.type != "mps":  # which has no float64
        values = values.to(torch.complex128 if values.is_complex() else torch.float64)
    # A power of two changes no digit. It is applied as two factors, because their product may overflow the dtype.
    _, exponent = math.frexp(peak)
    first = exponent // 2
    second = exponent - first
    norm = _full(torch.linalg.vector_norm(values * 2.0**-first * 2.0**-second, p))
    return float(norm) * 2.0**first * 2.0**second


def _full(norm: Any) -> Any:
    """A DTensor's norm, combined over all its shards."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _alike(grads: Sequence[Any]) -> _Alike:
    groups: dict[tuple[torch.device, torch.dtype], Any] = {}
    for place, grad in enumerate(grads):
        groups.setdefault((grad.device, grad.dtype), []).append(place)
    return groups


def _dense(name: str, grad: Any, p: float, where: str) -> Any:
    """A plain tensor with the norm of `grad`."""
    import torch

    if hasattr(grad, "full_tensor"):
        return _full(torch.linalg.vector_norm(grad, p))
    return _values(grad)


def _values(grad: Any) -> Any:
    """A strided tensor of all elements that are not zero."""
    import torch

    if grad.layout != torch.strided:
        # Only stored values count. An index may be stored several times; its values add up.
        grad = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad.values()
    return grad if grad.numel() else grad.new_zeros(1)  # an empty tensor has no largest element


def combined(norms: Iterable[float], p: float) -> float:
    """p-norm of a whole, from the norms of its parts.

    >>> combined([3.0, 4.0], 2), combined([], 2)
    (5.0, 0.0)
    """
    parts = list(norms)
    largest = 0.0
    for part in parts:
        if math.isnan(part):
            return math.nan
        largest = max(largest, part)
    if p == math.inf or largest in (0.0, math.inf):
        return largest
    if p == 2:
        return math.hypot(*parts)
    # Scaled, so that no power overflows.
    return float(largest * math.fsum((part / largest) ** p for part in parts) ** (1 / p))


# --- sharded gradients ----------------------------------------------------------------------------


def norms_of_shards(
    names: Sequence[str], grads: Sequence[Any], p: float, where: str, flat: Mapping[str, Sharding]
) -> tuple[list[float], list[int]]:
    """Norms of gradients, sharded or not, and indices of gradients that are not finite.

    Each rank computes the norms of its own parts, and replicas count once. All ranks of the sharded gradients meet and
    gather all numbers at once. Gradients whose parts are summands (`Partial`) are summed first, all of one kind
    together.

    Args:
        names, grads: The gradients.
        p: Order of the norm.
        where: The model, for errors.
        flat: Sharding of the gradients that FSDP keeps.

    Raises:
        NotReadable: A gradient belongs to a temporary copy of FSDP, so this rank has no gradient.
        RanksError: A rank did not make the call.
    """
    layouts: dict[int, Layout] = {}
    for place, name in enumerate(names) if flat else ():
        kept = flat.get(name)
        if kept is not None and kept.kind == "unsharded":
            raise NotReadable(unsharded(name), where=where, hint=RESHARD)
        if kept is not None and kept.part is not None:
            layouts[place] = kept.part.layout(name, where)
    dtensors = [place for place, grad in enumerate(grads) if is_dtensor(grad)]
    of_dtensors = layouts_of({names[place]: grads[place] for place in dtensors}, where)
    layouts.update(zip(dtensors, of_dtensors, strict=True))
    placements = {grads[place]._spec.placements for place in dtensors}
    summands = {each for each in placements if any(type(one).__name__ == "Partial" for one in each)}
    partial = [place for place in dtensors if grads[place]._spec.placements in summands] if summands else []
    parts = list(grads)
    for place in dtensors:
        parts[place] = local_of(grads[place])
    team = None
    if layouts:
        team = Ranks(rank for layout in layouts.values() for rank in layout.ranks)
        common = (names[place] for place, layout in layouts.items() if layout.ranks == team.members)
        team.meet(f"grad_norms with p = {p:g} ({fingerprint(common)})")
    _add_up(parts, grads, partial)
    held = [place for place, part in enumerate(parts) if part.numel()]
    some = [parts[place] for place in held]
    values = norms_of([names[place] for place in held], some, p, where)
    bad = {held[i] for i in settle(values, some, p)}
    here = [0.0] * len(grads)
    for place, value in zip(held, values, strict=True):
        here[place] = value
    if team is None:
        return here, sorted(bad)
    sent = [*(here[place] for place in layouts), *(float(place in bad) for place in layouts)]
    heard = dict(zip(team.members, team.gather_numbers(sent), strict=True))
    owners = {id(layout): layout.owners() for layout in layouts.values()}
    for number, (place, layout) in enumerate(layouts.items()):
        ranks = owners[id(layout)]
        here[place] = combined((heard[rank][number] for rank in ranks), p)
        bad.discard(place)
        if any(heard[rank][len(layouts) + number] for rank in ranks):
            bad.add(place)
    return here, sorted(bad)


def _add_up(parts: list[Any], grads: Sequence[Any], places: Sequence[int]) -> None:
    """Replace summands by their sums over all ranks: one collective for gradients of one mesh and dtype."""
    import torch
    import torch.distributed as dist

    groups: dict[Any, list[int]] = {}
    for place in places:
        for dim, placement in enumerate(grads[place].placements):
            if type(placement).__name__ == "Partial":
                key = dim, grads[place].device_mesh, placement.reduce_op, parts[place].dtype
                groups.setdefault(key, []).append(place)
    # The same order on all ranks: by mesh dimension, then by gradient.
    for (dim, mesh, operation, _), those in sorted(groups.items(), key=lambda item: item[0][0]):
        group = mesh.get_group(dim)
        flat = torch.cat([parts[place].reshape(-1) for place in those])
        kind = {"sum": "SUM", "avg": "SUM", "max": "MAX", "min": "MIN", "product": "PRODUCT"}[operation]
        dist.all_reduce(flat, op=getattr(dist.ReduceOp, kind), group=group)
        if operation == "avg":
            flat /= dist.get_world_size(group)
        for place, part in zip(those, torch.split(flat, [parts[place].numel() for place in those]), strict=True):
            parts[place] = part.reshape(parts[place].shape)
