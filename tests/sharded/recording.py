"""Checks of the recorder: the record of a sharded training is that of the unsharded one."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torchparams as tp
from process_group import check
from sharded.models import (
    DTensor,
    Partial,
    Replicate,
    columns,
    flat,
    fsdp1,
    fsdp2,
    shared_folder,
    tensor_parallel,
    world,
)
from sharded.training import COLLECTIVES, _collectives, _restore, refused
from torchparams.errors import NotReadable, RanksError, UnsupportedSource, WriteError
from torchparams.record.history_tree import NUMBERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.record.recorder import Recorder

STEPS = 3
DEAD = 3


def net() -> nn.Sequential:
    """A model whose first units are dead."""
    torch.manual_seed(0)
    first = nn.Linear(8, 8)
    with torch.no_grad():
        first.bias[:DEAD] = -1e3
    return nn.Sequential(first, nn.ReLU(), nn.Linear(8, 4))


def train(model: nn.Module, path: str, plant: Callable[[int], None] = lambda step: None, **options: Any) -> list[int]:
    """Train on the same batches on every rank; return the number of collectives of each call of `step`."""
    options = {"every": {"weights": 2, "gradients": 2, "updates": 2, "histograms": 2}, "quiet": True, **options}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    numbers = torch.Generator().manual_seed(1)
    made = []
    with tp.Recorder(model, optimizer, path, rows="**.weight", **options) as recorder:
        for step in range(STEPS):
            model(torch.randn(16, 8, generator=numbers)).square().mean().backward()
            plant(step)
            optimizer.step()
            made.append(collectives(recorder))
            optimizer.zero_grad()
    return made


def collectives(recorder: Recorder) -> int:
    real = {name: getattr(dist, name) for name in COLLECTIVES}
    made = _collectives()
    try:
        recorder.step()
    finally:
        _restore(real)
    return len(made)


def ways() -> dict[str, Callable[[Any], nn.Module]]:
    """Ways to shard that train on plain inputs."""
    return {"fsdp2": fsdp2, "columns": columns, "tensor_parallel": tensor_parallel, "fsdp1": fsdp1, "ddp": ddp}


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def same(path: str, want: str, way: str) -> None:
    """Check that two records have the same rows."""
    found, expected = tp.history(path), tp.history(want)
    assert found.names == expected.names and found.steps == expected.steps == (0, 2), way
    for name in expected.names:
        a, b = found[name], expected[name]
        for key in NUMBERS:
            assert np.allclose(a[key], b[key], rtol=1e-4, atol=1e-6, equal_nan=True), (way, name, key, a[key], b[key])
    assert found["0.weight"]["dead_rows"].tolist() == [DEAD, DEAD], way
    for row, other in zip(found.rows(), expected.rows(), strict=True):
        assert row.counts == other.counts or row.step > 0, (way, row, other)  # later weights differ in the last bit


@check(2)
def the_record_of_a_sharded_training_is_that_of_the_whole() -> None:
    with shared_folder() as folder:
        train(net(), f"{folder}/want", by="module")
        for way, shard in ways().items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = train(shard(net()), f"{folder}/{way}", by="module")
            assert made == [0 if way == "ddp" else 1, 0, 0 if way == "ddp" else 1], (way, made)
            dist.barrier()
            if dist.get_rank() == 0:
                same(f"{folder}/{way}", f"{folder}/want", way)


@check(4)
def replicas_count_once() -> None:
    with shared_folder() as folder:
        train(net(), f"{folder}/want")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        made = train(fully_shard(net(), mesh=mesh), f"{folder}/hybrid")  # type: ignore[arg-type]
        assert made == [1, 0, 1]
        dist.barrier()
        if dist.get_rank() == 0:
            same(f"{folder}/hybrid", f"{folder}/want", "hybrid")


@check(2)
def a_gradient_that_is_not_finite_on_one_rank_is_found_once() -> None:
    model: Any = fsdp2(net())

    def plant(step: int) -> None:
        if step == 1 and dist.get_rank() == 1:
            model[2].weight.grad._local_tensor[0, 0] = math.nan

    with shared_folder() as folder:
        assert train(model, f"{folder}/run", plant) == [1, 0, 1]
        dist.barrier()
        found = [each for each in tp.diagnose(f"{folder}/run").findings if each.rule == "nonfinite-gradient"]
        assert [(each.step, each.name) for each in found][:1] == [(1, "2.weight")]
        assert found[0].message == "the gradient has elements that are not finite"  # their number is unknown


@check(2)
def a_gradient_after_the_last_record_is_found_at_the_end() -> None:
    model: Any = fsdp2(net())

    def plant(step: int) -> None:
        if step == 1 and dist.get_rank() == 1:
            model[2].weight.grad._local_tensor[0, 0] = math.nan

    with shared_folder() as folder:
        assert train(model, f"{folder}/run", plant, every=100) == [1, 0, 0]
        dist.barrier()
        found = [each for each in tp.diagnose(f"{folder}/run").findings if each.rule == "nonfinite-gradient"]
        assert [(each.step, each.name) for each in found][:1] == [(1, "2.weight")]


@check(2)
def ranks_stay_together_if_a_scaler_skips_a_step() -> None:
    model: Any = fsdp2(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with (
        shared_folder() as folder,
        tp.Recorder(model, optimizer, f"{folder}/run", every=1, quiet=True) as recorder,
    ):
        counted = []
        for step in range(3):
            model(torch.ones(2, 8)).sum().backward()
            if step == 1 and dist.get_rank() == 1:
                model[2].weight.grad._local_tensor[0, 0] = math.inf
            if step != 1:
                optimizer.step()
            counted.append(recorder.step())
            optimizer.zero_grad()
        assert counted == [True, False, True]
        recorder.__exit__()
        dist.barrier()
        found = tp.diagnose(f"{folder}/run").first
        assert found is not None and (found.step, found.rule, found.name) == (1, "nonfinite-gradient", "2.weight")


@check(2)
def summands_are_added_up() -> None:
    mesh = init_device_mesh("cpu", (world(),))
    whole = nn.ParameterList([nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh, [Replicate()]))])
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.0)
    with shared_folder() as folder, tp.Recorder(whole, optimizer, f"{folder}/run", quiet=True) as recorder:
        summand = torch.full((3, 2), float(1 + dist.get_rank()))
        whole[0].grad = DTensor.from_local(summand, mesh, [Partial()])
        optimizer.step()
        recorder.step()
        recorder.flush()
        dist.barrier()
        norm = tp.history(f"{folder}/run")["0"]["grad_norm"][0]
        assert math.isclose(norm, 3 * math.sqrt(6)), norm


@check(2)
def errors_are_errors_on_every_rank() -> None:
    with shared_folder() as folder:
        train(fsdp2(net()), f"{folder}/run")
        dist.barrier()
        error = WriteError if dist.get_rank() == 0 else RanksError
        refused(error, "already has a record", train, fsdp2(net()), f"{folder}/run")
        refused(UnsupportedSource, "use_orig_params=True", train, flat(net()), f"{folder}/flat")
        model: Any = fsdp2(net())
        model.unshard()
        refused(NotReadable, "reshard()", train, model, f"{folder}/unsharded")
        model.reshard()
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with tp.Recorder(model, optimizer, f"{folder}/late", every=1) as recorder:
            fsdp2(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            model(torch.ones(2, 8)).sum().backward()
            recorder._stepped = True
            refused(UnsupportedSource, "sharded after its recorder was created", recorder.step)
            recorder.flush()
