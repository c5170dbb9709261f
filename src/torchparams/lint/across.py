"""What the ranks that share a model know together: values of sharded tensors, and where replicas differ."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torchparams.engines.ranks import Ranks, fingerprint
from torchparams.lint.values import Extremes, read_extremes
from torchparams.sources.live.sharded import layout_of, local_of
from torchparams.sources.live.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

    from torchparams.expressions.sharded import Layout
    from torchparams.info import ParameterInfo
    from torchparams.sources.live.network import Member


def ranks_of(modules: Sequence[nn.Module], infos: Sequence[ParameterInfo]) -> tuple[int, ...]:
    """Global ranks that share a model: by sharding its parameters, or by a `DistributedDataParallel`."""
    found: set[int] = set()
    for info in infos:
        if info.sharding is not None:
            found.update(info.sharding.ranks)
    for module in modules:
        if type(module).__name__ == "DistributedDataParallel":
            import torch.distributed as dist

            group = vars(module).get("process_group")
            found.update(() if group is None else dist.get_process_group_ranks(group))
    return tuple(sorted(found))


class Across:
    """Facts that the ranks of a model exchange, once: they meet, and gather.

    Args:
        ranks: The ranks, this one among them.
        entries: Parameters and buffers, the same on all ranks.
        infos: Their infos, by name.
        gradients: Parameters with a gradient, each with its gradient.
        where: Label of the model.

    Attributes:
        extremes: Minimum and maximum of whole parameters and buffers, by the `id` of this rank's tensor.
        gradient_extremes: The same of gradients, by the gradient's `id`.
        unread: Names of tensors that could not be read.
        trainable: Name of each parameter → `requires_grad` on each rank that has it, in their order.
        different: Name of each parameter with replicas that differ → ranks whose replica differs from the first.
    """

    def __init__(
        self,
        ranks: tuple[int, ...],
        entries: Sequence[Member],
        infos: dict[str, ParameterInfo],
        gradients: Sequence[tuple[Member, torch.Tensor]],
        where: str,
    ) -> None:
        self._infos, self._where = infos, where
        self.team = team = Ranks(ranks)
        own = {entry.name: entry.tensor for entry in entries}
        grads = {entry.name: grad for entry, grad in gradients}
        parameters = [name for name in own if infos[name].kind == "parameter"]
        team.meet(f"audit of {len(parameters):,} parameters ({fingerprint(parameters)})")
        layouts = {name: self._layout(name, tensor) for name, tensor in own.items()}
        told = {
            "trainable": {name: bool(own[name].requires_grad) for name in parameters},
            "values": self._local(own),
            "gradients": self._local(grads),
            "sums": {name: checksum(_part(own[name])) for name in parameters},
        }
        heard = dict(zip(team.members, team.gather(told), strict=True))
        unread = (name for key in ("values", "gradients") for each in heard.values() for name in each[key][1])
        self.unread = list(dict.fromkeys(unread))
        self.extremes = self._whole(own, layouts, {rank: each["values"][0] for rank, each in heard.items()})
        grad_layouts = {name: self._layout(name, grad) or layouts.get(name) for name, grad in grads.items()}
        self.gradient_extremes = self._whole(
            grads, grad_layouts, {rank: each["gradients"][0] for rank, each in heard.items()}
        )
        self.trainable = {
            name: [heard[rank]["trainable"][name] for rank in ranks if name in heard[rank]["trainable"]]
            for name in parameters
        }
        self.different = dict(self._differing(parameters, layouts, {r: each["sums"] for r, each in heard.items()}))

    def _layout(self, name: str, tensor: Any) -> Layout | None:
        """Which rank keeps which part; None of a tensor that each rank has for itself."""
        sharding = self._infos[name].sharding
        if sharding is not None and sharding.part is not None:
            found: Layout = sharding.part.layout(name, self._where)
            return found
        return layout_of(tensor, name, self._where) if is_dtensor(tensor) else None

    def _local(self, tensors: dict[str, Any]) -> tuple[dict[str, tuple[float, float]], list[str]]:
        """Extremes of this rank's parts by name, and the names of those that could not be read."""
        parts = {name: _part(tensor) for name, tensor in tensors.items() if not _is_summand(tensor)}
        found, unread = read_extremes(parts.values())
        pairs = {name: found[id(part)] for name, part in parts.items() if id(part) in found}
        return pairs, [name for name, tensor in tensors.items() if name not in parts or id(parts[name]) in unread]

    def _whole(
        self, tensors: dict[str, Any], layouts: dict[str, Layout | None], heard: dict[int, dict[str, Any]]
    ) -> Extremes:
        whole: Extremes = {}
        for name, tensor in tensors.items():
            layout = layouts[name]
            ranks = (self.team.here,) if layout is None else layout.owners()
            pairs = [heard[rank][name] for rank in ranks if name in heard[rank]]
            if len(pairs) < len(ranks) or not pairs:
                continue
            if any(math.isnan(least) for least, _ in pairs):
                whole[id(tensor)] = math.nan, math.nan
            else:
                whole[id(tensor)] = min(least for least, _ in pairs), max(greatest for _, greatest in pairs)
        return whole

    def _differing(
        self, names: Sequence[str], layouts: dict[str, Layout | None], sums: dict[int, dict[str, Any]]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name in names:
            layout = layouts[name]
            groups: dict[Any, list[int]] = {}
            for rank in self.team.members if layout is None else layout.ranks:
                groups.setdefault(None if layout is None else layout.boxes[rank], []).append(rank)
            for ranks in groups.values():
                first = sums[ranks[0]].get(name)
                others = tuple(rank for rank in ranks[1:] if sums[rank].get(name) != first)
                if others:
                    yield name, others
                    break


def _part(tensor: Any) -> Any:
    return local_of(tensor) if is_dtensor(tensor) else tensor


def _is_summand(tensor: Any) -> bool:
    return is_dtensor(tensor) and any(type(placement).__name__ == "Partial" for placement in tensor.placements)


def checksum(tensor: torch.Tensor) -> int | None:
    """A number that is equal for equal bits, and hardly for others; made where the tensor lies. None if it has no bits.

    >>> import torch
    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([1.0, 2.5]))
    False
    """
    import torch

    try:
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.is_meta:
            return None
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        return int(flat.view(whole).sum(dtype=torch.int64).item())
    except Exception:  # a class of tensors may refuse with any error
        return None
