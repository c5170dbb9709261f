"""Checks of functions that change a live model, and of gradients."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import torchparams as tp
from process_group import check
from sharded.models import (
    Partial,
    Shard,
    dtensor_ways,
    even,
    fsdp1,
    fsdp2,
    full,
    plain,
    ways,
    world,
)
from torchparams.errors import NotReadable, OptionError, RanksError, TorchParamsError, UnsupportedSource


def refused(error: type[BaseException], text: str, function: Any, *arguments: Any, **options: Any) -> None:
    """Check that a call is refused with a message that holds a text."""
    try:
        function(*arguments, **options)
    except error as caught:
        assert text in str(caught), caught
        return
    raise AssertionError(f"it was not refused: {text}")


RULES: list[Any] = [
    ("[ndim>=2]", partial(nn.init.kaiming_normal_, a=0.1)),
    ("2.weight", nn.init.orthogonal_),
    ("**.bias", nn.init.uniform_),
    ("1.weight", lambda w: torch.linspace(0, 1, len(w))),
    ("3.weight", nn.init.trunc_normal_),
]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], way: str) -> None:
    assert a.keys() == b.keys(), way
    for name, value in a.items():
        assert torch.equal(value, b[name]), (way, name, value, b[name])


# --- init ---------------------------------------------------------------------------------------


@check()
def init_draws_the_values_of_the_unsharded_model() -> None:
    want = plain(seed=5)
    tp.init(want, *RULES, seed=3)
    for way, shard in dtensor_ways().items():
        model = shard(plain())
        before = [id(parameter) for parameter in model.parameters()]
        found = tp.init(model, *RULES, seed=3)
        assert found.shapes["0.weight"] == (7, 5)
        assert before == [id(parameter) for parameter in model.parameters()]
        _same(full(want), full(model), way)


@check()
def init_gives_memory_to_shards_on_the_meta_device() -> None:
    want = plain()
    tp.init(want, *RULES, seed=3)
    with torch.device("meta"):
        model = plain()
    fully_shard(model, mesh=init_device_mesh("cpu", (world(),)))
    tp.init(model, *RULES, seed=3)
    _same(full(want), full(model), "meta")
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(inputs), want(inputs), atol=1e-6)


@check(2, 4)
def init_refuses_what_it_cannot_do() -> None:
    model = fsdp2(plain())
    was = full(model)
    refused(OptionError, "seed", tp.init, model, ("**.bias", nn.init.zeros_))
    refused(OptionError, "apply_", tp.init, model, ("0.weight", lambda w: w * 0.5), seed=0)
    refused(OptionError, "apply_", tp.init, model, ("0.weight", _zero_first_row), seed=0)
    _same(was, full(model), "refused")
    refused(NotReadable, "summon_full_params", tp.init, fsdp1(plain()), ("**.bias", nn.init.zeros_), seed=0)
    model.unshard()  # type: ignore[operator]
    refused(NotReadable, "reshard()", tp.init, model, ("**.bias", nn.init.zeros_), seed=0)
    model.reshard()  # type: ignore[operator]


def _zero_first_row(w: torch.Tensor) -> None:
    w[0].zero_()


# --- apply_ -------------------------------------------------------------------------------------


@check()
def apply_works_on_wholes() -> None:
    def centred(w: torch.Tensor) -> torch.Tensor:
        return (w - w.mean()) / (w.std() + 1)

    want = plain()
    tp.apply_(want, "**.weight", centred)
    for way, shard in dtensor_ways().items():
        model = shard(plain())
        assert tp.apply_(model, "**.weight", centred).shapes["0.weight"] == (7, 5)
        _same(full(want), full(model), way)


@check(2, 4)
def apply_refuses_values_that_differ_between_ranks() -> None:
    model = fsdp2(plain())
    was = full(model)
    torch.manual_seed(dist.get_rank())
    refused(RanksError, "different values", tp.apply_, model, "0.weight", nn.init.normal_)
    _same(was, full(model), "differ")

    def fails_somewhere(w: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 1 and w.ndim == 1:
            raise ValueError("no")
        return w * 2

    refused((ValueError, RanksError), "no", tp.apply_, model, None, fails_somewhere)  # type: ignore[arg-type]
    _same(was, full(model), "failed")
    refused(NotReadable, "summon_full_params", tp.apply_, fsdp1(plain()), None, nn.init.zeros_)


# --- freeze, groups -----------------------------------------------------------------------------


@check()
def freezing_is_that_of_the_unsharded_model() -> None:
    for way, shard in ways().items():
        if way == "flat":
            continue
        if way == "replicated":
            continue  # a plain input does not go through plain linear layers of DTensors
        model = shard(even())
        with tp.freeze(model, "0.**"):
            assert tp.of(model).select(":frozen").names == ["0.weight", "0.bias"], way
            model(torch.ones(4, 8)).sum().backward()
            assert not any(parameter.grad is not None for parameter in tp.of(model).select("0.**").values()), way
        assert tp.of(model).select(":trainable").numel == tp.of(even()).numel, way


@check(2)
def parts_of_a_flat_parameter_are_not_treated_apart() -> None:
    model = ways()["flat"](plain())
    refused(UnsupportedSource, "use_orig_params", tp.freeze, model, "0.**")
    refused(UnsupportedSource, "use_orig_params", tp.groups, model, lr=0.1)
    copies = fsdp2(plain())
    copies.unshard()  # type: ignore[operator]
    refused(NotReadable, "reshard()", tp.freeze, copies)
    refused(NotReadable, "reshard()", tp.groups, copies, lr=0.1)
    copies.reshard()  # type: ignore[operator]


@check()
def groups_see_the_global_dimensions() -> None:
    want = tp.groups(plain(), tp.rule(tp.no_decay, weight_decay=0.0), lr=0.1, weight_decay=0.1)
    for way, shard in ways().items():
        if way == "flat":
            continue
        got = tp.groups(shard(plain()), tp.rule(tp.no_decay, weight_decay=0.0), lr=0.1, weight_decay=0.1)
        assert [group["param_names"] for group in got] == [group["param_names"] for group in want], way
        assert [group["weight_decay"] for group in got] == [0.1, 0.0], way


# --- penalty ------------------------------------------------------------------------------------


@check()
def penalties_have_the_value_and_the_gradient_of_the_whole() -> None:
    other = plain(seed=1).state_dict()
    for p in (1, 2):
        for toward in (None, other):
            want = plain()
            value: Any = tp.penalty(want, "**.weight", p, toward)
            value.backward()
            for way, shard in dtensor_ways().items():
                model = shard(plain())
                got: Any = tp.Penalty(model, "**.weight", p, toward)()
                assert math.isclose(got.item(), value.item(), rel_tol=1e-5), (way, p, got, value)
                got.backward()
                for name, parameter in tp.of(model).select("**.weight").items():
                    grad: Any = parameter.grad
                    grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
                    wanted: Any = want.get_parameter(name).grad
                    assert torch.allclose(grad, wanted, atol=1e-6), (way, p, name)
    model = fsdp2(plain())
    assert tp.Penalty(model, toward=model)().item() == 0
    refused(NotReadable, "flat parameter", tp.penalty, fsdp1(plain())) if world() > 1 else None


# --- gradients ----------------------------------------------------------------------------------


def _with_gradients(model: nn.Module) -> nn.Module:
    """A model whose gradients are those of the unsharded one."""
    model(torch.randn(6, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    return model


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "gather")


def _collectives() -> list[str]:
    """Names of the collectives that are made from now on."""
    made: list[str] = []
    for name in COLLECTIVES:
        real = getattr(dist, name)

        def counted(*arguments: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            made.append(name)
            return real(*arguments, **options)

        setattr(dist, name, counted)
    return made


def _restore(names: dict[str, Any]) -> None:
    for name, real in names.items():
        setattr(dist, name, real)


@check()
def norms_of_gradients_are_those_of_the_whole() -> None:
    for p in (1, 2, 3, math.inf):
        want = tp.grad_norms(_with_gradients(even()), by="module", p=p)
        for way, shard in ways().items():
            if way == "replicated":
                continue  # a plain input does not go through linear layers of DTensors
            model = _with_gradients(shard(even()))
            got = tp.grad_norms(model, by="module", p=p)
            assert got.norms.keys() == want.norms.keys(), way
            grads = {name: grad for name, grad in tp.gradients(model).items() if isinstance(grad, DTensor)}
            for name, grad in grads.items():
                norm = float(torch.linalg.vector_norm(grad.full_tensor(), p))
                assert math.isclose(got.norms[name], norm, rel_tol=1e-5), (way, p, name)
            if way in ("fsdp1", "flat", "fsdp2", "columns", "hybrid"):
                for name, norm in want.norms.items():
                    assert math.isclose(got.norms[name], norm, rel_tol=1e-4, abs_tol=1e-6), (way, p, name)
                assert math.isclose(got.total, want.total, rel_tol=1e-4), (way, p)


@check(2, 4)
def norms_take_one_gather_and_empty_shards() -> None:
    real = {
        name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "gather")
    }
    model = nn.Sequential(*(nn.Linear(3, 1) for _ in range(50)))  # one row: all ranks but the first have none
    fsdp2(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for p in (1, 2, math.inf):
        made = _collectives()
        try:
            norms = tp.grad_norms(model, p=p)
        finally:
            _restore(real)
        assert made == ["all_gather"], made
        assert math.isclose(norms.norms["0.weight"], 3 ** (1 / p) if p != math.inf else 1, rel_tol=1e-6)


@check()
def summands_of_gradients_are_added_up() -> None:
    mesh = init_device_mesh("cpu", (world(),))
    model = nn.ParameterList([nn.Parameter(DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)])) for _ in range(5)])
    torch.manual_seed(dist.get_rank())
    for parameter in model:
        summand = torch.randn(3 * world(), 2)
        parameter.grad = DTensor.from_local(summand, mesh, [Partial()])
    want = {str(i): float(p.grad.full_tensor().norm()) for i, p in enumerate(model)}
    got = tp.grad_norms(model).norms
    for name, norm in want.items():
        assert math.isclose(got[name], norm, rel_tol=1e-6), (got, want)


@check(2)
def gradients_of_shards_are_a_table() -> None:
    want = tp.stats(tp.gradients(_with_gradients(even())))
    model = _with_gradients(fsdp2(even()))
    assert tp.gradients(model).info("0.weight").shape == (8, 8)
    got = tp.stats(tp.gradients(model))
    for row in want:
        assert math.isclose(got[row.name].l2, row.l2, rel_tol=1e-4, abs_tol=1e-6)
    tp.apply_(tp.gradients(model), None, lambda g: g * 0)
    assert tp.grad_norms(model).total == 0
    nonfinite = fsdp2(plain())
    for name, parameter in nonfinite.named_parameters():
        parameter.grad = torch.full_like(parameter, math.inf if name == "0.bias" else 1.0)
    assert tp.grad_norms(nonfinite).nonfinite == ("0.bias",)


@check(2)
def gradients_of_flat_parameters_are_a_table() -> None:
    want = tp.grad_norms(_with_gradients(even()))
    for way in ("fsdp1", "flat"):
        model = _with_gradients(ways()[way](even()))
        table = tp.gradients(model)
        assert table.info("0.weight").shape == (8, 8), way
        rows = tp.stats(table)
        assert math.isclose(rows["0.weight"].l2, want.norms["0.weight"], rel_tol=1e-4), way
        refused(NotReadable, "flat parameter", table.numpy, "0.weight")


# --- ranks --------------------------------------------------------------------------------------


@check(2, 4)
def a_call_that_some_ranks_do_not_make_ends() -> None:
    from torchparams import limits

    model = fsdp2(plain())
    before, limits.RANKS_SECONDS = limits.RANKS_SECONDS, 1.0
    try:
        if dist.get_rank() == 0:
            refused(RanksError, "did not make this call within 1 s: stats of 7 sharded tensors", tp.stats, model)
    finally:
        limits.RANKS_SECONDS = before
    dist.barrier()
    if dist.get_rank() != 0:
        refused(RanksError, "gave up waiting for this rank", tp.stats, model)
    dist.barrier()
    assert len(tp.stats(model).rows) == 7


@check(2, 4)
def different_calls_are_told_apart() -> None:
    model = fsdp2(plain())
    call = tp.stats if dist.get_rank() else tp.digest
    refused(RanksError, "makes another call", call, model)
    selector = "0.**" if dist.get_rank() else "**.weight"
    refused(RanksError, "makes another call", tp.stats, model, selector)
    assert len(tp.stats(model).rows) == 7


@check(2)
def an_error_on_one_rank_is_one_on_all() -> None:
    model = fsdp2(plain())

    def progress(done: int, total: int) -> None:
        raise ValueError("stopped")

    refused((ValueError, TorchParamsError), "stopped", tp.stats, model, progress=progress)  # type: ignore[arg-type]
    assert len(tp.stats(model).rows) == 7


@check(2)
def progress_is_told_on_the_first_rank() -> None:
    told: list[int] = []
    model = fsdp2(plain())
    for verb in (tp.stats, tp.digest):
        told.clear()
        verb(model, progress=lambda done, total: told.append(done))
        assert bool(told) == (dist.get_rank() == 0), verb


@check(2)
def tables_print_on_every_rank() -> None:
    printed = [str(tp.stats(fsdp2(plain()))), str(tp.of(fsdp2(plain())))]
    assert all(text and "Error" not in text for text in printed)
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, printed[0])
    assert len(set(found)) == 1


@check(2)
def summoned_parameters_can_be_changed() -> None:
    model = fsdp1(plain())
    with FullyShardedDataParallel.summon_full_params(model):
        tp.init(model, ("**.bias", nn.init.ones_), seed=0)
    assert tp.stats(model)["0.bias"].mean == 1
