from __future__ import annotations

import copy
import gc
import hashlib
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
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

import torchparams as tp
from torchparams.errors import MismatchError, NoMatch, TorchParamsError, UnsupportedSource
from torchparams.train._statistics import StatisticsHold, _Around, has_running_statistics, hold_on
from torchparams.train.freeze import Frozen

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Block(nn.Module):
    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3, affine=affine)
        self.inorm = nn.InstanceNorm2d(3, affine=affine, track_running_stats=True)
        self.drop = nn.Dropout(0.2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.drop(self.inorm(self.bn(self.conv(x_BCHW)))).relu()
        return out


class Net(nn.Module):
    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(affine), Block(affine))
        self.head = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.encoder(x_BCHW))
        return out


def net(affine: bool = True) -> Any:
    torch.manual_seed(0)
    return Net(affine)


def digest(*modules: nn.Module) -> str:
    """Of every parameter and buffer, bit by bit."""
    seen = hashlib.sha256()
    for module in modules:
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            seen.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return seen.hexdigest()


def state(model: nn.Module) -> list[Any]:
    """Every flag and mode, and the identity of every gradient."""
    return [
        [(name, p.requires_grad, id(p), id(p.grad)) for name, p in model.named_parameters()],
        [(name, m.training, "train" in vars(m)) for name, m in model.named_modules()],
        [getattr(m, "track_running_stats", None) for m in model.modules()],
    ]


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, set_to_none: bool = True) -> None:
    for _ in range(steps):
        model.train()
        optimizer.zero_grad(set_to_none=set_to_none)
        (model(images()) + 1).square().sum().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.1),
}


# --- what freezing is for ---------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_frozen_part_is_the_same_bit_by_bit_after_fifty_steps(
    name: str, set_to_none: bool, before: int, affine: bool
) -> None:
    model = net(affine)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, before, set_to_none)  # momentum, and gradients that are left over
    assert not before or model.encoder[0].conv.weight.grad is not None
    frozen = tp.freeze(model, "encoder.**")
    assert frozen.cleared == (12 if affine else 4) * bool(before)
    frozen_part, rest = digest(model.encoder), digest(model.head)
    train(model, optimizer, 50, set_to_none)
    assert digest(model.encoder) == frozen_part
    assert digest(model.head) != rest
    assert all(p.grad is None for p in model.encoder.parameters())


def test_without_it_all_three_traps_close() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, 1)
    model.encoder.requires_grad_(False)
    weight, mean = model.encoder[0].conv.weight.clone(), model.encoder[0].bn.running_mean.clone()
    optimizer.step()
    assert not torch.equal(model.encoder[0].conv.weight, weight)  # the gradient that is left over
    train(model, optimizer, 1)
    assert not torch.equal(model.encoder[0].bn.running_mean, mean)  # the statistics


def test_a_frozen_layer_uses_its_statistics() -> None:
    layer: Any = nn.BatchNorm1d(3)
    layer(torch.randn(8, 3) + 5)
    x_BC = torch.randn(4, 3)
    expected = copy.deepcopy(layer).eval()(x_BC)
    tp.freeze(layer)
    assert torch.equal(layer.train()(x_BC), expected)


# --- which statistics stop --------------------------------------------------------------------


def test_a_layer_stops_when_it_is_wholly_frozen() -> None:
    model = net()
    assert tp.freeze(model, "encoder.0.**").statistics == ("encoder.0.bn", "encoder.0.inorm")
    half = tp.freeze(model, "head.1.weight")
    assert (half.statistics, half.moving) == ((), ("head.1",))
    assert model.head[1].training
    rest = tp.freeze(model, "head.1.bias")
    assert (rest.statistics, rest.moving) == (("head.1",), ())


def test_a_layer_that_was_frozen_by_hand_is_not_touched_by_another_selection() -> None:
    model = net()
    model.head[1].requires_grad_(False)
    assert tp.freeze(model, "encoder.**").statistics == (
        "encoder.0.bn",
        "encoder.0.inorm",
        "encoder.1.bn",
        "encoder.1.inorm",
    )
    assert tp.freeze(model, "head.1.*").statistics == ("head.1",)


def test_a_layer_without_parameters_goes_with_the_nearest_module_that_has_some() -> None:
    model = net(affine=False)
    assert tp.freeze(model, "encoder.0.conv.weight").statistics == ()
    frozen = tp.freeze(model, "encoder.0.conv.bias")
    assert frozen.statistics == ("encoder.0.bn", "encoder.0.inorm")
    assert tp.freeze(model).statistics == (
        "encoder.0.bn",
        "encoder.0.inorm",
        "encoder.1.bn",
        "encoder.1.inorm",
        "head.1",
    )


def test_a_block_of_layers_without_parameters() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.ReLU()))
    assert tp.freeze(model, "0.bias").statistics == ()
    assert tp.freeze(model, "0.weight").statistics == ("1.0",)


