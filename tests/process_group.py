"""Groups of processes with a gloo group among them, started once for a test session and used for many checks.

A check is a function without arguments in a module of `tests/sharded`, decorated with `check`; every process runs it at
the same time. Processes are forked from one that has imported torch, which is most of the time that they take to start.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

SECONDS = 120
"""How long a check may take, by far; the processes are ended then."""

WORLDS = (1, 2, 4)
"""The sizes of the groups."""

_PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.debug",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",
    "torchparams.engines",
    "torchparams.measure.stats",
    "torchparams.train.load",
]


def check(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Mark a function as a check, for groups of these sizes; of all sizes if none is named."""

    def mark(function: Callable[[], None]) -> Callable[[], None]:
        function.worlds = worlds or WORLDS  # type: ignore[attr-defined]
        return function

    return mark


def checks(*modules: str) -> list[tuple[int, str, str]]:
    """Size of the group, module and name of every check in modules; of one group after the other."""
    found = []
    for module in modules:
        for name, function in vars(importlib.import_module(module)).items():
            found += [(world, module, name) for world in getattr(function, "worlds", ())]
    return sorted(found, key=lambda one: one[0])


class ProcessGroup:
    """Processes that run checks together.

    Args:
        world: How many.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world, port, theirs, list(sys.path)), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, module: str, name: str, *arguments: str) -> None:
        """Run a check on all processes.

        Raises:
            AssertionError: It failed on one of them.
        """
        for end in self._ends:
            end.send((module, name, arguments))
        said = [end.recv() if end.poll(SECONDS) else "it did not end" for end in self._ends]
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(said) if text]
        if failed:
            self.end()
            raise AssertionError("\n".join(failed))

    @property
    def is_alive(self) -> bool:
        """Whether all processes run."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def end(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


class Groups:
    """The groups of a test session, each made when it is first used, and again after a check has failed in it."""

    def __init__(self) -> None:
        self._groups: dict[int, ProcessGroup] = {}

    def run(self, world: int, module: str, name: str, *arguments: str) -> None:
        """Run a check in the group of a size; it may take texts, such as a folder."""
        if world not in self._groups or not self._groups[world].is_alive:
            self._groups[world] = ProcessGroup(world)
        self._groups[world].run(module, name, *arguments)

    def end(self) -> None:
        """End all processes."""
        for group in self._groups.values():
            group.end()


def groups() -> Iterator[Groups]:
    """The groups, for a fixture."""
    made = Groups()
    yield made
    made.end()


def _work(rank: int, world: int, port: int, end: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    import logging
    import warnings
    from datetime import timedelta

    import torch

    from torchparams import limits

    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    limits.RANKS_SECONDS = 10.0
    while True:
        try:
            module, name, arguments = end.recv()
        except EOFError:
            return
        said = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(importlib.import_module(module), name)(*arguments)
                # A check that a rank has left early would disturb the next one.
                _barrier(rank, world, f"{module}.{name}")
        except BaseException:
            said = traceback.format_exc()
        end.send(said)


def _barrier(rank: int, world: int, name: str) -> None:
    import torch.distributed as dist

    found: list[Any] = [None] * world
    dist.all_gather_object(found, name)
    assert found == [name] * world
