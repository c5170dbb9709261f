"""Ranks of a process group that make a call together: they meet, and exchange objects and tensors.

If only some ranks enter a collective, it waits for torch's timeout, half an hour by default, and the error does not
tell the reason. So ranks first meet in the store of the default process group: each writes what it is about to do, and
waits until the others wrote the same.
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

    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]

_KEPT = 64  # number of texts of earlier calls to keep in the store

_LEFT = "\0left"
"""Written by a rank that gave up waiting."""


class Ranks:
    """The ranks that make a call together, including this one.

    Args:
        members: Global ranks.

    Attributes:
        members: Global ranks, ascending.
        here: This rank.
    """

    _met: ClassVar[WeakKeyDictionary[Any, dict[tuple[int, ...], int]]] = WeakKeyDictionary()
    _stored: ClassVar[WeakKeyDictionary[Any, dict[tuple[int, ...], int]]] = WeakKeyDictionary()

    def __init__(self, members: Iterable[int]) -> None:
        import torch.distributed as dist

        self.members = tuple(sorted(set(members)))
        self.here = dist.get_rank()

    @property
    def is_first(self) -> bool:
        """Whether this is the lowest rank, which reports progress and writes files."""
        return self.here == self.members[0]

    @property
    def others(self) -> tuple[int, ...]:
        """All members except this rank."""
        return tuple(rank for rank in self.members if rank != self.here)

    # --- meeting --------------------------------------------------------------------------------

    def meet(self, what: str, seconds: float | None = None) -> None:
        """Wait until all members make this call. Uses the store of the default process group, without collectives.

        Args:
            what: Description of the call, equal on all members.
            seconds: Time to wait; `limits.RANKS_SECONDS` by default.

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
                hint=f"the ranks {_listed(self.members)} must all make it; "
                "torchparams.limits.RANKS_SECONDS sets how long they wait",
            ) from None
        said = dict(zip(keys, (text.decode() for text in store.multi_get(list(keys.values()))), strict=True))
        if number % _KEPT == 0:  # all ranks have read the earlier texts
            for old in range(max(number - _KEPT, 0), number):
                store.delete_key(self._key(old, self.here))
        left = [rank for rank, text in said.items() if text == _LEFT]
        if left:
            raise RanksError(
                f"{_who(left)} gave up waiting for this rank: {what}",
                where=f"rank {self.here}",
                hint=f"the ranks {_listed(self.members)} must make the call together",
            )
        different = {rank: text for rank, text in said.items() if text != what}
        if different:
            rank, text = next(iter(different.items()))
            raise RanksError(
                f"rank {rank} makes another call: {text}",
                where=f"rank {self.here}",
                exists=f"this rank makes: {what}",
                hint="pass the same arguments on every rank",
            )

    def _key(self, number: int, rank: int) -> str:
        return f"torchparams/{_hashed(repr(self.members).encode())}/{number}/{rank}"

    # --- exchange -------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Gather the values of all members, in order, on each of them, with two collectives.

        Members without a process group of their own exchange values through the store.
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
        """Gather numbers of all members, equally many on each, in order, with one collective."""
        import numpy as np

        return [found.tolist() for found in self.gather_array(np.array(numbers, np.float64))]

    def gather_array(self, numbers: Array) -> list[Array]:
        """Gather float64 arrays of all members, of the same shape (n,), in order, with one collective."""
        import torch
        import torch.distributed as dist

        if len(self.members) == 1:
            return [numbers]
        group = _group_of(self.members)
        if group is None:
            return self._through_store(numbers)
        mine = torch.tensor(numbers, dtype=torch.float64, device=exchange_device())
        found = [torch.empty_like(mine) for _ in self.members]
        dist.all_gather(found, mine, group=group)
        by_rank = dict(zip(dist.get_process_group_ranks(group), torch.stack(found).cpu().numpy(), strict=True))
        return [by_rank[rank] for rank in self.members]

    def _through_store(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        store = dist.distributed_c10d._get_default_store()
        counts = self._stored.setdefault(dist.group.WORLD, {})
        number = counts[self.members] = counts.get(self.members, -1) + 1
        prefix = f"{self._key(number, self.here).rpartition('/')[0]}/gather"
        store.set(f"{prefix}/{self.here}", pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes
        found = [pickle.loads(store.get(f"{prefix}/{rank}")) for rank in self.members]
        # The last reader removes the values.
        if store.add(f"{prefix}/read", 1) == len(self.members):
            for rank in (*self.members, "read"):
                store.delete_key(f"{prefix}/{rank}")
        return found

    def agree(self, error: BaseException | None) -> None:
        """Raise on all members if one of them failed, with two collectives.

        Args:
            error: Exception on this rank, or None.

        Raises:
            RanksError: Another member failed.
        """
        found = self.gather(described(error))
        if error is not None:
            raise error
        self.refuse(found)

    def refuse(self, errors: Sequence[str | None]) -> None:
        """Raise the first error of the other members, if any.

        Raises:
            RanksError: A member failed.
        """
        for rank, error in zip(self.members, errors, strict=True):
            if error is not None and rank != self.here:
                raise RanksError(f"rank {rank} failed: {error}", where=f"rank {self.here}")


def described(error: BaseException | None) -> str | None:
    """One-line description of an error for other ranks."""
    return None if error is None else f"{type(error).__name__}: {shorten(str(error), 300)}"


def send(tensor: torch.Tensor, rank: int) -> None:
    """Send a tensor to a rank that calls `receive`."""
    import torch.distributed as dist

    dist.send(tensor.to(exchange_device()), rank)


def receive(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Receive a tensor from a rank into a contiguous CPU tensor."""
    import torch
    import torch.distributed as dist

    device = exchange_device()
    there = tensor if tensor.device == torch.device(device) else tensor.to(device)
    dist.recv(there, rank)
    return tensor if there is tensor else tensor.copy_(there)


def exchange_device() -> str:
    """Device of tensors exchanged in the default process group."""
    import torch.distributed as dist

    found: str = str(dist.distributed_c10d._get_object_coll_device(None))
    return found


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor as bytes, in C order."""
    import torch

    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def _group_of(members: tuple[int, ...]) -> Any:
    """Process group of exactly these ranks, or None."""
    import torch.distributed as dist

    if len(members) == dist.get_world_size():
        return dist.group.WORLD
    known = dist.distributed_c10d._world.pg_group_ranks
    # All members created the groups in the same order.
    return next((group for group, ranks in known.items() if tuple(sorted(ranks)) == members), None)


def _hashed(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def fingerprint(texts: Iterable[str]) -> str:
    """Short text that is equal for equal texts in the same order.

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
