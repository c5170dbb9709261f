"""Checks of the audit of models that ranks share."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import torchparams as tp
from process_group import check
from sharded.models import even, fsdp1, fsdp2, plain, ways


def _found(model: Any, *arguments: Any, **options: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.id, finding.names) for finding in tp.audit(model, *arguments, **options)]


@check(2, 4)
def values_are_those_of_whole_parameters() -> None:
    def broken() -> nn.Sequential:
        model = plain()
        with torch.no_grad():
            model.get_parameter("0.weight")[6, 4] = math.nan  # in the last rank's part
            model.get_parameter("2.weight").zero_()
        return model

    want = _found(broken(), select="M301,M303,M304")
    assert want
    for way, shard in ways().items():
        if way in ("fsdp1", "flat"):
            continue
        audit = tp.audit(shard(broken()), select="M301,M303,M304")
        assert [(finding.id, finding.names) for finding in audit] == want, way
        assert not audit.unread, way
    for way in ("fsdp1", "flat"):
        got = _found(ways()[way](broken()), select="M301")
        assert got == [("M301", ("0.weight",))], (way, got)
    alone = tp.audit(fsdp2(broken()), select="M301,M303", ranks=False)
    assert not list(alone)
    assert "0.weight" in alone.unread


@check(2, 4)
def gradients_are_those_of_whole_parameters() -> None:
    model = fsdp2(plain())
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        local: Any = parameter.grad
        if name == "0.weight" and dist.get_rank() == 0:
            local._local_tensor[0, 0] = math.inf
    assert ("G103", ("0.weight",)) in _found(model)


@check(2, 4)
def replicas_and_flags_are_compared() -> None:
    model = nn.parallel.DistributedDataParallel(even())
    assert _found(model, select="D") == []
    with torch.no_grad():
        model.module[0].weight += dist.get_rank()
    model.module[1].bias.requires_grad_(dist.get_rank() == 0)
    assert _found(model, select="D") == [("D101", ("1.bias",)), ("D102", ("0.weight",))]
    assert _found(model, select="D", ranks=False) == []
    sharded = ways()["tensor_parallel"](plain())  # its norms are plain: a replica on each rank
    assert _found(sharded, select="D") == []
    with torch.no_grad():
        sharded.get_parameter("1.weight").add_(dist.get_rank())
    assert _found(sharded, select="D") == [("D102", ("1.weight",))]


@check(4)
def replicas_of_shards_are_compared() -> None:
    model = ways()["hybrid"](even())
    assert _found(model, select="D") == []
    parameter: Any = model.get_parameter("0.weight")
    if dist.get_rank() == 3:
        parameter._local_tensor.add_(1)
    assert _found(model, select="D") == [("D102", ("0.weight",))]


@check(2)
def parameters_from_before_sharding_are_found() -> None:
    for shard in (fsdp2, fsdp1):
        model: Any = even()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model = shard(model)
        findings = [finding for finding in tp.audit(model, optimizer) if finding.id == "O102"]
        if shard is fsdp2:
            assert "from before it was sharded" in findings[0].what
            assert "made after" in findings[0].fix
        model = shard(even()) if shard is fsdp2 else model
        fine = torch.optim.AdamW(model.parameters(), lr=0.1)
        assert not [finding for finding in tp.audit(model, fine) if finding.id == "O102"]


@check(2)
def frozen_parameters_in_a_flat_parameter_are_found() -> None:
    model = even()
    model[0].requires_grad_(False)
    assert ("D103", ("0.weight", "0.bias")) in _found(fsdp1(model), select="D")
    assert _found(fsdp1(even()), select="D") == []


@check(2)
def a_sharded_training_is_as_sound_as_the_unsharded_one() -> None:
    def trained(shard: Any) -> tuple[Any, Any]:
        model = shard(even())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.randn(6, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        optimizer.step()
        return model, optimizer

    want = _found(*trained(lambda model: model))
    for way in ("fsdp2", "fsdp1", "flat"):
        model, optimizer = trained(ways()[way])
        found = _found(model, optimizer)
        # The options of a flat parameter are those of all parameters in it.
        assert [each for each in found if each[0] != "O105"] == [each for each in want if each[0] != "O105"], way
        assert way == "flat" or found == want, way
        if way == "fsdp2":  # copies gathered for a forward pass are in the place of what is trained
            model.unshard()
            assert not [each for each in _found(model, optimizer) if each[0] in ("O101", "O102", "O108")]
            model.reshard()
        optimizer.zero_grad()
        assert tp.gradients(model).names == []
        assert tp.grad_norms(model).norms == {}
