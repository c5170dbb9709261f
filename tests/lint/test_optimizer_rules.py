"""Rules about a network and its optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

import torchparams as tp


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def step(model: nn.Module, optimizer: Optimizer) -> None:
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def found(model: nn.Module, optimizer: Any) -> dict[str, tuple[str, ...]]:
    return {finding.id: finding.names for finding in tp.audit(model, optimizer)}


def test_what_a_trainer_does_is_clean() -> None:
    model = net()
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    decay = [p for p in model.parameters() if p.ndim >= 2]
    groups: Any = [{"params": decay, "name": "decay"}, {"params": no_decay, "weight_decay": 0.0, "name": "rest"}]
    optimizer = AdamW(groups)
    assert found(model, optimizer) == {}
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    step(model, optimizer)
    scheduler.step()
    assert found(model, optimizer) == {}
    assert found(nn.DataParallel(model), optimizer) == {}
    optimizer.load_state_dict(optimizer.state_dict())
    assert found(model, optimizer) == {}


@pytest.mark.parametrize("make", [lr_scheduler.CyclicLR, torch.optim.swa_utils.SWALR])
def test_keys_of_schedulers_are_known(make: Any) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"base_lr": 0.1, "max_lr": 1.0} if make is lr_scheduler.CyclicLR else {"swa_lr": 0.1}
    make(optimizer, **options)
    assert found(model, optimizer) == {}


def test_groups_of_ours_are_clean() -> None:
    model = net()
    groups = tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), weight_decay=0.1, lr=0.1)
    assert found(model, AdamW(groups)) == {}


def test_several_optimizers_step_one_network() -> None:
    model = net()
    first, second = SGD(model[0].parameters(), lr=0.1), SGD(model[1:].parameters(), lr=0.1)
    assert found(model, [first, second]) == {}
    assert found(model, first) == {"O101": ("1.weight", "1.bias", "2.weight", "2.bias")}
    second.param_groups[0]["lr_scale"] = 0.5
    assert found(model, (first, second)) == {"O106": ("optimizers.1.param_groups.0.lr_scale",)}
    second.add_param_group({"params": [model[0].weight]})
    finding = tp.audit(model, [first, second], select="O103")[0]
    assert finding.what == (
        "1 tensor is in the optimizer several times (0.weight: optimizers.0.param_groups.0, "
        "optimizers.1.param_groups.1)"
    )


def test_a_replaced_layer() -> None:
    model = net()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    model[2] = nn.Linear(8, 2)
    audit = tp.audit(model, optimizer)
    assert {finding.id: finding.names for finding in audit} == {
        "O101": ("2.weight", "2.bias"),
        "O102": ("2.weight", "2.bias"),  # the optimizer's own names for what it was given
    }
    assert audit[1].what == (
        "the optimizer holds 2 tensors that the network lacks; 2.weight, with the shape of one of them, is in no group"
    )


def test_a_frozen_parameter_is_not_missing() -> None:
    model = net()
    with tp.freeze(model, "0.**"):
        assert found(model, SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)) == {}
        assert found(model, SGD(model.parameters(), lr=0.1)) == {}


def test_a_gradient_left_over() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    model[0].weight.requires_grad_(False)
    assert found(model, optimizer) == {"O104": ("0.weight",)}
    assert found(model, SGD(model[1:].parameters(), lr=0.1)) == {"O101": ("0.bias",)}


def test_fixes_select_no_more_than_what_was_found() -> None:
    model: Any = nn.Sequential(net(), net())

    def fix(parameters: Any) -> str:
        return tp.audit(model, SGD(list(parameters), lr=0.1), select="O101")[0].fix.partition("  #")[0]

    assert fix(model[0].parameters()) == "tp.freeze(model, '1.**')"
    assert fix([model[0][0].weight]) == "tp.freeze(model, finding.names)"
    every = list(model.parameters())
    assert fix(every[1:]) == "tp.freeze(model, '0.0.weight')"
    assert fix(every[1:-1]) == "tp.freeze(model, ['0.0.weight', '1.2.bias'])"


def test_decay_by_owner_not_by_name() -> None:
    model = nn.ModuleDict({"norm": nn.Linear(3, 3, bias=False), "fc": nn.BatchNorm1d(3)})
    assert found(model, AdamW(model.parameters())) == {"O105": ("fc.weight", "fc.bias")}
    assert found(model, AdamW(model.parameters(), weight_decay=0.0)) == {}
    assert found(model, SGD(model.parameters(), lr=torch.tensor(0.1))) == {}


class Custom(SGD):
    """An optimizer that reads more than it has defaults for."""


class Bare(Optimizer):
    """One without defaults."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


