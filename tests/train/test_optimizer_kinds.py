"""Optimizer states of other classes, of wrappers and lists; and optimizers that refuse a state."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import MismatchError, TorchParamsError, UnsupportedSource

KINDS: dict[str, Any] = {
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adam": lambda p: torch.optim.Adam(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=2),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
SAME = {("Adam", "RAdam"), ("RAdam", "Adam")}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: Any, number: int = 0) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = (model(inputs) - 1).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own omission
        return loss

    closure()
    optimizer.step(closure)


def trained(make: Any, steps: int = 3) -> tuple[nn.Sequential, Any]:
    model = net()
    optimizer = make(model.parameters())
    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer


def copied(value: Any) -> Any:
    """What an optimizer holds, tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_the_state_of_another_kind_is_refused_and_nothing_changes(old: str, new: str) -> None:
    _, saved = trained(KINDS[old])
    model, optimizer = trained(KINDS[new], 2)
    before = copied(copy.deepcopy(optimizer.state_dict()))
    if old == new:
        assert tp.load_optimizer_state(model, optimizer, saved.state_dict(), names=NAMES).complete
        step(model, optimizer)
        return
    for strict in (True, False):
        with pytest.raises(MismatchError):
            tp.load_optimizer_state(model, optimizer, saved.state_dict(), names=NAMES, strict=strict)
        assert copied(optimizer.state_dict()) == before
    step(model, optimizer)


def test_the_reason_is_named() -> None:
    _, saved = trained(KINDS["RMSprop"])
    model = net()
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(model, torch.optim.Adam(model.parameters()), saved.state_dict(), names=NAMES)
    assert "0.weight' (it has square_avg, step, and Adam needs exp_avg, exp_avg_sq)" in str(caught.value)
    _, saved = trained(KINDS["Adam"])
    with pytest.raises(MismatchError, match="it has exp_avg, exp_avg_sq, step, which SGD does not use"):
        tp.load_optimizer_state(
            model, torch.optim.SGD(model.parameters()), saved.state_dict(), names=NAMES, strict=False
        )


def test_adagrad_cannot_go_on_without_state() -> None:
    model = net()
    optimizer = torch.optim.Adagrad(model.parameters())
    saved = torch.optim.SGD(model.parameters()).state_dict()
    with pytest.raises(MismatchError, match="it has no state, and Adagrad needs step, sum"):
        tp.load_optimizer_state(model, optimizer, saved, names=NAMES)


@pytest.mark.parametrize("strict", [True, False])
def test_the_reason_why_amsgrad_fails(strict: bool) -> None:
    model, saved = trained(KINDS["Adam"])
    state = tp.optimizer_state(model, saved)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(model, optimizer, state, strict=strict)
    assert "'0.weight' (saved without amsgrad, which needs max_exp_avg_sq)" in str(caught.value)
    assert str(caught.value).endswith("options=True restores the options that it was saved with.")


