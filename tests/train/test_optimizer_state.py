"""Optimizer state by name: contents, and continued training with the same bits."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp
from optimizers import OPTIMIZERS, Complex, Net, step, trained
from torchparams.errors import MismatchError, UnsupportedSource


def saved_and_read(what: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_in_another_order_as_if_nothing_had_happened(kind: str) -> None:
    make = OPTIMIZERS[kind]
    torch.manual_seed(0)
    model = Net()
    optimizer = trained(model, make)
    other = Net(reverse=True)
    other.load_state_dict(model.state_dict())
    assert [name for name, _ in other.named_parameters()] != [name for name, _ in model.named_parameters()]
    going_on = make(other.parameters())
    state = saved_and_read(tp.optimizer_state(model, optimizer).state_dict())
    found = tp.load_optimizer_state(other, going_on, state)
    assert sorted(found.loaded) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert found.complete
    for number in range(5, 9):
        step(model, optimizer, number)
        step(other, going_on, number)
    values = other.state_dict()
    for name, value in model.state_dict().items():
        if kind == "LBFGS":  # sums over all parameters are made in another order
            torch.testing.assert_close(values[name], value)
        else:
            assert torch.equal(values[name], value), name


@pytest.mark.parametrize("kind", ["Adam", "LBFGS"])
def test_complex_parameters(kind: str) -> None:
    model = Complex()
    optimizer = trained(model, OPTIMIZERS[kind], 3)
    other = Complex(reverse=True)
    other.load_state_dict(model.state_dict())
    going_on = OPTIMIZERS[kind](other.parameters())
    tp.load_optimizer_state(other, going_on, tp.optimizer_state(model, optimizer))
    step(model, optimizer, 7)
    step(other, going_on, 7)
    torch.testing.assert_close(other.a, model.a)
    torch.testing.assert_close(other.b, model.b)


def test_sparse_adam() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(4, 2, sparse=True), "b": nn.Embedding(4, 2, sparse=True)})
    optimizer: Any = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    (model["a"](torch.tensor([1])).sum() + 2 * model["b"](torch.tensor([2])).sum()).backward()
    optimizer.step()
    other = torch.optim.SparseAdam(reversed(list(model.parameters())), lr=0.1)
    tp.load_optimizer_state(model, other, tp.optimizer_state(model, optimizer))
    for parameter in model.parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_muon_where_torch_has_it() -> None:
    if not hasattr(torch.optim, "Muon"):
        return
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    optimizer: Any = torch.optim.Muon(model.parameters(), lr=0.1)
    (model["a"](torch.ones(1, 3)) + 2 * model["b"](torch.ones(1, 3))).sum().backward()
    optimizer.step()
    other = torch.optim.Muon(reversed(list(model.parameters())), lr=0.1)
    tp.load_optimizer_state(model, other, tp.optimizer_state(model, optimizer))
    for parameter in model.parameters():
        assert torch.equal(other.state[parameter]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])


# --- the object ------------------------------------------------------------------------------------


def test_it_is_a_mapping_of_tensors_that_every_report_takes() -> None:
    model = Net()
    optimizer = trained(model, OPTIMIZERS["AdamW"])
    state = tp.optimizer_state(model, optimizer)
    assert list(state)[:3] == ["a.weight.step", "a.weight.exp_avg", "a.weight.exp_avg_sq"]
    assert len(state) == 12
    assert state["b.bias.exp_avg"] is optimizer.state[model.get_parameter("b.bias")]["exp_avg"]
    assert "a.weight.momentum" not in state
    with pytest.raises(KeyError):
        state["a.weight.exp_avg.0"]
    assert tp.of(state).select("**.exp_avg").names == [
        "a.weight.exp_avg",
        "a.bias.exp_avg",
        "b.weight.exp_avg",
        "b.bias.exp_avg",
    ]
    assert len(tp.stats(state, "**.exp_avg_sq").rows) == 4
    assert state.nbytes == sum(tensor.nbytes for tensor in state.values())
    assert state == state
    assert state != tp.optimizer_state(model, optimizer)
    assert len({state}) == 1


def test_it_prints_as_a_table() -> None:
    model = nn.Linear(2, 1)
    groups: list[dict[str, Any]] = [{"params": [model.bias], "lr": 0.5}, {"params": [model.weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    text = str(tp.optimizer_state(model, optimizer))
    assert text.startswith(
        "SGD (2 groups)\n"
        "parameter  group  state\n"
        "bias           0  momentum_buffer\n"
        "weight         1  momentum_buffer\n"
        "group 0: lr=0.5, momentum=0.9, dampening=0"
    )
    assert text.endswith("\n2 parameters · 2 tensors · 12 B")
    assert "<table>" in tp.optimizer_state(model, optimizer)._repr_html_()


def test_the_json_of_a_state() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = trained_linear(model)
    found = json.loads(json.dumps(tp.optimizer_state(model, optimizer).to_json()))
    assert found["optimizer"] == "torch.optim.sgd.SGD"
    assert found["parameters"] == [
        {
            "name": "weight",
            "group": 0,
            "shape": [1, 2],
            "state": {"momentum_buffer": {"shape": [1, 2], "dtype": "float32"}},
        }
    ]
    assert found["groups"][0]["lr"] == 0.1
    assert found["shared"] == {}


def trained_linear(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


def test_lbfgs_is_cut_by_name() -> None:
    model = Net()
    optimizer = trained(model, OPTIMIZERS["LBFGS"])
    state = tp.optimizer_state(model, optimizer)
    assert state["b.weight.d"].shape == (3, 3)
    assert state["b.bias.old_dirs.0"].shape == (3,)
    assert {"func_evals", "n_iter", "ro", "H_diag"} <= set(state.shared)
    flat = optimizer.state[model.get_parameter("a.weight")]["d"]
    assert torch.equal(torch.cat([state[f"{name}.d"].reshape(-1) for name in state.names]), flat)
    assert "of all together: " in str(state)


def test_names_are_canonical() -> None:
    model = nn.DataParallel(nn.Linear(2, 1))
    state = tp.optimizer_state(model, trained_linear(model))
    assert state.names == ["weight", "bias"]


def test_tensors_that_the_model_does_not_hold() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(3, 5)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    for call in (
        lambda: tp.optimizer_state(model, optimizer),
        lambda: tp.load_optimizer_state(model, optimizer, {"state": {}, "param_groups": []}),
    ):
        with pytest.raises(MismatchError) as caught:
            call()
        assert str(caught.value) == (
            "Linear: The optimizer holds 2 tensors that the model does not: the first is of shape [5, 3], in group 0. "
            "Pass the model that the optimizer was made of; if parameters were replaced since, make a new optimizer."
        )


def test_an_optimizer_that_has_not_stepped_has_no_state() -> None:
    model = Net()
    for make in OPTIMIZERS.values():
        optimizer = make(model.parameters())
        before = {id(p) for p in optimizer.state}
        state = tp.optimizer_state(model, optimizer)
        assert len(state.names) == 4
        assert {id(p) for p in optimizer.state} == before
        found = tp.load_optimizer_state(model, make(model.parameters()), state)
        assert found.complete


@pytest.mark.parametrize("given", [None, {"state": {}, "param_groups": []}])
def test_what_is_no_optimizer(given: Any) -> None:
    model = nn.Linear(2, 2)
    expected = (
        f"A {type(given).__name__} is not an optimizer. An optimizer has param_groups and a state. "
        "Pass the model, then the optimizer itself."
    )
    with pytest.raises(UnsupportedSource) as caught:
        tp.optimizer_state(model, given)
    assert str(caught.value) == expected
    with pytest.raises(UnsupportedSource) as caught:
        tp.load_optimizer_state(model, given, {"state": {}, "param_groups": []})
    assert str(caught.value) == expected
