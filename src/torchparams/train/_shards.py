"""Sharded parameters of a live model: which changes are refused, and how a whole tensor is split into parts."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from torchparams.engines.ranks import Ranks, described, fingerprint
from torchparams.errors import NotReadable, RanksError, UnsupportedSource
from torchparams.io.live import memory_of
from torchparams.sources.live.flat import RESHARD, flat_part, is_view, unsharded
from torchparams.sources.live.sharded import layout_of, local_of
from torchparams.sources.live.sharding import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchparams.expressions.sharded import Box, Layout
    from torchparams.info import Sharding
    from torchparams.reading import Reading
    from torchparams.sources.live.module import ModuleSource


def shardings(reading: Reading, names: Iterable[str]) -> dict[str, Sharding]:
    """The shardings of the sharded tensors among `names`, by name."""
    column = reading.column("sharding")
    if column.count(None) == len(column):  # nearly always
        return {}
    wanted = frozenset(names)
    rows = zip(reading.names, column, strict=True)
    return {name: sharding for name, sharding in rows if sharding is not None and name in wanted}


def refuse_copies(reading: Reading, names: Iterable[str], where: str) -> None:
    """Raise for copies that FSDP gathered for a forward pass, because changes to them would be lost.

    Raises:
        NotReadable: One of `names` is such a copy.
    """
    for name, sharding in shardings(reading, names).items():
        if sharding.kind == "unsharded":
            raise NotReadable(unsharded(name), where=where, hint=RESHARD)


def refuse_flat(reading: Reading, names: Iterable[str], where: str) -> None:
    """Raise for parameters in FSDP1's flat parameter, of which this rank has only a run of elements.

    Raises:
        NotReadable: One of `names` is such a parameter.
    """
    for name, sharding in shardings(reading, names).items():
        if sharding.kind == "FSDP1":
            raise NotReadable(flat_part(name), where=where, hint=RESHARD)


def refuse_flat_state(source: ModuleSource) -> None:
    """Refuse a model of FSDP1, whose optimizer has state of parts; and copies that FSDP gathered for a forward pass.

    Raises:
        NotReadable: It is one.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    reading = source.reading()
    refuse_copies(reading, reading.names, source.label)
    flat = next((name for name, each in shardings(reading, reading.names).items() if each.kind == "FSDP1"), None)
    if flat is not None:
        raise NotReadable(
            flat_part(flat),
            where=source.label,
            hint="FullyShardedDataParallel.optim_state_dict(model, optimizer) gathers the state of its optimizer",
        )


def refuse_views(tensors: Mapping[str, Any], where: str, verb: str) -> None:
    """Raise for parameters that exist only in FSDP1's flat parameter: they have no flags and no gradient of their own.

    Raises:
        UnsupportedSource: One of them is such a parameter.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for name, tensor in tensors.items():
        if is_view(tensor):
            raise UnsupportedSource(
                f"{verb} cannot treat {name} separately from the other parameters in its flat parameter",
                where=where,
                hint="pass use_orig_params=True to FullyShardedDataParallel, or use fully_shard",
            )


def part_in(tensor: Any, whole: Any, name: str, where: str) -> Any:
    """View of a whole tensor that is this rank's part of a DTensor.

    Args:
        tensor: The DTensor.
        whole: Plain tensor of the same shape.
        name, where: Name and model, for errors.
    """
    box = box_here(layout_of(tensor, name, where))
    return whole[tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))]


def put_whole(tensor: Any, whole: Any, name: str, where: str) -> None:
    """Copy this rank's part of a whole tensor into a DTensor, or all of it into a plain tensor."""
    if is_dtensor(tensor):
        local_of(tensor).copy_(part_in(tensor, whole, name, where))
    else:
        tensor.copy_(whole)


def is_alike(a: Any, b: Any) -> bool:
    """Whether two DTensors have equal sharding."""
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def box_here(layout: Layout) -> Box:
    """The part of this rank."""
    import torch.distributed as dist

    return layout.boxes[dist.get_rank()]


