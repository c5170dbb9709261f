"""Loading optimizer states by name: what is loaded, what raises, and what is never guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import MismatchError, UnsupportedSource, nearest
from torchparams.train import optimizer_load


def net(*names: str, width: int = 2) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})


def stepped(model: nn.ModuleDict, make: Any = torch.optim.Adam, **options: Any) -> torch.optim.Optimizer:
    """An optimizer after one step; gradients tell The parameters apart."""
    optimizer: torch.optim.Optimizer = make(model.parameters(), **{"lr": 0.1, **options})
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    optimizer.step()
    return optimizer


def moment(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, name: str) -> float:
    """The first element of the first moment."""
    return round(float(optimizer.state[model.get_parameter(f"{name}.weight")]["exp_avg"][0, 0]), 3)


def test_tensors_of_one_shape_never_swap() -> None:
    old = net("a", "b", "c")
    optimizer = stepped(old)
    new = net("c", "a", "b")
    other = torch.optim.Adam(new.parameters(), lr=0.5)
    tp.load_optimizer_state(new, other, tp.optimizer_state(old, optimizer))
    assert [moment(new, other, name) for name in "abc"] == [0.1, 0.2, 0.3]
    other.load_state_dict(optimizer.state_dict())  # which is what PyTorch does
    assert [moment(new, other, name) for name in "abc"] == [0.2, 0.3, 0.1]


def test_an_extended_model() -> None:
    old, new = net("a", "b"), net("new", "b", "a")
    other = torch.optim.Adam(new.parameters(), lr=0.5)
    state = tp.optimizer_state(old, stepped(old))
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(new, other, state)
    assert str(caught.value) == (
        "Adam state → Adam of ModuleDict: 1 missing: 'new.weight'. 2 tensors fit, and nothing was changed. "
        "strict=False loads what fits."
    )
    assert not other.state
    found = tp.load_optimizer_state(new, other, state, strict=("unexpected", "mismatched"))
    assert list(found.missing) == ["new.weight"]
    assert [moment(new, other, name) for name in "ab"] == [0.1, 0.2]
    assert new.get_parameter("new.weight") not in other.state
    for parameter in new.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.step()
    assert float(other.state[new.get_parameter("new.weight")]["step"]) == 1
    assert float(other.state[new.get_parameter("a.weight")]["step"]) == 2


def test_a_model_that_is_partly_frozen() -> None:
    old, new = net("a", "b", "gone"), net("a", "b")
    state = tp.optimizer_state(old, stepped(old))
    new["a"].requires_grad_(False)
    other = torch.optim.Adam([p for p in new.parameters() if p.requires_grad], lr=0.5)
    found = tp.load_optimizer_state(new, other, state, strict=False)
    assert list(found.loaded) == ["b.weight"]
    assert {name: item.note for name, item in found.unexpected.items()} == {
        "a.weight": "frozen, and in no group",
        "gone.weight": "",
    }
    assert moment(new, other, "b") == 0.2


def test_parameters_that_nothing_is_loaded_for_keep_their_state() -> None:
    model = net("a", "b")
    optimizer = stepped(model)
    part = net("a")
    state = tp.optimizer_state(part, stepped(part))
    state.state["a.weight"]["exp_avg"].fill_(9)
    tp.load_optimizer_state(model, optimizer, state, strict=False)
    assert [moment(model, optimizer, name) for name in "ab"] == [9, 0.2]


def test_a_parameter_without_saved_state_begins_anew() -> None:
    old = net("a", "b")
    saved = torch.optim.Adam(old.parameters())
    old.get_parameter("a.weight").grad = torch.ones(2, 2)
    saved.step()
    new = net("b", "a")
    optimizer = stepped(new)
    found = tp.load_optimizer_state(new, optimizer, tp.optimizer_state(old, saved))
    assert list(found.loaded) == ["b.weight", "a.weight"]
    assert new.get_parameter("b.weight") not in optimizer.state
    assert moment(new, optimizer, "a") == 0.1


def test_other_shapes_are_mismatches() -> None:
    old, new = net("a", "b"), net("a", "b")
    new["a"] = nn.Linear(2, 3, bias=False)
    state = tp.optimizer_state(old, stepped(old))
    for x in (state, {"state": state.state, "param_groups": state.groups}):
        other = torch.optim.Adam(new.parameters(), lr=0.5)
        found = tp.load_optimizer_state(new, other, x, strict=False)
        assert list(found.loaded) == ["b.weight"]
        note = "saved for shape [2, 2], not [3, 2]" if x is state else "its exp_avg is of shape [2, 2], not [3, 2]"
        assert found.mismatched["a.weight"].note == note


def test_what_an_option_needs_must_have_been_saved() -> None:
    model = net("a")
    state = tp.optimizer_state(model, stepped(model))
    other = torch.optim.Adam(model.parameters(), amsgrad=True)
    with pytest.raises(MismatchError, match="saved without amsgrad, which needs max_exp_avg_sq"):
        tp.load_optimizer_state(model, other, state)
    tp.load_optimizer_state(model, other, state, options=True)
    assert other.param_groups[0]["amsgrad"] is False
    plain = tp.optimizer_state(model, stepped(model, torch.optim.SGD))
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert tp.load_optimizer_state(model, momentum, plain).complete
    momentum.step()


def test_loading_nothing_is_never_meant() -> None:
    old, new = net("a"), net("b")
    state = tp.optimizer_state(old, stepped(old))
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(new, torch.optim.Adam(new.parameters()), state, strict=False)
    assert str(caught.value) == (
        "Adam state → Adam of ModuleDict: None of the state fits the optimizer. It is of a.weight; the optimizer has "
        'b.weight. rename="auto" finds the prefixes that wrappers add.'
    )


def test_loaded_state_shares_no_memory_with_what_was_saved() -> None:
    model = net("a")
    state = tp.optimizer_state(model, stepped(model))
    other = torch.optim.Adam(model.parameters())
    tp.load_optimizer_state(model, other, state)
    other.state[model.get_parameter("a.weight")]["exp_avg"].fill_(7)
    assert float(state["a.weight.exp_avg"][0, 0]) == pytest.approx(0.1)


def test_another_kind_of_optimizer_is_refused() -> None:
    model = net("a")
    state = tp.optimizer_state(model, stepped(model))
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(model, torch.optim.SGD(model.parameters()), state, strict=False)
    assert str(caught.value) == (
        "The state is from torch.optim.adam.Adam, and the optimizer is a torch.optim.sgd.SGD. "
        "Start without the saved state: the two kinds are incompatible."
    )
    assert tp.load_optimizer_state(model, torch.optim.AdamW(model.parameters()), state).complete


# --- options ---------------------------------------------------------------------------------------


def grouped_optimizer(model: nn.ModuleDict, *parts: tuple[str, float]) -> torch.optim.Optimizer:
    groups = [{"params": [model.get_parameter(f"{n}.weight") for n in names], "lr": lr} for names, lr in parts]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def test_options_are_restored_only_when_asked_for() -> None:
    model = net("a", "b", "c")
    state = tp.optimizer_state(model, grouped_optimizer(model, ("ab", 0.1), ("c", 0.2)))
    other = grouped_optimizer(model, ("c", 0.7), ("a", 0.8), ("b", 0.9))
    tp.load_optimizer_state(model, other, state)
    assert [group["lr"] for group in other.param_groups] == [0.7, 0.8, 0.9]
    tp.load_optimizer_state(model, other, state, options=True)
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1, 0.1]
    mixed = grouped_optimizer(model, ("ac", 0.7), ("b", 0.9))
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(model, mixed, state, options=True)
    assert str(caught.value) == (
        "The parameters of group 0 were in the groups 0 and 1, whose lr was 0.1 and 0.2. "
        "Group the parameters as they were, or leave options out and set them."
    )


# --- what PyTorch saves ----------------------------------------------------------------------------


def test_an_optimizers_own_state_dict_with_names() -> None:
    old, new = net("a", "b"), net("b", "a")
    optimizer = torch.optim.Adam(list(old.named_parameters()), lr=0.1)
    for i, parameter in enumerate(old.parameters()):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    optimizer.step()
    other = torch.optim.Adam(new.named_parameters(), lr=0.1)
    found = tp.load_optimizer_state(new, other, optimizer.state_dict())
    assert found.source == "optimizer state"
    assert [moment(new, other, name) for name in "ab"] == [0.1, 0.2]
    assert other.param_groups[0]["param_names"] == ["b.weight", "a.weight"]


def test_names_by_position_are_never_guessed() -> None:
    old, new = net("a", "b"), net("b", "a")
    saved = stepped(old).state_dict()
    other = torch.optim.Adam(new.parameters())
    with pytest.raises(UnsupportedSource) as caught:
        tp.load_optimizer_state(new, other, saved)
    assert str(caught.value) == (
        "The state identifies its parameters by position and has no names. "
        "Pass names=, the names of the parameters in the optimizer's order: "
        "list(dict(model.named_parameters())) of the original model, if the optimizer got model.parameters()."
    )
    tp.load_optimizer_state(new, other, saved, names=["a.weight", "b.weight"])
    assert [moment(new, other, name) for name in "ab"] == [0.1, 0.2]
    with pytest.raises(MismatchError, match="There are 1 name for 2 parameters"):
        tp.load_optimizer_state(new, other, saved, names=["a.weight"])


def test_lbfgs_by_position() -> None:
    old, new = net("a", "b"), net("b", "a")
    optimizer = torch.optim.LBFGS(old.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        a, b = old.parameters()
        loss = (a**2).sum() + ((b - 3) ** 4).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own omission
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call, unused-ignore]  # torch's own omission
    other = torch.optim.LBFGS(new.parameters())
    tp.load_optimizer_state(new, other, optimizer.state_dict(), names=["a.weight", "b.weight"])
    flat = optimizer.state[old.get_parameter("a.weight")]
    mine = other.state[new.get_parameter("b.weight")]
    assert torch.equal(mine["d"], torch.cat([flat["d"][4:], flat["d"][:4]]))
    assert mine["n_iter"] == flat["n_iter"]
    assert set(mine) == set(flat)
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(new, other, optimizer.state_dict(), names=["a.weight", "x.weight"])
    assert str(caught.value) == (
        "LBFGS keeps vectors over all its parameters, and the model lacks some of them. It lacks x.weight. "
        "Save torchparams.optimizer_state(model, optimizer).state_dict(), which splits them by name."
    )
    more = net("a", "b", "c")
    with pytest.raises(MismatchError) as caught:
        tp.load_optimizer_state(
            more, torch.optim.LBFGS(more.parameters()), tp.optimizer_state(old, optimizer), strict=False
        )
    assert str(caught.value) == (
        "LBFGS state → LBFGS of ModuleDict: LBFGS keeps one state for all parameters together, and the parameters "
        "differ. c.weight differ. Start without the saved state."
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            {"optimizer": {"state": {}, "param_groups": []}, "epoch": 1},
            "A dict is not an optimizer state. A state is an OptimizerState, or a state_dict with the keys state and "
            "param_groups. Pass what is under 'optimizer' in it.",
        ),
        (
            torch.optim.SGD([nn.Parameter(torch.zeros(1))]),
            "A SGD is not an optimizer state. A state is an OptimizerState, or a state_dict with the keys state and "
            "param_groups. Pass its state_dict().",
        ),
    ],
)
def test_what_is_no_state(x: Any, message: str) -> None:
    model = net("a")
    with pytest.raises(UnsupportedSource) as caught:
        tp.load_optimizer_state(model, torch.optim.SGD(model.parameters()), x)
    assert str(caught.value) == message


# --- names -----------------------------------------------------------------------------------------


def test_names_of_a_wrapped_model() -> None:
    plain = net("a", "b")
    wrapped = nn.DataParallel(net("a", "b"))
    inner = wrapped.module
    assert isinstance(inner, nn.ModuleDict)
    optimizer = torch.optim.Adam(wrapped.named_parameters(), lr=0.1)
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"][0] == "module.a.weight"
    again = torch.optim.Adam(wrapped.parameters())
    assert tp.load_optimizer_state(wrapped, again, saved).complete
    other = torch.optim.Adam(plain.parameters())
    with pytest.raises(MismatchError, match=r"2 missing: 'a\.weight' \(perhaps 'module\.a\.weight'\)"):
        tp.load_optimizer_state(plain, other, saved)
    for rename in ("auto", r"^module\.="):
        assert tp.load_optimizer_state(plain, other, saved, rename=rename).complete
    assert moment(plain, other, "a") == 0.1


def test_work_grows_with_the_count_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return nearest(*arguments)

    monkeypatch.setattr(optimizer_load, "nearest", counted)
    old = nn.ParameterDict({f"p{i}": torch.zeros(1) for i in range(300)})
    new = nn.ParameterDict({f"{'q' if i else 'p'}{i}": torch.zeros(1) for i in range(300)})
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    found = tp.load_optimizer_state(
        new, torch.optim.SGD(new.parameters(), lr=0.1), tp.optimizer_state(old, optimizer), strict=False
    )
    assert len(found.missing) == len(found.unexpected) == 299
    assert calls <= 32
