from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import MismatchError, NoMatch, NotReadable, OptionError


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "function", [lambda w: w * 2, lambda w: w.mul_(2), lambda w: w.data.mul_(2), partial(torch.mul, other=2)]
)
def test_in_place_or_by_return(function: Any) -> None:
    model = net()
    before = {name: (p, p.data_ptr(), p._version, p.detach().clone()) for name, p in model.named_parameters()}
    applied = tp.apply_(model, "{0,2}.weight", function)
    assert applied.names == ("0.weight", "2.weight")
    for name, parameter in model.named_parameters():
        same, address, version, values = before[name]
        assert parameter is same and parameter.data_ptr() == address and parameter.requires_grad
        assert torch.equal(parameter, values * 2 if name in applied.names else values)
        assert name in applied.names or parameter._version == version


def test_autograd_notices() -> None:
    model: Any = nn.Linear(2, 2)
    loss: Any = (model.weight * model.weight).sum()
    tp.apply_(model, "weight", lambda w: w.zero_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_returned_is_in_place() -> None:
    def halve(weight: torch.Tensor) -> None:
        weight *= 0.5

    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    tp.apply_(model, "weight", halve)
    assert model.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("function", [None, "**.bias"])
def test_what_is_no_function(function: Any) -> None:
    with pytest.raises(OptionError) as error:
        tp.apply_(nn.Linear(2, 2), torch.nn.init.zeros_, function)
    assert str(error.value) == (f"{function!r} is not a function. Call torchparams.apply_(model, selector, function).")


def test_tied_once_and_buffers_where_they_are_listed() -> None:
    tied: Any = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    nn.init.ones_(tied["a"].weight)
    assert tp.apply_(tied, "**.weight", lambda w: w + 1).names == ("a.weight",)
    assert tied["b"].weight[0, 0] == 2
    model = net()
    with pytest.raises(NoMatch):
        tp.apply_(model, "**.running_mean", torch.zero_)
    tp.apply_(tp.of(model, buffers=True), "**.running_mean", lambda m: m + 3)
    assert model[1].running_mean.tolist() == [3, 3, 3, 3]


def test_what_a_function_may_not_return() -> None:
    model = net()
    with pytest.raises(OptionError) as caught:
        tp.apply_(model, "0.bias", len)
    assert str(caught.value) == (
        "The function len returned 4 for 0.bias. Change the tensor in place, or return a tensor of new values."
    )
    with pytest.raises(MismatchError) as mismatch:
        tp.apply_(model, "0.bias", torch.sum)
    assert str(mismatch.value) == "The function sum returned the shape [] for 0.bias. Its shape is [4]."


def test_an_error_says_where() -> None:
    with pytest.raises(ValueError, match="Fan in and fan out") as caught:
        tp.apply_(net(), "0.bias", nn.init.kaiming_normal_)
    assert caught.value.__notes__ == ["torchparams.apply_: at 0.bias, [4]; nothing was changed"]


@pytest.mark.parametrize("how", ["raises", "returns a number", "returns another shape", "is stopped"])
def test_what_was_changed_before_an_error_is_put_back(how: str) -> None:
    model = net()
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}

    def function(weight: torch.Tensor) -> Any:
        weight.zero_()
        if weight.shape == (4, 3):  # other memory and other strides
            weight.data = torch.zeros(3, 4).t()
        if weight.shape != (2, 4):
            return None
        if how == "raises":
            raise ValueError(how)
        if how == "is stopped":
            raise KeyboardInterrupt
        return 1 if how == "returns a number" else torch.zeros(3)

    with pytest.raises((ValueError, KeyboardInterrupt, OptionError, MismatchError)):
        tp.apply_(model, None, function)
    for name, parameter in model.named_parameters():
        same, address, values = before[name]
        assert parameter is same and parameter.data_ptr() == address
        assert parameter.is_contiguous() and torch.equal(parameter, values)