def dtensor_like(tensor: Any, part: Any) -> Any:
    """A DTensor sharded like another, of this rank's part; does not communicate."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def summed_over_ranks(parts: Any, tensors: Mapping[str, Any], where: str) -> Any:
    """Sum numbers over all ranks, one number per part; replicas count once.

    All ranks of the tensors must call it: they meet, and gather once. The derivative by each number is 1.

    Args:
        parts: One-dimensional tensor with one number for each DTensor.
        tensors: DTensors by name.
        where: Label of the model.
    """
    layouts = [layout_of(tensor, name, where) for name, tensor in tensors.items()]
    team = Ranks(rank for layout in layouts for rank in layout.ranks)
    common = (name for name, layout in zip(tensors, layouts, strict=True) if layout.ranks == team.members)
    team.meet(f"penalty ({fingerprint(common)})")
    heard = dict(zip(team.members, team.gather(parts.detach().double().cpu().tolist()), strict=True))
    total = math.fsum(heard[rank][place] for place, layout in enumerate(layouts) for rank in layout.owners())
    # The value of the sum over all ranks, and the derivative of this rank's part.
    own = parts.sum()
    return own - own.detach() + own.detach().new_tensor(total)


class Together:
    """A change of DTensors that all ranks make together: each gathers whole tensors, and keeps its parts of the
    results.

    Args:
        reading: A reading of the model.
        tensors: Tensors to change by name, sharded or not.
        where: Label of the model.
    """

    def __init__(self, reading: Reading, tensors: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._shardings = shardings(reading, (name for name, tensor in tensors.items() if is_dtensor(tensor)))
        self._team: Ranks | None = None
        self._made: dict[str, str] = {}

    def meet(self, what: str) -> None:
        """Wait for the other ranks, if any tensor is sharded.

        Raises:
            RanksError: A rank did not make the call.
        """
        if self._shardings:
            self._team = team = Ranks(rank for each in self._shardings.values() for rank in each.ranks)
            common = (name for name, each in self._shardings.items() if tuple(sorted(each.ranks)) == team.members)
            team.meet(f"{what} ({fingerprint(common)})")

    def gather(self, tensor: Any) -> Any:
        """The whole of a DTensor as a plain parameter or tensor."""
        import torch

        whole = tensor.detach().full_tensor().clone()
        if isinstance(tensor, torch.nn.Parameter):
            whole = torch.nn.Parameter(whole, tensor.requires_grad)
        return whole

    def put(self, name: str, tensor: Any, whole: Any) -> None:
        """Write this rank's part of a changed whole tensor.

        Raises:
            NotReadable: The ranks keep summands of the tensor.
        """
        import torch
        from blake3 import blake3

        if any(type(placement).__name__ == "Partial" for placement in tensor.placements):
            raise NotReadable(
                f"the ranks keep summands of {name}, whose sum is its value",
                where=self._where,
                hint="redistribute it first",
            )
        flat = whole.detach().cpu().contiguous().reshape(-1)
        self._made[name] = blake3(memory_of(flat.view(torch.uint8)).data).hexdigest()
        put_whole(tensor, whole.detach(), name, self._where)

    def agree(self, failed: Exception | None) -> None:
        """Raise on all ranks if one failed, or if the ranks computed different whole tensors.

        Args:
            failed: The error of this rank.

        Raises:
            RanksError: Another rank failed, or has other values.
        """
        if self._team is None:
            if failed is not None:
                raise failed
            return
        heard = self._team.gather((described(failed), self._made))
        if failed is not None:
            raise failed
        self._team.refuse([error for error, _ in heard])
        for rank, (_, made) in zip(self._team.members, heard, strict=True):
            other = next((name for name, digest in self._made.items() if made.get(name, digest) != digest), None)
            if other is not None:
                raise RanksError(
                    f"the function gives {other} different values on ranks {rank} and {self._team.here}",
                    where=self._where,
                    exists="nothing was changed",
                    hint="use the same random seed on all ranks, or call torchparams.init",
                )
