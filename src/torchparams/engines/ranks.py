"""The ranks of a process group that make one call together: they meet, and exchange objects and tensors.

A collective that only some ranks enter waits until torch's own timeout, half an hour by default, and does not
name the reason. So ranks meet first, in the store of the default process group: each writes what it is about to do, and
waits for the others to write the same.
"""

from __future__ import annotations

import hashlib
import pickle
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from torchparams import limits
from torchparams.errors import RanksError, shorten
from torchparams.render.tree import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

_KEPT = 64  # texts of earlier calls that stay in the store

_LEFT = "\0left"
"""What a rank writes that has waited in vain."""


class Ranks:
    """The ranks that make one call, this one among them.

    Args:
        members: Global ranks.

    Attributes:
        members: Global ranks, ascending.
        here: This one.
    """

    _met: ClassVar[WeakKeyDictionary[Any, dict[tuple[int, ...], int]]] = WeakKeyDictionary()

    def __init__(self, members: Iterable[int]) -> None:
        import torch.distributed as dist

        self.members = tuple(sorted(set(members)))
        self.here = dist.get_rank()

    @property
    def is_first(self) -> bool:
        """Whether this is the lowest rank: the one that reports progress, and writes files."""
        return self.here == self.members[0]

    @property
    def others(self) -> tuple[int, ...]:
        """All members but this one."""
        return tuple(rank for rank in self.members if rank != self.here)

    # --- to meet --------------------------------------------------------------------------------

    def meet(self, what: str, seconds: float | None = None) -> None:
        """Wait for all members to make this call. Uses the store of the default process group, and no collective.

        Args:
            what: The call, in words; equal on all members.
            seconds: How long to wait; `limits.RANKS_SECONDS` unless given.

        Raises:
            RanksError: A member did not come in time, or makes another call.
        """
        if len(self.members) == 1:
            return
        import torch.distributed as dist

        seconds = limits.RANKS_SECONDS if seconds is None else seconds
        store = dist.distributed_c10d._get_default_store()
        counts = self._met.setdefault(dist.group.WORLD, {})
        number = counts[self.members] = counts.get(self.members, -1) + 1
        mine = self._key(number, self.here)
        store.set(mine, what)
        keys = {rank: self._key(number, rank) for rank in self.others}
        try:
            store.wait(list(keys.values()), timedelta(seconds=seconds))
        except RuntimeError:
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            store.set(mine, _LEFT)
            raise RanksError(
                f"{_who(missing)} did not make this call within {seconds:g} s: {what}",
                where=f"rank {self.here}",
                hint=f"the ranks {_listed(self.members)} make it together; "
                "torchparams.limits.RANKS_SECONDS is how long they wait",
            ) from None
        said = dict(zip(keys, (text.decode() for text in store.multi_get(list(keys.values()))), strict=True))
        if number % _KEPT == 0:  # all have read those before this one
            for old in range(max(number - _KEPT, 0), number):
                store.delete_key(self._key(old, self.here))
        left = [rank for rank, text in said.items() if text == _LEFT]
        if left:
            raise RanksError(
                f"{_who(left)} waited for this rank, and gave up: {what}",
                where=f"rank {self.here}",
                hint=f"the ranks {_listed(self.members)} make a call together",
            )
        different = {rank: text for rank, text in said.items() if text != what}
        if different:
            rank, text = next(iter(different.items()))
            raise RanksError(
                f"rank {rank} makes another call: {text}",
                where=f"rank {self.here}",
                exists=f"this one is: {what}",
                hint="pass the same arguments on every rank",
            )

    def _key(self, number: int, rank: int) -> str:
        return f"torchparams/{_hashed(repr(self.members).encode())}/{number}/{rank}"

    # --- to exchange ----------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The values of all members, in their order, on each of them. It takes two collectives, whatever the values.

        Members of no process group of their own exchange values through the store.
        """
        if len(self.members) == 1:
            return [value]
        import torch.distributed as dist

        group = _group_of(self.members)
        if group is None:
            return self._through_store(value)
        found: list[Any] = [None] * len(self.members)
        dist.all_gather_object(found, value, group=group)
        by_rank = dict(zip(dist.get_process_group_ranks(group), found, strict=True))
        return [by_rank[rank] for rank in self.members]

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of all members, equally many on each, in their order. It takes one collective."""
        import torch
        import torch.distributed as dist

        group = _group_of(self.members)
        if group is None:
            return self._through_store(list(numbers))
        mine = torch.tensor(numbers, dtype=torch.float64, device=_device())
        found = [torch.empty_like(mine) for _ in self.members]
        dist.all_gather(found, mine, group=group)
        by_rank = dict(zip(dist.get_process_group_ranks(group), torch.stack(found).tolist(), strict=True))
        return [by_rank[rank] for rank in self.members]

    def _through_store(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        store = dist.distributed_c10d._get_default_store()
        number = self._met.setdefault(dist.group.WORLD, {}).get(self.members, 0)
        prefix = f"{self._key(number, self.here).rpartition('/')[0]}/gather"
        store.set(f"{prefix}/{self.here}", pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes
        found = [pickle.loads(store.get(f"{prefix}/{rank}")) for rank in self.members]
        # The last one to have read everything removes it.
        if store.add(f"{prefix}/read", 1) == len(self.members):
            for rank in (*self.members, "read"):
                store.delete_key(f"{prefix}/{rank}")
        return found

    def agree(self, error: BaseException | None) -> None:
        """Raise on all members if one of them failed. It takes two collectives.

        Args:
            error: What was raised here; None if nothing.

        Raises:
            RanksError: Another member failed.
        """
        found = self.gather(described(error))
        if error is not None:
            raise error
        self.refuse(found)

    def refuse(self, errors: Sequence[str | None]) -> None:
        """Raise the first error of the other members, if there is one.

        Raises:
            RanksError: A member failed.
        """
        for rank, error in zip(self.members, errors, strict=True):
            if error is not None and rank != self.here:
                raise RanksError(f"rank {rank} failed: {error}", where=f"rank {self.here}")


def described(error: BaseException | None) -> str | None:
    """An error in one line, to be told to other ranks."""
    return None if error is None else f"{type(error).__name__}: {shorten(str(error), 300)}"


def send(tensor: torch.Tensor, rank: int) -> None:
    """Send a tensor to a rank, which calls `receive`."""
    import torch.distributed as dist

    dist.send(tensor.to(_device()), rank)


def receive(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Fill a contiguous tensor on the CPU with what a rank sends."""
    import torch
    import torch.distributed as dist

    device = _device()
    there = tensor if tensor.device == torch.device(device) else tensor.to(device)
    dist.recv(there, rank)
    return tensor if there is tensor else tensor.copy_(there)


def _device() -> str:
    """Device of the tensors that the default process group exchanges."""
    import torch.distributed as dist

    found: str = str(dist.distributed_c10d._get_object_coll_device(None))
    return found


def _group_of(members: tuple[int, ...]) -> Any:
    """A process group of exactly these ranks, all of which have it; None where there is no such one."""
    import torch.distributed as dist

    if len(members) == dist.get_world_size():
        return dist.group.WORLD
    known = dist.distributed_c10d._world.pg_group_ranks
    # In the order in which they were made, which is one for all members.
    return next((group for group, ranks in known.items() if tuple(sorted(ranks)) == members), None)


def _hashed(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def fingerprint(texts: Iterable[str]) -> str:
    """A short text that is equal for equal texts in the same order.

    >>> fingerprint(["a", "b"]) == fingerprint(["a", "b"]), fingerprint(["a"]) == fingerprint(["b"])
    (True, False)
    """
    hashed = hashlib.blake2b(digest_size=4)
    for text in texts:
        hashed.update(f"{len(text)} {text}".encode(errors="surrogatepass"))
    return hashed.hexdigest()


def _listed(ranks: Sequence[int]) -> str:
    return listed([str(rank) for rank in ranks], 8)


def _who(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"{plural(len(ranks), 'rank')} ({_listed(ranks)})"
