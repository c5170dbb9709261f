"""Writes ZeRO checkpoints of DeepSpeed with several processes over gloo: `python zero_files.py FOLDER`.

Each has a tied weight, a frozen parameter, buffers, two groups, and sizes that no world size divides. One process
imports torch and DeepSpeed and forks the others.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.comm.torch
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

WORLDS = (1, 2, 4)
deepspeed.comm.torch.build_shm_op = lambda: None  # an extension for shared memory, which takes minutes to compile


class Net(torch.nn.Module):
    """A small network that has everything a checkpoint treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 7)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(3))
        self.norm = torch.nn.LayerNorm(7)
        self.register_buffer("table", torch.randn(3, 5))
        self.register_buffer("count", torch.arange(4))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.head = torch.nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(self.norm(x))
        return out


def write(rank: int, world: int, out: str, name: str, zero: dict[str, Any], more: dict[str, Any]) -> None:
    """Train two steps and save."""
    torch.manual_seed(0)
    net = Net()
    decayed = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in net.parameters() if p.requires_grad and p.ndim == 1]
    groups: Any = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **more,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    for step in range(2):
        torch.manual_seed(step * 10 + rank)
        loss = engine(torch.randint(0, 11, (3,))).float().square().mean()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(f"{out}/{name}-{world}", tag=f"global_step{step + 1}")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero1": ({"stage": 1}, {}),
    "zero2": ({"stage": 2, "round_robin_gradients": True}, {}),
    "zero3": ({"stage": 3, "stage3_param_persistence_threshold": 0}, {}),
    "bf16": ({"stage": 1}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16-3": ({"stage": 3, "sub_group_size": 40}, {"bf16": {"enabled": True}}),
}


def process(rank: int, world: int, out: str) -> None:
    """What one process does."""
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{out}/store-{world}", rank=rank, world_size=world)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for name, (zero, more) in CASES.items():
        write(rank, world, out, name, zero, more)
    dist.barrier()
    dist.destroy_process_group()


def main(out: str) -> None:
    """Write all of them, and what DeepSpeed itself joins them to."""
    torch.set_num_threads(1)
    os.makedirs(out, exist_ok=True)
    for world in WORLDS:
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                try:
                    process(rank, world, out)
                except BaseException:  # a rank that fails must not go on as if it were the parent
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(f"a process of {world} failed")
        os.unlink(f"{out}/store-{world}")
        for name in (name for name in CASES if name != "bf16"):  # BF16_Optimizer's files are not read there
            torch.save(get_fp32_state_dict_from_zero_checkpoint(f"{out}/{name}-{world}"), f"{out}/{name}-{world}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
