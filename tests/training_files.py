"""Writes training checkpoints with several processes over gloo: `python training_files.py FOLDER`.

One process imports torch and forks the others, so that a run takes seconds. The state dict that all of them hold is
`full.pt`.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

dcp: Any = checkpoint  # which does not declare what it exports
WORLDS = (1, 2, 4)


def full() -> dict[str, torch.Tensor]:
    """A state dict with sizes that no world size divides, and layouts that are not C order."""
    made = torch.Generator().manual_seed(0)
    return {
        "layers.0.weight": torch.randn(13, 7, generator=made),
        "layers.1.weight": torch.randn(16, 8, generator=made).bfloat16(),
        "bias": torch.randn(5, generator=made),
        "scale": torch.tensor(3.5),
        "steps": torch.arange(11),
        "turned": torch.randn(8, 6, generator=made).t(),
        "last": torch.randn(2, 4, 6, 6, generator=made).to(memory_format=torch.channels_last),
        "none": torch.zeros(0, 3),
    }


class Net(torch.nn.Module):
    """A network with a buffer and a parameter that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(3))
        self.head = torch.nn.Linear(7, 5, bias=False)
        self.norm = torch.nn.BatchNorm1d(5)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def write(rank: int, world: int, out: str) -> None:
    """What one process does."""
    mesh = init_device_mesh("cpu", (world,))
    model = {
        name: distribute_tensor(tensor, mesh, [Shard(number % tensor.ndim)]) if tensor.ndim else tensor
        for number, (name, tensor) in enumerate(full().items())
    }
    state: dict[str, Any] = {
        "model": model,
        "optimizer": {"state": {name: {"exp_avg": tensor * 2} for name, tensor in model.items()}, "lr": 0.1},
        "step": 7,
        "note": {"text": "six", "nothing": None},
    }
    dcp.save(state, checkpoint_id=f"{out}/dcp-{world}")
    dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{out}/files-{world}", single_file_per_rank=False))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(f"{out}/threads-{world}", thread_count=2))
    dcp.save(model, storage_writer=dcp.HuggingFaceStorageWriter(f"{out}/shards-{world}", save_distributed=True))
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        weights = full()
        dcp.save(
            {
                "layers.0.weight": distribute_tensor(weights["layers.0.weight"], square, [Shard(0), Shard(1)]),
                "layers.1.weight": distribute_tensor(weights["layers.1.weight"], square, [Replicate(), Shard(0)]),
                "turned": distribute_tensor(weights["turned"], square, [Shard(1), Shard(1)]),
                "last": distribute_tensor(weights["last"], square, [Shard(3), Shard(2)]),
            },
            checkpoint_id=f"{out}/square",
        )
        write_grid(rank, out)
    write_ranks(rank, world, out)


def write_ranks(rank: int, world: int, out: str) -> None:
    """State dicts of FSDP, a file for each rank: of ShardedTensors, and of DTensors."""
    cpu = torch.device("cpu")
    for kind in ("sharded", "dtensor"):
        mesh = init_device_mesh("cpu", (world,)) if kind == "dtensor" else None
        model = FSDP(net(), device_id=cpu, use_orig_params=True, device_mesh=mesh)
        os.makedirs(f"{out}/{kind}-{world}", exist_ok=True)
        with FSDP.state_dict_type(
            model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(_use_dtensor=kind == "dtensor")
        ):
            torch.save(model.state_dict(), f"{out}/{kind}-{world}/model_world_size_{world}_rank_{rank}.pt")


def write_grid(rank: int, out: str) -> None:
    """State dicts of DTensors on a mesh of two dimensions, a file for each rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    weights = full()
    layer = torch.nn.Linear(7, 13, bias=False)
    layer.weight = torch.nn.Parameter(distribute_tensor(weights["layers.0.weight"], mesh["tp"], [Shard(0)]))
    fully_shard(layer, mesh=mesh["dp"])
    strided: Any = layer.weight
    assert type(strided.placements[0]).__name__ == "_StridedShard"
    model = {
        "strided": layer.state_dict()["weight"],
        "layers.0.weight": distribute_tensor(weights["layers.0.weight"], mesh, [Shard(0), Shard(1)]),
        "layers.1.weight": distribute_tensor(weights["layers.1.weight"], mesh, [Replicate(), Shard(0)]),
        "turned": distribute_tensor(weights["turned"], mesh, [Shard(1), Shard(1)]),
        "bias": distribute_tensor(weights["bias"], mesh["tp"], [Shard(0)]),
        "scale": weights["scale"],
    }
    os.makedirs(f"{out}/grid-4", exist_ok=True)
    torch.save({"model": model, "epoch": 3}, f"{out}/grid-4/model_world_size_4_rank_{rank}.pt")
    torch.save({"state": {"bias": model["bias"]}}, f"{out}/grid-4/optim_world_size_4_rank_{rank}.pt")


def process(rank: int, world: int, out: str, job: Callable[[int, int, str], None]) -> None:
    """Run a job as one rank of a group."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{out}/store-{world}", rank=rank, world_size=world)
    try:
        job(rank, world, out)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def main(out: str) -> None:
    """Write all of them."""
    torch.set_num_threads(1)
    os.makedirs(out, exist_ok=True)
    torch.save(full(), f"{out}/full.pt")
    torch.save(net().state_dict(), f"{out}/net.pt")
    for world in WORLDS:
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                try:
                    process(rank, world, out, write)
                except BaseException:  # a rank that fails must not go on as if it were the parent
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(f"a process of {world} failed")
        os.unlink(f"{out}/store-{world}")


if __name__ == "__main__":
    main(sys.argv[1])
