"""Undoing a freeze, writing it down, and taking it along in copies."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchparams as tp
from freezable import OPTIMIZERS, digest, images, net, state, train
from torchparams.errors import MismatchError, TorchParamsError
from torchparams.train._statistics import StatisticsHold, hold_on
from torchparams.train.freeze import Frozen

if TYPE_CHECKING:
    import random
    from collections.abc import Callable


# --- surviving ----------------------------------------------------------------------------------


def test_it_survives_train_wherever_that_is_called() -> None:
    model = net()
    tp.freeze(model, "encoder.**")
    for part in (model, model.encoder, model.encoder[0], model.encoder[0].bn):
        part.train()
        assert not model.encoder[0].bn.training
        assert model.encoder[0].bn.train() is model.encoder[0].bn
        assert part.training is (part is not model.encoder[0].bn)
    assert model.encoder[0].bn.track_running_stats
    assert model.encoder[0].drop.training
    with pytest.raises(ValueError, match="boolean"):
        model.encoder[0].bn.train("yes")


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies_and_pickles_are_frozen_too(duplicate: Callable[[nn.Module], Any]) -> None:
    model = net()
    frozen = tp.freeze(model, "encoder.**")
    other = duplicate(model)
    other.train()
    held = hold_on(other.encoder[0].bn)
    assert held is not None and held.module is other.encoder[0].bn
    assert not other.encoder[0].bn.training and other.encoder[0].drop.training
    frozen.undo()
    assert not other.train().encoder[0].bn.training  # each has its own
    assert tp.unfreeze(other, "encoder.**").statistics == frozen.statistics
    assert other.encoder[0].bn.training


def test_state_dict_and_repr_are_as_ever() -> None:
    model = net()
    before = repr(model), list(model.state_dict())
    tp.freeze(model)
    assert (repr(model), list(model.state_dict())) == before


def test_compiled_functional_and_scripted() -> None:
    model = net()
    model.encoder[0].drop.p = model.encoder[1].drop.p = 0.0
    tp.freeze(model, "encoder.**")
    model.train()
    copied = copy.deepcopy(model)
    x_BCHW = images()
    expected = model(x_BCHW)
    compiled: Any = torch.compile(copied, backend="eager", fullgraph=True)
    before = digest(copied.encoder)
    compiled.train()
    assert torch.allclose(compiled(x_BCHW), expected)
    assert digest(copied.encoder) == before
    assert tp.freeze(compiled, "head.**").statistics == ("head.1",)
    called = torch.func.functional_call(model, dict(model.named_parameters()), (x_BCHW,))
    assert torch.allclose(called, expected)


def test_a_module_is_not_kept_alive() -> None:
    model = net()
    frozen = tp.freeze(model)
    gone = weakref.ref(model.encoder[0].bn)
    del model, frozen
    gc.collect()
    assert gone() is None


def test_a_train_of_the_instance_comes_back() -> None:
    layer: Any = nn.BatchNorm1d(3)
    modes = []

    def own(mode: bool = True) -> None:
        modes.append(mode)
        nn.Module.train(layer, mode)

    layer.train = own
    frozen = tp.freeze(layer)
    layer.train()
    assert (layer.training, modes) == (False, [True])
    frozen.undo()
    assert layer.train is own and layer.training


# --- undo ---------------------------------------------------------------------------------------


def test_undo_restores_every_flag_mode_and_gradient() -> None:
    model = net()
    model.encoder[1].bn.eval()
    model.encoder[0].conv.bias.requires_grad_(False)
    train(model, OPTIMIZERS["sgd"](model.parameters()), 1)
    model.encoder[1].bn.eval()
    before = state(model)
    frozen = tp.freeze(model)
    assert state(model) != before
    frozen.undo()
    assert state(model) == before
    frozen.undo()
    assert state(model) == before

    def fails() -> None:
        with tp.freeze(model, "encoder.**") as inner:
            assert isinstance(inner, Frozen)
            model.train()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    model.encoder[1].bn.eval()
    assert state(model) == before


def test_a_failure_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = state(model)
    done = itertools.count()

    def fails(hold: StatisticsHold) -> None:
        if next(done) == 2:
            raise KeyboardInterrupt
        original(hold)

    original = StatisticsHold.place
    monkeypatch.setattr(StatisticsHold, "place", fails)
    with pytest.raises(KeyboardInterrupt):
        tp.freeze(model)
    assert state(model) == before


def test_a_mode_that_was_set_meanwhile_is_not_forgotten() -> None:
    model = net()
    with tp.freeze(model, "encoder.**"):
        model.eval()
    assert not model.encoder[0].bn.training
    with tp.freeze(model, "encoder.**"):
        model.train()
    assert model.encoder[0].bn.training


def test_gradients_that_came_meanwhile() -> None:
    layer: Any = nn.Linear(2, 2)
    layer.weight.grad, layer.bias.grad = torch.ones(2, 2), torch.ones(2)
    old = layer.bias.grad
    frozen = tp.freeze(layer)
    new = layer.weight.grad = torch.zeros(2, 2)
    frozen.undo()
    assert layer.weight.grad is new and layer.bias.grad is old
    frozen = tp.freeze(layer)
    layer.double()
    frozen.undo()
    assert layer.weight.grad is None  # it no longer fits


def test_gradients_that_came_while_it_was_unfrozen() -> None:
    layer: Any = nn.Linear(2, 2)
    tp.freeze(layer)
    change = tp.unfreeze(layer, "bias")
    layer.bias.grad = torch.ones(2)
    change.undo()
    assert layer.bias.grad is None  # left over, it would move a frozen parameter


def test_several_freezes_are_undone_each_by_itself() -> None:
    model = net()
    before = state(model)
    first = tp.freeze(model, "encoder.**")
    second = tp.freeze(model, "**")
    assert second.changed == ("head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias")
    first.undo()
    assert tp.of(model).select(":frozen").names == list(second.changed)
    second.undo()
    assert state(model) == before


def test_undo_after_something_else_has_unfrozen() -> None:
    model = net()
    before = state(model)
    frozen = tp.freeze(model, "head.**")
    tp.unfreeze(model, "head.**")
    frozen.undo()
    assert state(model) == before


def test_unfreeze_and_its_undo() -> None:
    model = net()
    tp.freeze(model)
    before = state(model)
    with tp.unfreeze(model, "head.**") as change:
        assert change.names == ("head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias")
        assert change.statistics == ("head.1",)
        assert model.head[1].training and model.head[1].weight.requires_grad
        assert not model.encoder[0].bn.training
        model(images()).sum().backward()
    assert state(model) == before
    assert not model.train().head[1].training
    assert tp.unfreeze(model, "encoder.0.bn.weight").statistics == ("encoder.0.bn",)


SELECTORS = (None, "encoder.**", "head.**", "encoder.0.**", "**.bias", "**.bn.*")


@given(calls=st.lists(st.tuples(st.booleans(), st.sampled_from(SELECTORS)), min_size=2, max_size=5), order=st.randoms())
@settings(max_examples=40, deadline=None)
def test_undoing_in_any_order_that_is_allowed_leads_back(
    calls: list[tuple[bool, str | None]], order: random.Random
) -> None:
    model = net()
    model.encoder[0].conv.bias.requires_grad_(False)
    train(model, OPTIMIZERS["sgd"](model.parameters()), 1)
    kept = tp.freeze(model, "encoder.1.**")  # never undone
    before = state(model)
    changes: list[Any] = []
    for freezes, selector in calls:
        changes.append(tp.freeze(model, selector) if freezes else tp.unfreeze(model, selector))
    order.shuffle(changes)
    while changes:  # those that are refused now are tried again later
        left = []
        for change in changes:
            now = state(model)
            try:
                change.undo()
            except TorchParamsError:
                assert state(model) == now
                left.append(change)
        assert len(left) < len(changes)
        changes = left
    assert state(model) == before
    assert kept.changed


def test_undoing_before_a_later_change_of_the_same_is_refused() -> None:
    model = net()
    before = state(model)
    frozen = tp.freeze(model)
    unfrozen = tp.unfreeze(model, "head.1.*")
    now = state(model)
    with pytest.raises(TorchParamsError) as caught:
        frozen.undo()
    assert str(caught.value) == (
        "Net: A later unfreeze changed some of the same parameters or layers and is still in effect. Nothing was "
        "changed. Undo the later change first."
    )
    assert state(model) == now
    again = tp.freeze(model, "head.1.*")
    with pytest.raises(TorchParamsError, match="A later freeze"):
        unfrozen.undo()
    for change in (again, unfrozen, frozen):
        change.undo()
    assert state(model) == before


# --- writing it down ----------------------------------------------------------------------------


def test_a_record_freezes_a_fresh_model() -> None:
    frozen = tp.freeze(net(), "encoder.** | head.1.weight")
    data = json.loads(json.dumps(frozen.to_json()))
    fresh = net()
    again = Frozen.from_json(data).apply(nn.DataParallel(fresh))
    assert again.names == frozen.names
    assert again.statistics == frozen.statistics
    assert Frozen.of(fresh).to_json() == {**again.to_json(), "changed": [], "moving": []}
    again.undo()
    assert state(fresh)[1] == state(net())[1]
    shown = str(Frozen.from_json(data)).split("\n")
    assert shown[:2] == ["13 tensors to freeze; apply(model) freezes them", "name"]
    assert shown[-1].startswith("running statistics to stop in ")


def test_frozen_by_hand_is_written_down_too() -> None:
    model = net()
    model.encoder[0].conv.requires_grad_(False)
    tp.freeze(model, "head.1.*")
    found = Frozen.of(model)
    assert found.names == ("encoder.0.conv.weight", "encoder.0.conv.bias", "head.1.weight", "head.1.bias")
    assert found.statistics == ("head.1",)
    assert str(found).split("\n")[0] == "Net: 4 frozen tensors"


def test_a_record_of_another_model() -> None:
    data = tp.freeze(net(), "head.**").to_json()
    other = nn.ModuleDict({"head": nn.Sequential(nn.Conv2d(3, 2, 1))})
    with pytest.raises(MismatchError) as caught:
        Frozen.from_json(data).apply(other)
    assert str(caught.value) == (
        "ModuleDict: 2 of 4 frozen parameters are not in this model: head.1.weight, head.1.bias. The nearest to "
        "'head.1.weight' is 'head.0.weight'. Freeze by a selector, or remove the missing names."
    )
    other = nn.ModuleDict({"head": nn.Sequential(nn.Conv2d(3, 2, 1), nn.GroupNorm(2, 2))})
    with pytest.raises(MismatchError) as caught:
        Frozen.from_json(data).apply(other)
    assert str(caught.value) == (
        "ModuleDict: 1 of 1 frozen layers are not in this model: head.1. Freeze by a selector, or remove the "
        "missing names."
    )
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(MismatchError) as caught:
        Frozen.from_json({"names": [1]})
    assert str(caught.value) == (
        "This is not a saved Frozen. A saved Frozen has the lists 'names' and 'statistics'. Pass the result of "
        "Frozen.to_json()."
    )


def test_a_record_of_the_layer_itself_and_of_a_tied_model() -> None:
    frozen = tp.freeze(nn.BatchNorm1d(3))
    assert frozen.statistics == ("",)
    assert "running statistics stopped in 1 layer: the model itself" in str(frozen)
    assert Frozen.from_json(frozen.to_json()).apply(nn.BatchNorm1d(3)).statistics == ("",)
    tied: Any = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    data = tp.freeze(tied, "b.weight").to_json()
    tied["b"].weight = tied["a"].weight
    assert Frozen.from_json(data).apply(tied).names == ("a.weight",)
