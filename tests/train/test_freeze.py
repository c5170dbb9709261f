from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

import torchparams as tp
from freezable import OPTIMIZERS, digest, net, train
from torchparams.errors import NoMatch, TorchParamsError, UnsupportedSource
from torchparams.train._statistics import _Around, has_running_statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


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