class Own(torch.optim.Optimizer):
    """A class of a user's own, of which only what it holds tells what it needs."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["mean"] = torch.zeros_like(p)
                    state["mean"].lerp_(p.grad, 1 / group["count"])
                    p.add_(state["mean"], alpha=-group["lr"])


def test_what_an_optimizer_has_is_what_it_needs() -> None:
    _, saved = trained(KINDS["Adam"])
    model, optimizer = trained(Own)
    with pytest.raises(MismatchError, match="it has exp_avg, exp_avg_sq, step, and Own needs mean"):
        tp.load_optimizer_state(model, optimizer, saved.state_dict(), names=NAMES)
    more = {key: {**values, "mean": values["exp_avg"]} for key, values in saved.state_dict()["state"].items()}
    with pytest.raises(MismatchError, match="it has exp_avg, exp_avg_sq, step, which Own does not use"):
        tp.load_optimizer_state(model, optimizer, {**saved.state_dict(), "state": more}, names=NAMES)
    found = tp.load_optimizer_state(model, Own(model.parameters()), saved.state_dict(), names=NAMES)
    assert found.notes == (
        "The state does not name its optimizer, and Own has not stepped yet: whether it is its state was not checked.",
    )


@pytest.mark.parametrize("options", [False, True])
def test_counters_in_the_groups_are_state(options: bool) -> None:
    model, optimizer = trained(Own)
    other = copy.deepcopy(model)
    going_on = Own(other.parameters(), lr=0.1 if not options else 0.7)
    tp.load_optimizer_state(other, going_on, tp.optimizer_state(model, optimizer), options=options)
    assert going_on.param_groups[0]["count"] == 3
    for number in (3, 4):
        step(model, optimizer, number)
        step(other, going_on, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_counters_of_groups_that_become_one_must_agree() -> None:
    model, optimizer = trained(Own)
    optimizer.add_param_group({"params": [], "name": "second"})
    state = tp.optimizer_state(model, optimizer)
    state.groups[1]["params"] = [state.groups[0]["params"].pop()]
    state.groups[1]["count"] = 1
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(model, Own(model.parameters()), state)
    assert str(caught.value) == (
        "The parameters of group 0 were in the groups 0 and 1, whose count was 3 and 1. "
        "Group the parameters as they were."
    )


def test_labels_and_what_a_scheduler_keeps_stay_the_new_runs_own() -> None:
    model, optimizer = trained(KINDS["SGD"])
    optimizer.param_groups[0] |= {"name": "old", "initial_lr": 0.1, "last": 7}
    state = tp.optimizer_state(model, optimizer)
    other = torch.optim.SGD([{"params": list(model.parameters()), "name": "new", "initial_lr": 0.5}], lr=0.5)
    tp.load_optimizer_state(model, other, state)
    group = other.param_groups[0]
    assert (group["name"], group["initial_lr"], group["lr"], group["last"]) == ("new", 0.5, 0.5, 7)
    bare = torch.optim.SGD(model.parameters(), lr=0.5)
    tp.load_optimizer_state(model, bare, state)
    torch.optim.lr_scheduler.StepLR(bare, 3, last_epoch=5)  # which needs initial_lr
    tp.load_optimizer_state(model, other, state, options=True)
    assert (group := other.param_groups[0])["name"] == "old"
    assert group["initial_lr"] == 0.1


def test_group_values_that_are_tensors() -> None:
    model, optimizer = trained(lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)))
    state = tp.optimizer_state(model, optimizer)
    other = torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=torch.tensor(0.5))
    tp.load_optimizer_state(model, other, state, options=True)
    for group in other.param_groups:
        assert torch.equal(group["lr"], torch.tensor(0.1))
        assert group["lr"] is not optimizer.param_groups[0]["lr"]


# --- an optimizer that refuses ---------------------------------------------------------------------


class Fussy(torch.optim.SGD):
    """Fails after it has changed half of its state."""

    fails = True

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        if self.fails:
            self.param_groups[0]["lr"] = -1.0
            raise KeyError("step")


def test_what_an_optimizer_held_is_put_back_when_it_refuses() -> None:
    model, optimizer = trained(lambda p: Fussy(p, lr=0.1, momentum=0.9))
    state = tp.optimizer_state(model, optimizer)
    step(model, optimizer)
    before, groups, held = copied(optimizer.state_dict()), optimizer.param_groups, optimizer.state
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(model, optimizer, state)
    assert str(caught.value) == (
        "Sequential: load_state_dict() of Fussy refused the state: KeyError: 'step'. The optimizer was restored."
    )
    assert isinstance(caught.value.__cause__, KeyError)
    assert copied(optimizer.state_dict()) == before
    assert optimizer.param_groups is groups
    assert optimizer.state is held


def test_of_several_optimizers_all_are_put_back() -> None:
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = Fussy(model[2].parameters(), lr=0.1, momentum=0.9)
    for optimizer in (first, second):
        step(model, optimizer)
    state = tp.optimizer_state(model, [first, second])
    step(model, first)
    before = copied(first.state_dict())
    with pytest.raises(MismatchError, match="Fussy refused the state"):
        tp.load_optimizer_state(model, [first, second], state)
    assert copied(first.state_dict()) == before


# --- wrappers --------------------------------------------------------------------------------------


class Delegating(torch.optim.Optimizer):
    """A wrapper whose state_dict is that of the optimizer inside it."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base_optimizer = base
        self.param_groups = base.param_groups
        self.defaults = {**base.defaults, "slow_step": 0}
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group.setdefault("slow_step", 0)

    def step(self, closure: Any = None) -> Any:
        self.base_optimizer.step()
        for group in self.param_groups:
            group["slow_step"] += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.base_optimizer.load_state_dict(state_dict)
        self.param_groups = self.base_optimizer.param_groups


