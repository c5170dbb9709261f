"""A training that stops, and goes on with another number of ranks and with other shards.

Gradients are set, not computed: each is the same function of the name and the step on every rank, and steps of these
optimizers are elementwise. So a sharded training has the bits of the unsharded one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import torchparams as tp
from sharded.models import DTensor, distribute_tensor, dtensor_ways, full, world

if TYPE_CHECKING:
    from collections.abc import Callable

dcp: Any = checkpoint  # which does not declare what it exports

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),  # has state before the first step
}

FORMS = ("safetensors", "pt", "dcp", "flat")
"""Ways to write a state: two files of whole tensors, two distributed checkpoints."""


def _ways(kind: str) -> dict[str, Callable[[Any], nn.Module]]:
    known = dtensor_ways()
    chosen = ("fsdp2", "columns", "two_dimensional") if kind == "adamw" else ("fsdp2",)
    return {"plain": lambda model: model, **{way: known[way] for way in chosen if way in known}}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 4, bias=False))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for place, parameter in enumerate(model.parameters()):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * number + place))
        gradient: Any = values
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = gradient
    optimizer.step()


def _trained(kind: str, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The unsharded training."""
    model = _model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for number in range(steps):
        _step(model, optimizer, number)
    return model, optimizer


def save(folder: str) -> None:
    """Train two steps, and write the state in all forms that this run has."""
    for kind, make in OPTIMIZERS.items():
        for way, shard in _ways(kind).items():
            model = shard(_model())
            optimizer = make(model.parameters())
            for number in range(2):
                _step(model, optimizer, number)
            state = tp.optimizer_state(model, optimizer)
            stem = f"{folder}/{kind}-{world()}-{way}"
            if way == "plain" and dist.get_rank() != 0:
                continue
            tp.save(state, f"{stem}.safetensors")
            if way == "plain":
                torch.save(state.state_dict(), f"{stem}.pt")
            elif kind == "adamw" and way != "columns":
                whole = get_optimizer_state_dict(model, optimizer)
                dcp.save({"optimizer": whole, "step": 2}, checkpoint_id=f"{stem}.dcp")
                options = StateDictOptions(flatten_optimizer_state_dict=True)
                dcp.save(get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=f"{stem}.flat")


def go_on(folder: str) -> None:
    """Go on from the state of every run: the third step has the bits of the unsharded training."""
    paths = sorted(Path(folder).glob("*-*-*.*"))
    assert {path.suffix[1:] for path in paths} == set(FORMS)
    assert {path.stem.split("-")[1] for path in paths} == {"1", "2", "4"}
    whole = {kind: (_trained(kind, 2)[0], full(_trained(kind, 3)[0])) for kind in OPTIMIZERS}
    for path in paths:
        kind = path.stem.split("-")[0]
        before, want = whole[kind]
        for way, shard in _ways(kind).items():
            if path.suffix != ".safetensors" and way not in ("plain", "fsdp2"):
                continue
            model = shard(_model())
            tp.load(model, before)
            optimizer = OPTIMIZERS[kind](model.parameters())
            target = f"{path}#optimizer" if path.suffix == ".dcp" else str(path)
            assert tp.load_optimizer_state(model, optimizer, target).complete
            _step(model, optimizer, 2)
            for name, value in full(model).items():
                assert torch.equal(value, want[name]), (path.name, way, name)