def test_options_that_are_not_read() -> None:
    model = net()

    def fix(kind: Any, **options: Any) -> list[str]:
        arguments = {} if kind is Bare else {"lr": 0.1}
        optimizer = kind([{"params": model.parameters(), **options}], **arguments)
        return [finding.fix for finding in tp.audit(model, optimizer, select="O106")]

    assert fix(SGD, weigth_decay=0.1) == ["group['weight_decay'] = group.pop('weigth_decay')"]
    assert fix(SGD, lr_scale=0.1) == ["group['lr'] = lr * group.pop('lr_scale')"]
    assert fix(Adam, momentum=0.9) == ["del group['momentum']"]
    assert fix(SGD, group_name="backbone") == []
    assert fix(Custom, lr_scale=0.1, use_muon=True) == []
    assert fix(Custom, weigth_decay=0.1) == ["group['weight_decay'] = group.pop('weigth_decay')"]
    assert fix(Bare, anything=1) == []


def test_many_groups() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(40)])

    def of(options: Any) -> list[str]:
        optimizer = SGD([{"params": [p], **options(i)} for i, p in enumerate(model.parameters())], lr=0.1)
        return [finding.what for finding in tp.audit(model, optimizer, select="O107")]

    assert of(lambda i: {}) == ["80 groups have only 1 different set of options"]
    assert of(lambda i: {"lr": (i % 20) / 100}) == []
    assert of(lambda i: {"lr": i / 100}) == []


def test_state_of_what_is_gone_breaks_the_state_dict() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    del optimizer.param_groups[0]["params"][4:]
    model[2].requires_grad_(False)
    assert found(model, optimizer) == {"O108": ("2.weight", "2.bias")}
    with pytest.raises(KeyError):
        optimizer.state_dict()
    fix = tp.audit(model, optimizer)[0].fix
    exec(fix, {"optimizer": optimizer})
    assert found(model, optimizer) == {}
    optimizer.state_dict()
    optimizer.state["epoch"] = {}  # type: ignore[index]  # some optimizers keep state that belongs to no tensor
    assert found(model, optimizer) == {}


def test_lazy_parameters_in_an_optimizer() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    optimizer = SGD(model.parameters(), lr=0.1)
    assert set(found(model, optimizer)) == {"M105"}
    assert set(found(nn.Sequential(nn.LazyLinear(3)), optimizer)) == {"M105", "O101", "O102"}


def test_rates_of_zero_and_frozen_optimizers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    options: list[dict[str, Any]] = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(options, lr=1)
    assert found(model, optimizer) == {"O110": ("0.weight", "0.bias")}
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert found(model, optimizer) == {"O110": ("0.weight", "0.bias")}  # a schedule of zero times a rate stays zero
    warm = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
    torch.optim.lr_scheduler.LambdaLR(warm, lambda step: step / 10)
    assert warm.param_groups[0]["lr"] == 0 and not found(model, warm)
    assert found(model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.0), weight_decay=0)) == {
        "O110": ("0.weight", "0.bias", "1.weight", "1.bias")
    }
    model.requires_grad_(False)
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    assert found(model, torch.optim.SGD(model.parameters(), lr=0.1)) == {"O109": names}
    assert found(model, None) == {"M110": names}
