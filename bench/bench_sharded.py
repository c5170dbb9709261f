"""Sharded models: what reading them together costs, against each rank's own work and against torch.

    python bench/bench_sharded.py [RANKS]

Measured in processes of a gloo group on one machine, each with one thread, by turns:

- `stats` of a model in shards, against `stats` of each rank's own parts as plain tensors.
- `grad_norms` of 200 parameters, against `torch.nn.utils.get_total_norm`.
- `load` of a file into shards, along the first and the second dimension: the bytes that all ranks read, and how far the
  memory of each grows beyond its shards.
"""

from __future__ import annotations

import gc
import math
import os
import socket
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.multiprocessing.spawn import start_processes

import torchparams as tp
from common import llama_file, llama_shapes, machine
from torchparams import limits
from torchparams.engines import DistributedEngine, ThreadEngine
from torchparams.sources.live.sharded import local_of
from torchparams.train import _transfer

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 9
MEGABYTES = 250


class Llama(nn.Module):
    """The parameters of a Llama model, under its names."""

    def __init__(self, megabytes: int, itemsize: int = 2) -> None:
        super().__init__()
        for name, shape in llama_shapes(megabytes * 1e6 / itemsize).items():
            *path, last = name.split(".")
            here: nn.Module = self
            for component in path:
                if component not in here._modules:
                    here.add_module(component, nn.Module())
                here = here.get_submodule(component)
            here.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)))


def sharded(dim: int, device: str = "cpu") -> Any:
    """The model, in shards along a dimension."""
    with torch.device(device):
        model = Llama(MEGABYTES)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(min(dim, p.ndim - 1)))


def by_turns(uses: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, on the slowest rank."""
    times: dict[str, list[float]] = {name: [] for name in uses}
    for turn in range(ROUNDS + 2):
        for name, use in uses.items():
            dist.barrier()
            begun = time.perf_counter()
            use()
            took = torch.tensor(time.perf_counter() - begun)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn >= 2:
                times[name].append(took.item())
    return {name: statistics.median(taken) for name, taken in times.items()}


def show(title: str, found: dict[str, float], base: str) -> None:
    """Print on the first rank."""
    if dist.get_rank() == 0:
        print(title)
        for name, seconds in found.items():
            print(f"  {name:<48} {seconds * 1e3:9.2f} ms  {seconds / found[base]:5.2f} ×")


def measure_stats(path: str) -> None:
    """Statistics of all parts, against those of each rank's own."""
    model = sharded(0)
    tp.load(model, path)
    own = {name: local_of(parameter) for name, parameter in model.named_parameters()}
    inner = ThreadEngine(1, mapped=True)
    uses: dict[str, Callable[[], Any]] = {
        "each rank's own parts": lambda: tp.stats(own, engine=inner),
        "the sharded model": lambda: tp.stats(model, engine=DistributedEngine(inner)),
    }
    show(f"stats, {MEGABYTES} MB of bfloat16 in all", by_turns(uses), "each rank's own parts")


def measure_norms() -> None:
    """Norms of gradients, one number for each parameter, against one number in all."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(100)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def total() -> float:
        norm: Any = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return float(norm.full_tensor())

    assert math.isclose(tp.grad_norms(model).total, total(), rel_tol=1e-5)
    uses: dict[str, Callable[[], Any]] = {
        "get_total_norm, one number": total,
        "grad_norms, 200 numbers": lambda: tp.grad_norms(model).norms,
    }
    show("norms of 200 gradients", by_turns(uses), "get_total_norm, one number")


def measure_load(path: str, dim: int) -> None:
    """Bytes that are read, and the peak of memory beyond the shards."""
    read = 0
    transfer: Any = _transfer
    real = transfer.read_into

    def counting(file: Any, memories: Any, at: int, name: str) -> int:
        nonlocal read
        got = int(real(file, memories, at, name))
        read += got
        return got

    model = sharded(dim, "meta")
    gc.collect()
    before = _forget_peak()
    transfer.read_into = counting
    tp.load(model, path)
    transfer.read_into = real
    shard = sum(local_of(parameter).nbytes for parameter in model.parameters())
    grown = _peak() - before - shard
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (read, shard, grown))
    if dist.get_rank() == 0:
        total = sum(each[0] for each in found)
        most = max(each[2] for each in found)
        print(f"load into shards of dimension {dim}: file {os.path.getsize(path) / 1e6:,.1f} MB")
        print(f"  read straight into shards, all ranks {total / 1e6:10,.1f} MB")
        print(f"  a rank's shards                      {found[0][1] / 1e6:10,.1f} MB")
        print(f"  memory beyond them, at most          {most / 1e6:10,.1f} MB")


def _peak() -> int:
    """Greatest resident memory since it was last forgotten."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _forget_peak() -> int:
    """Forget it, and return the resident memory of now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak()


def work(rank: int, ranks: int, port: int, path: str, what: str) -> None:
    """One process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    limits.RANKS_SECONDS = 60.0
    dist.init_process_group("gloo")
    if what == "read":
        measure_stats(path)
        measure_norms()
    else:
        measure_load(path, int(what))
    dist.barrier()
    dist.destroy_process_group()


def main(ranks: int = 2) -> None:
    """Measure and print."""
    path = str(llama_file(megabytes=MEGABYTES))
    print(f"{ranks} ranks on {machine()}, torch {torch.__version__}")
    for what in ("read", "0", "1"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start_processes(work, (ranks, port, path, what), nprocs=ranks)  # type: ignore[no-untyped-call]  # torch's own


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
