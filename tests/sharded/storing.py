"""Checks of load and of optimizer state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import torchparams as tp
from process_group import check
from sharded.models import dtensor_ways, even, fsdp1, fsdp2, full, plain, shared_folder, world
from sharded.training import refused
from torchparams.errors import MismatchError, NotReadable, PlanError
from torchparams.train import _transfer


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


@check(2, 4)
def load_reads_each_byte_once_in_all() -> None:
    model: Any = nn.Sequential(nn.Linear(256, 64 * world(), bias=False))
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            tp.save(model, f"{folder}/w.safetensors")
        dist.barrier()
        read: list[int] = []
        transfer: Any = _transfer
        real = transfer.read_into

        def counting(file: Any, memories: Any, at: int, path: str) -> int:
            read.append(sum(map(len, memories)))
            return int(real(file, memories, at, path))

        fsdp2(model)
        transfer.read_into = counting
        try:
            tp.load(model, f"{folder}/w.safetensors")
        finally:
            transfer.read_into = real
        counts: list[Any] = [None] * world()
        dist.all_gather_object(counts, sum(read))
        assert sum(counts) == model[0].weight.numel() * 4
        assert len(set(counts)) == 1


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
    refused(MismatchError, "0.weight", tp.load, model, dtensor_ways()["replicated"](plain(seed=4)))
    refused(MismatchError, "0.weight", tp.load, plain(), fsdp2(plain(seed=4)))
    refused(MismatchError, "FSDP keeps it", tp.load, fsdp1(plain()), want)
    model.unshard()  # type: ignore[operator]
    refused(MismatchError, "FSDP keeps it", tp.load, model, want)
    model.reshard()  # type: ignore[operator]
    _same(model, want)


@check(2)
def parameters_of_a_sharded_model_are_swapped() -> None:
    torch.manual_seed(0)
    model = fsdp2(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)))
    was = full(model)
    tp.load(model, model, rename={"0.weight": "1.weight", "1.weight": "0.weight"})
    now = full(model)
    assert torch.equal(now["0.weight"], was["1.weight"]) and torch.equal(now["1.weight"], was["0.weight"])


# --- optimizer state ----------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
}


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


@check()
def optimizer_state_is_resharded_in_every_direction() -> None:
    ways = {way: shard for way, shard in dtensor_ways().items() if way in ("fsdp2", "columns", "hybrid")}
    ways["plain"] = lambda model: model
    for kind, make in OPTIMIZERS.items():
        with shared_folder() as folder:
            states: dict[str, Any] = {}
            for way, shard in ways.items():
                model = shard(even())
                optimizer = make(model.parameters())
                _stepped(model, optimizer)
                states[way] = tp.optimizer_state(model, optimizer)
                assert states[way].shapes["0.weight"] == (8, 8)
                if way != "plain" or dist.get_rank() == 0:
                    tp.save(states[way], f"{folder}/{way}.safetensors")
                    tp.save(model, f"{folder}/{way}-model.safetensors")
            dist.barrier()
            want = _whole(states["plain"])
            for way in ways:
                for name, value in _whole(states[way]).items():
                    assert torch.allclose(value, want[name], rtol=1e-3, atol=1e-5), (kind, way, name)
            for saved in ways:
                for way, shard in ways.items():
                    model = shard(even())
                    optimizer = make(model.parameters())
                    tp.load(model, f"{folder}/{saved}-model.safetensors")
                    assert tp.load_optimizer_state(model, optimizer, f"{folder}/{saved}.safetensors").complete
                    got = _whole(tp.optimizer_state(model, optimizer))
                    for name, value in _whole(states[saved]).items():
                        assert torch.equal(got[name], value), (kind, saved, way, name)
                    _stepped(model, optimizer, 1, start=2)  # it goes on


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