def test_shared_and_circular_modules() -> None:
    shared = nn.Linear(3, 3)
    inside = nn.Sequential(shared, nn.BatchNorm1d(3, affine=False))
    model: Any = nn.ModuleDict({"a": shared, "b": inside, "c": inside})
    model["b"].add_module("up", model)
    assert tp.freeze(model, "a.weight").statistics == ()
    assert tp.freeze(model, "a.bias").statistics == ("b.1",)


def test_buffers_stand_for_the_statistics_of_their_layer() -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3))
    table = tp.of(model, buffers=True)
    frozen = tp.freeze(table, "**.running_mean[name!=2.**]")
    assert (frozen.names, frozen.statistics) == ((), ("0", "1"))
    assert [layer.training for layer in model.train()] == [False, False, True]
    assert all(p.requires_grad for p in model.parameters())
    assert tp.freeze(table, "2.*").names == ("2.weight", "2.bias")
    assert tp.unfreeze(table, "2.running_var").statistics == ("2",)
    frozen.undo()
    assert [layer.training for layer in model] == [True, True, True]


def test_statistics_may_go_on() -> None:
    model = net()
    frozen = tp.freeze(model, "encoder.**", statistics=False)
    assert (frozen.statistics, frozen.moving) == ((), ())
    assert model.encoder[0].bn.training


def test_what_has_running_statistics() -> None:
    class Own(nn.Module):
        running_var: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.ones(2))

    those: tuple[nn.Module, ...] = (nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm1d(), Own())
    assert all(map(has_running_statistics, those))
    assert has_running_statistics(nn.InstanceNorm1d(2, track_running_stats=True))
    for module in (
        nn.InstanceNorm1d(2),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.LayerNorm(2),
        nn.Linear(2, 2),
    ):
        assert not has_running_statistics(module)


def test_the_power_iteration_of_a_spectral_norm_stops() -> None:
    torch.manual_seed(0)
    new, old = parametrizations.spectral_norm(nn.Linear(4, 4)), old_spectral_norm(nn.Linear(4, 4))
    model: Any = nn.Sequential(new, nn.ReLU(), old, nn.Linear(4, 1))
    frozen = tp.freeze(model, "{0,2}.**")
    assert frozen.statistics == ("0.parametrizations.weight.0", "2")
    before = digest(new, old)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model.train()(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    assert digest(new, old) == before
    frozen.undo()
    model(torch.randn(3, 4))
    assert digest(new, old) != before


def test_a_layer_with_an_activation_inside() -> None:
    class BatchNormAct(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(3)
            self.drop = nn.Dropout(0.5)

    model: Any = nn.Sequential(BatchNormAct())
    tp.freeze(model)
    model.eval()
    model.train()
    assert (model[0].training, model[0].drop.training) == (False, True)


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


# --- kinds of parameters and of models ------------------------------------------------------------


def test_tied_parameters_count_once() -> None:
    model: Any = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    frozen = tp.freeze(model, "1.weight")
    assert (frozen.names, frozen.numel, frozen.trainable) == (("0.weight",), 15, 0)


def test_parametrised_modules() -> None:
    model: Any = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    frozen = tp.freeze(model, "0.**")
    assert "0.parametrizations.weight.original0" in frozen.names
    assert not model[0].weight.requires_grad


def test_lazy_parameters_stay_frozen_when_they_get_a_shape() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    frozen = tp.freeze(model)
    assert frozen.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert frozen.statistics == ("1",)
    model.train()(torch.randn(4, 2))
    assert not any(p.requires_grad for p in model.parameters())
    assert type(model[1]) is nn.BatchNorm1d and not model.train()[1].training
    frozen.undo()
    assert all(p.requires_grad for p in model.parameters()) and model[1].training


def test_integers() -> None:
    model: Any = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    frozen = tp.freeze(model)
    assert (frozen.names, frozen.changed) == (("weight", "bias"), ("bias",))
    change = tp.unfreeze(model)
    assert (change.names, change.cannot) == (("bias",), ("weight",))
    assert "no gradient is possible for 1 parameter: weight" in str(change)


def test_the_result_of_an_operation() -> None:
    model: Any = nn.Linear(2, 2)
    model._parameters["weight"] = model.bias * 2  # as some hypernetworks do
    with pytest.raises(TorchParamsError) as caught:
        tp.freeze(model)
    assert str(caught.value) == (
        "Linear: 'weight' is the result of an operation, and only leaf tensors can be frozen. "
        "Freeze the parameters that it is computed from."
    )
    assert model.bias.requires_grad


def test_what_is_no_live_model() -> None:
    with pytest.raises(UnsupportedSource) as caught:
        tp.freeze({"w": torch.zeros(2)})
    assert str(caught.value) == (
        "dict: torchparams.freeze needs a live model, not a mapping. Pass the nn.Module, or a Parameters of it."
    )


def test_strictness_and_selections() -> None:
    model = net()
    with pytest.raises(NoMatch):
        tp.freeze(model, "encoder.** | decoder.**")
    with pytest.raises(NoMatch):
        tp.freeze(tp.of(model).select("head.**"), "encoder.**")
    assert all(p.requires_grad for p in model.parameters())
    assert tp.freeze(tp.of(model).select("head.**"), "**.bias").names == ("head.0.bias", "head.1.bias")
    assert tp.freeze(tp.of(model).select("head.**")).names[:2] == ("head.0.weight", "head.0.bias")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_modules() -> None:
    scripted: Any = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    before = scripted.state_dict()["1.running_mean"].clone()
    frozen = tp.freeze(scripted)
    scripted.train()(torch.randn(4, 3))
    assert frozen.statistics == ("1",) and torch.equal(scripted.state_dict()["1.running_mean"], before)
    frozen.undo()
    scripted(torch.randn(4, 3))
    assert not torch.equal(scripted.state_dict()["1.running_mean"], before)


def test_names_without_wrappers() -> None:
    model: Any = nn.DataParallel(net())
    frozen = tp.freeze(model, "encoder.0.**")
    assert frozen.statistics == ("encoder.0.bn", "encoder.0.inorm")
    assert frozen.names[0] == "encoder.0.conv.weight"


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'r'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_model() -> None:
    model = net()
    tp.freeze(model, "encoder.**")
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = digest(model.encoder)
    train(wrapped, OPTIMIZERS["sgd"](wrapped.parameters()), 3)
    assert digest(model.encoder) == before
    assert "DistributedDataParallel still waits" in str(tp.freeze(wrapped, "head.0.*"))


# --- what is printed --------------------------------------------------------------------------------


def test_the_report() -> None:
    model = net()
    train(model, OPTIMIZERS["sgd"](model.parameters()), 1)
    model.encoder[0].conv.weight.requires_grad_(False)
    frozen = tp.freeze(model, "encoder.0.** | head.1.weight")
    assert str(frozen) == (
        "Net: froze 7 tensors, 1 of them frozen before\n"
        "name                    shape         numel  before\n"
        "encoder.0.conv.weight   [3, 3, 1, 1]      9  frozen\n"
        "encoder.0.conv.bias     [3]               3  trainable\n"
        "encoder.0.bn.weight     [3]               3  trainable\n"
        "encoder.0.bn.bias       [3]               3  trainable\n"
        "encoder.0.inorm.weight  [3]               3  trainable\n"
        "encoder.0.inorm.bias    [3]               3  trainable\n"
        "head.1.weight           [2]               2  trainable\n"
        "running statistics stopped in 2 layers: encoder.0.bn, encoder.0.inorm\n"
        "running statistics go on in 1 layer that is half frozen: head.1\n"
        "cleared 7 left-over gradients\n"
        "34 of 60 parameters are trainable, 56.7%"
    )
    assert frozen._repr_html_().startswith('<p style="font-weight:bold">Net: froze 7 tensors')
    assert frozen.to_json()["trainable"] == 34
    many = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(30)])
    text = str(tp.freeze(many))
    assert "… 20 more parameters …" in text
    assert "stopped in 30 layers: 0, 1, 2 and 27 more" in text


