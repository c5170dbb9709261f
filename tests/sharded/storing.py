"""Checks of load and of optimizer state."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torchparams as tp
from process_group import check
from sharded.models import (
    Shard,
    distribute_tensor,
    dtensor_ways,
    even,
    fsdp1,
    fsdp2,
    full,
    plain,
    shared_folder,
    world,
)
from sharded.training import refused
from torchparams import limits
from torchparams.errors import MismatchError, NotReadable, PlanError, RanksError

if TYPE_CHECKING:
    from collections.abc import Callable


def _filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def _same(model: nn.Module, want: nn.Module, way: str = "") -> None:
    got = full(model)
    for name, value in full(want).items():
        assert torch.equal(got[name], value), (way, name)


@check()
def load_fills_shards_from_any_source() -> None:
    want = plain(seed=4)
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            tp.save(want, f"{folder}/w.safetensors")
            tp.save(want, f"{folder}/w.pt")
            tp.convert(want, f"{folder}/shards", max_shard_size=100).run()
        dist.barrier()
        sources: list[Any] = [f"{folder}/w.safetensors", f"{folder}/w.pt", f"{folder}/shards", want, want.state_dict()]
        for source in sources:
            for way, shard in dtensor_ways().items():
                model = _filled(shard(plain()), -1.0)
                before = [id(parameter) for parameter in model.parameters()]
                assert tp.load(model, source).complete, way
                assert before == [id(parameter) for parameter in model.parameters()], way
                _same(model, want, way)


@check()
def load_casts_and_counts_losses_alike_on_all_ranks() -> None:
    want = plain(seed=4)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in want.state_dict().items()}
    lost = tp.load(plain(), wide).loaded["0.weight"].lost
    for way, shard in dtensor_ways().items():
        model = shard(plain())
        found = tp.load(model, wide)
        assert found.loaded["0.weight"].lost == lost, way
        _same(model, want, way)
        half = shard(plain(dtype=torch.bfloat16))
        reference = plain(dtype=torch.bfloat16)
        want_lost = tp.load(reference, want).loaded["0.weight"].lost
        assert tp.load(half, want).loaded["0.weight"].lost == want_lost, way
        _same(half, reference, way)
    model = fsdp2(plain())
    was = full(model)
    wide["0.weight"][6, 0] = 1e300  # in the last rank's part
    refused(MismatchError, "too large", tp.load, model, wide)
    for name, value in full(model).items():
        assert torch.equal(value, was[name])


def _bytes_read(call: Callable[[], Any], header: int = 4096) -> list[int]:
    """How many bytes of values each rank reads during a call; what lies before `header` in a file is none."""
    read: list[int] = []
    real = os.preadv

    def counting(file: int, memories: Any, at: int, *flags: int) -> int:
        got = real(file, memories, at, *flags)
        read.append(max(at + got - max(at, header), 0))
        return got

    os.preadv = counting
    try:
        call()
    finally:
        os.preadv = real
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, sum(read))
    return found


@check(2, 4)
def load_reads_each_byte_once_in_all() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(256, 64 * world(), bias=False), nn.Linear(64 * world(), 1024))

    want = model()
    nbytes = tp.of(want).nbytes
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            tp.save(want, f"{folder}/w.safetensors", metadata={"filler": "x" * 4096})
        dist.barrier()
        header = os.path.getsize(f"{folder}/w.safetensors") - nbytes
        rows = fsdp2(model())
        counts = _bytes_read(lambda: tp.load(rows, f"{folder}/w.safetensors"), header)
        assert counts == [nbytes // world()] * world(), counts
        _same(rows, want)
        # Of columns, a rank needs all rows; of columns of some rows, these rows.
        columns = dtensor_ways()["columns"](model())
        counts = _bytes_read(lambda: tp.load(columns, f"{folder}/w.safetensors"), header)
        assert max(counts) <= nbytes, counts
        _same(columns, want)
        if world() == 4:
            mesh = init_device_mesh("cpu", (2, 2))
            square = nn.Linear(256, 256, bias=False)
            whole = square.weight.detach().clone()
            square.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0), Shard(1)]))
            given = f"{folder}/w.safetensors"
            counts = _bytes_read(lambda: tp.load(square, given, rename={"0.weight": "weight"}, strict=False), header)
            assert max(counts) <= whole.nbytes // 2, counts
            assert torch.equal(full(square)["weight"], want.get_parameter("0.weight"))


@check(2, 4)
def optimizer_state_is_read_once_in_all() -> None:
    model = fsdp2(even())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _stepped(model, optimizer, 1)
    state = tp.optimizer_state(model, optimizer)
    with shared_folder() as folder:
        path = f"{folder}/state.safetensors"
        tp.save(state, path)
        header = os.path.getsize(path) - state.nbytes
        again = fsdp2(even())
        other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
        counts = _bytes_read(lambda: tp.load_optimizer_state(again, other, path), header)
        assert counts == [state.nbytes // world()] * world(), counts
        for name, value in _whole(tp.optimizer_state(again, other)).items():
            assert torch.equal(value, _whole(state)[name])


@check()
def load_gives_memory_to_shards_on_the_meta_device() -> None:
    want = plain(seed=4)
    with torch.device("meta"):
        model = plain()
    fully_shard(model, mesh=init_device_mesh("cpu", (world(),)))
    tp.load(model, want)
    _same(model, want)
    model.eval()
    want.eval()
    inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(inputs), want(inputs), atol=1e-6)


@check(2, 4)
def load_between_shards() -> None:
    want = plain(seed=4)
    model = fsdp2(plain())
    assert tp.load(model, fsdp2(plain(seed=4))).complete
    _same(model, want)
    refused(MismatchError, "FSDP keeps it", tp.load, fsdp1(plain()), want)
    model.unshard()  # type: ignore[operator]
    refused(MismatchError, "FSDP keeps it", tp.load, model, want)
    model.reshard()  # type: ignore[operator]
    _same(model, want)


@check(2, 4)
def load_between_shards_of_all_kinds() -> None:
    want = plain(seed=4)
    ways: dict[str, Any] = {**dtensor_ways(), "plain": lambda model: model}
    for there, shard_there in ways.items():
        given = shard_there(plain(seed=4))
        for here, shard_here in ways.items():
            model = _filled(shard_here(plain()), -1.0)
            if "two_dimensional" in (there, here) and {there, here} & {"fsdp2", "columns", "replicated", "hybrid"}:
                # Its norms are on a part of the ranks, and theirs on all.
                refused(MismatchError, "keep it, and", tp.load, model, given)
                continue
            told: list[int] = []
            assert tp.load(model, given, progress=lambda *seen: told.extend(seen)).complete, (there, here)  # noqa: B023
            _same(model, want, f"{there} → {here}")
            assert told[-2] == told[-1], told


@check(2, 4)
def load_between_shards_casts_and_counts_losses() -> None:
    given = plain(seed=4)
    with torch.no_grad():
        given.get_parameter("0.weight")[6, 0] = 1e-30
    reference = plain(dtype=torch.float16)
    lost = tp.load(reference, given).loaded["0.weight"].lost
    sharded = dtensor_ways()["columns"](given)
    model = fsdp2(plain(dtype=torch.float16))
    assert tp.load(model, sharded).loaded["0.weight"].lost == lost
    _same(model, reference)
    with torch.no_grad():
        big = plain(seed=4)
        big.get_parameter("0.weight")[0, 0] = 1e30
    refused(MismatchError, "too large", tp.load, model, dtensor_ways()["columns"](big))
    _same(model, reference)


@check(2)
def parameters_of_different_shards_are_swapped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0] = fsdp2(model[0])
    model[1] = dtensor_ways()["columns"](model[1])
    was = full(model)
    tp.load(model, model, rename={"0.weight": "1.weight", "1.weight": "0.weight"})
    now = full(model)
    assert torch.equal(now["0.weight"], was["1.weight"]) and torch.equal(now["1.weight"], was["0.weight"])


@check(2)
def a_load_between_shards_that_a_rank_does_not_make_ends() -> None:
    model, given = fsdp2(plain()), dtensor_ways()["replicated"](plain(seed=4))
    was = full(model)
    before, limits.RANKS_SECONDS = limits.RANKS_SECONDS, 1.0
    try:
        if dist.get_rank() == 0:
            refused(RanksError, "did not make this call within 1 s: load of 10 tensors", tp.load, model, given)
    finally:
        limits.RANKS_SECONDS = before
    dist.barrier()
    if dist.get_rank() != 0:
        refused(RanksError, "gave up waiting", tp.load, model, given)
    dist.barrier()
    for name, value in full(model).items():
        assert torch.equal(value, was[name])


@check(2)
def parameters_of_a_sharded_model_are_swapped() -> None:
    torch.manual_seed(0)
    model = fsdp2(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)))
    was = full(model)
    tp.load(model, model, rename={"0.weight": "1.weight", "1.weight": "0.weight"})
    now = full(model)
    assert torch.equal(now["0.weight"], was["1.weight"]) and torch.equal(now["1.weight"], was["0.weight"])


# --- optimizer state ----------------------------------------------------------------------------


def _stepped(model: nn.Module, optimizer: Any, steps: int = 2, start: int = 0) -> None:
    for step in range(start, start + steps):
        inputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _whole(state: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in dict(state).items()
    }


@check(2, 4)
def optimizer_state_in_memory_is_resharded() -> None:
    source = fsdp2(even())
    optimizer = torch.optim.AdamW(source.parameters(), lr=0.1)
    _stepped(source, optimizer)
    state = tp.optimizer_state(source, optimizer)
    for way in ("plain", "columns", "fsdp2"):
        model = even() if way == "plain" else dtensor_ways()[way](even())
        other = torch.optim.AdamW(model.parameters(), lr=0.1)
        assert tp.load_optimizer_state(model, other, state).complete
        for name, value in _whole(tp.optimizer_state(model, other)).items():
            assert torch.equal(value, _whole(state)[name]), (way, name)
        _stepped(model, other, 1)


@check(2)
def optimizer_state_of_parts_is_refused() -> None:
    model = fsdp1(even())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    refused(NotReadable, "optim_state_dict", tp.optimizer_state, model, optimizer)
    refused(NotReadable, "optim_state_dict", tp.load_optimizer_state, model, optimizer, {})
    sharded = fsdp2(even())
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.1)
    _stepped(sharded, optimizer, 1)
    state = tp.optimizer_state(sharded, optimizer)
    with shared_folder() as folder:
        refused(PlanError, ".safetensors", tp.save, state, f"{folder}/state.pt")
