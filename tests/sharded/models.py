"""Models for the checks, unsharded and sharded in all ways that torch supports."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size()


def plain(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model whose sizes no number of processes divides."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False), nn.BatchNorm1d(3)).to(dtype)


def fsdp2(model: nn.Module) -> nn.Module:
    """Sharded along the first dimension; more processes than rows leave some without any."""
    return _module(fully_shard(model, mesh=init_device_mesh("cpu", (world(),))))


def columns(model: nn.Module) -> nn.Module:
    """Sharded along the second dimension, where there is one."""
    mesh = init_device_mesh("cpu", (world(),))
    return _module(
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 and _even(p) else Shard(0))
    )


def even() -> nn.Sequential:
    """A model whose sizes every number of processes divides, as tensor parallelism needs it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False), nn.LayerNorm(4))


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _even(parameter: torch.Tensor) -> bool:
    return parameter.shape[1] % world() == 0  # torch shards other dimensions than the first evenly


def tensor_parallel(model: Any) -> nn.Module:
    """Linear layers by columns and by rows; norms stay plain, the same on every rank."""
    parallelize_module(model, init_device_mesh("cpu", (world(),)), _plan())
    return _module(model)


def _plan() -> dict[str, Any]:
    whole = Replicate()  # the norm in between takes the whole
    return {"0": ColwiseParallel(output_layouts=whole), "2": RowwiseParallel(input_layouts=whole)}


def two_dimensional(model: nn.Module) -> nn.Module:
    """FSDP of what tensor parallelism has sharded: the mesh of some parameters is a part of the world."""
    mesh = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], _plan())
    return _module(fully_shard(model, mesh=mesh["dp"]))


def hybrid(model: nn.Module) -> nn.Module:
    """Shards with replicas."""
    mesh = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("replicate", "shard"))
    return _module(fully_shard(model, mesh=mesh))


def replicated(model: nn.Module) -> nn.Module:
    """DTensors of which every rank has the whole."""
    return distribute_module(model, init_device_mesh("cpu", (world(),)))


def fsdp1(model: nn.Module) -> nn.Module:
    """A flat parameter, shown as views."""
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def flat(model: nn.Module) -> nn.Module:
    """A flat parameter that is all there is."""
    return FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))


def dtensor_ways() -> dict[str, Callable[[Any], nn.Module]]:
    """The ways that make DTensors, for this number of processes."""
    found: dict[str, Callable[[Any], nn.Module]] = {
        "fsdp2": fsdp2,
        "columns": columns,
        "tensor_parallel": tensor_parallel,
        "replicated": replicated,
    }
    if world() > 2:
        found |= {"two_dimensional": two_dimensional, "hybrid": hybrid}
    return found


def ways() -> dict[str, Callable[[Any], nn.Module]]:
    """All ways to shard."""
    return {**dtensor_ways(), **({"fsdp1": fsdp1, "flat": flat} if world() > 1 else {})}


@contextmanager
def shared_folder() -> Iterator[str]:
    """A folder that all processes use; the first removes it."""
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Any] = [folder]
        dist.broadcast_object_list(paths)
        try:
            yield paths[0]
        finally:
            dist.barrier()


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name → the whole parameter, by torch itself."""
    from torchparams import of

    found = {}
    for name, parameter in of(model).items():
        value = parameter.detach()
        found[name] = value.full_tensor() if isinstance(value, DTensor) else value
    return found


__all__ = ["DTensor", "Partial", "Replicate", "Shard", "distribute_tensor"]