def test_a_wrapper_that_delegates_is_seen_through() -> None:
    model, optimizer = trained(lambda p: Delegating(torch.optim.AdamW(p, lr=0.1)))
    state = tp.optimizer_state(model, optimizer)
    assert state.optimizer == "torch.optim.adamw.AdamW"
    assert len(state) == 12
    other = copy.deepcopy(model)
    going_on = Delegating(torch.optim.AdamW(other.parameters(), lr=0.1))
    tp.load_optimizer_state(other, going_on, state)
    assert going_on.param_groups[0]["slow_step"] == 3
    for number in (3, 4):
        step(model, optimizer, number)
        step(other, going_on, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tp.load_optimizer_state(other, torch.optim.AdamW(other.parameters()), state)


def test_a_wrapper_whose_inner_optimizer_refuses_is_put_back() -> None:
    model, optimizer = trained(lambda p: Delegating(Fussy(p, lr=0.1, momentum=0.9)))
    state = tp.optimizer_state(model, optimizer)
    step(model, optimizer)
    before = copied(optimizer.state_dict())
    with pytest.raises(MismatchError, match="Delegating refused the state"):
        tp.load_optimizer_state(model, optimizer, state)
    assert copied(optimizer.state_dict()) == before
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups


class Keeping(torch.optim.Optimizer):
    """A wrapper whose state_dict leaves out what the optimizer inside it keeps, as sharpness-aware ones do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        self.base_optimizer.step()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


def test_a_wrapper_that_keeps_state_to_itself_is_refused() -> None:
    model, optimizer = trained(Keeping)
    with pytest.raises(UnsupportedSource) as caught:
        tp.optimizer_state(model, optimizer)
    assert str(caught.value) == (
        "Sequential: The state_dict() of Keeping leaves out state of the SGD inside it: momentum_buffer. "
        "Pass the optimizer inside it."
    )
    state = tp.optimizer_state(model, optimizer.base_optimizer)
    fresh = Keeping(model.parameters())
    with pytest.raises(MismatchError, match=r"Keeping did not load momentum_buffer of '0\.weight'"):
        tp.load_optimizer_state(model, fresh, state)
    assert not fresh.state
    assert tp.load_optimizer_state(model, fresh.base_optimizer, state).complete


class Odd(torch.optim.SGD):
    answer: Any = None

    def state_dict(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (RuntimeError("gather it first"), "The state_dict() of Odd failed: gather it first"),
        ({"fast_state": {}}, "The state_dict() of Odd has no state by parameter. Its keys are fast_state"),
        ({"state": {}, "param_groups": []}, "The state_dict() of Odd and the optimizer have different groups"),
    ],
)
def test_a_state_dict_that_cannot_be_matched(answer: Any, message: str) -> None:
    model = net()
    optimizer = Odd(model.parameters(), lr=0.1)
    optimizer.answer = answer
    with pytest.raises(TorchParamsError) as caught:
        tp.optimizer_state(model, optimizer)
    assert message in str(caught.value)


def test_a_scheduler_is_no_optimizer() -> None:
    model, optimizer = trained(KINDS["SGD"])
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(UnsupportedSource, match=r"A StepLR is not an optimizer\. .* Pass its optimizer"):
        tp.optimizer_state(model, scheduler)


def test_what_a_state_dict_holds_beside_comes_back() -> None:
    class Beside(torch.optim.SGD):
        note = 0

        def state_dict(self) -> Any:
            return {**super().state_dict(), "note": self.note}

        def load_state_dict(self, state_dict: Any) -> None:
            self.note = state_dict["note"]
            super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})

    model, optimizer = trained(lambda p: Beside(p, lr=0.1))
    optimizer.note = 5
    state = tp.optimizer_state(model, optimizer)
    assert state.extra == {"note": 5}
    for x in (state, state.state_dict()):
        other = Beside(model.parameters(), lr=0.1)
        tp.load_optimizer_state(model, other, x)
        assert other.note == 5


# --- lists -----------------------------------------------------------------------------------------


def halves(model: nn.Sequential) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2])]


def test_a_list_of_optimizers() -> None:
    model = net()
    optimizers = halves(model)
    for number in range(3):
        for optimizer in optimizers:
            step(model, optimizer, number)
    state = tp.optimizer_state(model, optimizers)
    assert state.names == ["0.weight", "2.weight", "0.bias", "2.bias"]
    assert str(state).startswith("Muon, AdamW (2 groups)\n")
    assert "0.bias.exp_avg" in state
    for x in (state, state.state_dict(), list(reversed(state.parts)), [part.state_dict() for part in state.parts]):
        other = copy.deepcopy(model)
        going_on = list(reversed(halves(other)))
        found = tp.load_optimizer_state(other, going_on, x)
        assert found.complete
        assert len(found.loaded) == 4
        expected = copy.deepcopy(model)
        by_torch = halves(expected)
        for mine, theirs in zip(by_torch, optimizers, strict=True):
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for number in (3, 4):
            for optimizer in by_torch:
                step(expected, optimizer, number)
            for optimizer in reversed(going_on):
                step(other, optimizer, number)
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), other.parameters(), strict=True))


def test_one_optimizer_of_several() -> None:
    model = net()
    two = [torch.optim.Adam(model[0].parameters()), torch.optim.Adam(model[2].parameters())]
    for optimizer in two:
        step(model, optimizer)
    state = tp.optimizer_state(model, two)
    one = torch.optim.Adam(model.parameters())
    weight = model.get_parameter("2.weight")
    assert tp.load_optimizer_state(model, one, state).complete
    assert torch.equal(one.state[weight]["exp_avg"], two[1].state[weight]["exp_avg"])
    part = torch.optim.Adam(model[0].parameters())
    found = tp.load_optimizer_state(model, part, state, strict=("missing", "mismatched"))
    assert list(found.unexpected) == ["2.weight", "2.bias"]
    mixed = tp.optimizer_state(model, [two[0], torch.optim.SGD(model[2].parameters())])
    with pytest.raises(MismatchError, match="The parameters of one Adam were in several optimizers"):
        tp.load_optimizer_state(model, one, mixed)


def test_a_parameter_in_two_optimizers() -> None:
    model = net()
    two = [torch.optim.SGD(model.parameters()), torch.optim.SGD(model[0].parameters())]
    with pytest.raises(MismatchError, match=r"2 parameters are in two of the optimizers: 0\.weight, 0\.bias"):
        tp.optimizer_state(model, two)
    with pytest.raises(MismatchError, match=r"2 parameters are in two of the optimizers: 0\.weight, 0\.bias"):
        tp.load_optimizer_state(model, two, {"state": {}, "param_groups": []})
    for call in (tp.optimizer_state, lambda m, o: tp.load_optimizer_state(m, o, {"state": {}, "param_groups": []})):
        with pytest.raises(UnsupportedSource):
            call(model, [])
