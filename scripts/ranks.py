"""Runs a function on several processes with a gloo group among them, for examples that need one."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

SECONDS = 300


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns on the first of several ranks; all of them call it.

    Args:
        ranks: How many.
        function: A function of a module; its result and arguments pickle.
        arguments: Its arguments.

    Raises:
        RuntimeError: It failed on a rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torchparams.lint.audit"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(rank, ranks, port, theirs, list(sys.path), function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    said = [end.recv() if end.poll(SECONDS) else ("it did not end", None) for end in ends]
    for process in processes:
        process.join(10)
        process.kill()
    failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(said) if error]
    if failed:
        raise RuntimeError("\n".join(failed))
    return said[0][1]


def _work(
    rank: int,
    ranks: int,
    port: int,
    end: Connection,
    path: list[str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    sys.path[:] = path
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    import traceback
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    error, result = "", None
    try:
        result = function(*arguments)
        torch.distributed.barrier()
    except BaseException:
        error = traceback.format_exc()
    end.send((error, result))
    torch.distributed.destroy_process_group()