def test_each_module_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    original = _Around.add

    def counted(self: _Around, module: nn.Module, chosen: set[int]) -> None:
        looked_at.append(id(module))
        original(self, module, chosen)

    monkeypatch.setattr(_Around, "add", counted)
    model = nn.Sequential(*[nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)) for _ in range(50)])
    assert len(tp.freeze(model).statistics) == 50
    assert len(looked_at) == len(set(looked_at))
    assert set(looked_at) <= set(map(id, model.modules()))


def lbfgs_steps(model: Any, optimizer: Any, times: int) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).pow(2).mean()
        loss.backward()
        return loss

    for _ in range(times):
        optimizer.step(closure)


@pytest.mark.parametrize("anew", [True, False])
def test_lbfgs_has_to_be_made_anew(anew: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    lbfgs_steps(model, optimizer, 2)
    tp.freeze(model, "0.**")
    before = digest(model[0])
    if anew:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    lbfgs_steps(model, optimizer, 3)
    assert (digest(model[0]) == before) is anew  # its directions move the frozen, which have no gradient


@pytest.mark.parametrize("nothing", [[], (), set()])
def test_an_empty_selection_is_not_everything(nothing: Any) -> None:
    model = net()
    uses: list[Callable[[], object]] = [
        lambda: tp.freeze(model, nothing),
        lambda: tp.unfreeze(model, nothing),
        lambda: tp.apply_(model, nothing, nn.init.zeros_),
        lambda: tp.init(model, (nothing, nn.init.zeros_)),
        lambda: tp.groups(model, tp.rule(nothing, lr=1.0), lr=0.1),
        lambda: tp.penalty(model, nothing),
        lambda: tp.load(model, net(), nothing),
    ]
    before = digest(model)
    for use in uses:
        with pytest.raises(NoMatch) as error:
            use()
        assert str(error.value) == "Net: The list of names is empty. Use `**` to select every parameter."
    assert digest(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    none = tp.of(model).select("head.9.*", strict=False)
    assert tp.freeze(none).names == tp.apply_(none, None, nn.init.zeros_).names == ()