def test_parts_of_one_memory_are_put_back() -> None:
    whole = torch.arange(6.0)
    model = nn.Module()
    for name, part in (("a", whole[:4]), ("b", whole[2:])):
        model.register_parameter(name, nn.Parameter(part))

    def function(part: torch.Tensor) -> None:
        part.fill_(9)
        if part.data_ptr() != whole.data_ptr():
            raise ValueError

    with pytest.raises(ValueError):
        tp.apply_(model, None, function)
    assert whole.tolist() == [0, 1, 2, 3, 4, 5]


def test_sparse_tensors_are_put_back() -> None:
    model = nn.Module()
    model.register_buffer("a", torch.eye(2).to_sparse())

    def function(value: torch.Tensor) -> None:
        value.mul_(3)
        raise ValueError

    with pytest.raises(ValueError):
        tp.apply_(tp.of(model, buffers=True), "a", function)
    assert model.get_buffer("a").to_dense().tolist() == [[1, 0], [0, 1]]


def test_no_values_to_change() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.LazyLinear(2))
    before = model[0].weight.detach().clone()
    with pytest.raises(NotReadable) as caught:
        tp.apply_(model, "{0,1}.weight", nn.init.zeros_)
    assert str(caught.value) == (
        "Sequential: '1.weight' is on the meta device, which holds no values. Give it memory first: torchparams.init "
        "does, and so does model.to_empty(device='cpu')."
    )
    with pytest.raises(NotReadable) as caught:
        tp.apply_(model, "{0,2}.weight", nn.init.zeros_)
    assert str(caught.value) == (
        "Sequential: '2.weight' is lazy: it has no shape or values yet. Run the model once to set its shape."
    )
    assert torch.equal(model[0].weight, before)


def test_the_report() -> None:
    applied = tp.apply_(net(), "2.*", partial(torch.clamp, min=0))
    assert str(applied) == (
        "Sequential: applied clamp(min=0) to 2 tensors\nname      shape\n2.weight  [2, 4]\n2.bias    [2]"
    )
    told = {"function": "clamp(min=0)", "names": ["2.weight", "2.bias"], "left_out": [], "notes": []}
    assert applied.to_json() == told
    assert applied._repr_html_().startswith('<p style="font-weight:bold">Sequential')


def test_gradients_are_changed_like_parameters() -> None:
    model: Any = net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(tp.errors.NoMatch, match=r"gradients of Sequential: There are no gradients. No parameter has a"):
        tp.apply_(tp.gradients(model), None, torch.zero_)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grad = model[0].weight.grad
    done = tp.apply_(tp.gradients(model), "0.*", lambda g: g * 2)
    assert done.label == "gradients of Sequential"
    assert done.names == ("0.weight", "0.bias")
    assert model[0].weight.grad is grad, "the same object in the same memory"
    assert grad.unique().tolist() == [2.0]
    tp.apply_(tp.gradients(model).select(model[2]), None, torch.zero_)
    assert {float(p.grad.sum()) for p in model[2].parameters()} == {0.0}
    assert model[0].bias.grad.unique().tolist() == [2.0]
    assert all(map(torch.equal, before, model.parameters())), "no parameter has moved"
    with pytest.raises(tp.errors.NoMatch):
        tp.apply_(tp.gradients(model), "9.*", torch.zero_)


def test_zeroing_every_weight_says_what_follows() -> None:
    model = net()
    some = tp.apply_(model, "0.*", torch.zero_)
    assert not some.notes
    every = tp.apply_(model, "**.weight", torch.zero_)
    assert "the output does not depend on the input" in every.notes[0]
    assert "Gradients are zeroed by optimizer.zero_grad()." in " ".join(str(every).split())
    assert not tp.apply_(model, None, nn.init.normal_).notes
    assert not tp.apply_(nn.Linear(2, 2), None, torch.zero_).notes, "one layer alone trains from zero"
