"""`attach` and `detach`; that PyTorch treats an attached module as any other is in test_module.py."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import NameTaken, UnsupportedSource

if TYPE_CHECKING:
    from collections.abc import Iterator


def sequential() -> Any:  # Any: to a type checker, `parameters` stays a method
    return nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 1)))


NAMES = ["0.weight", "0.bias", "1.1.weight", "1.1.bias"]


class Trainable(nn.Linear):
    """A class with its own idea of what its parameters are."""

    def parameters(self, recurse: bool = True, *, frozen: bool = False) -> Iterator[nn.Parameter]:
        return (p for p in super().parameters(recurse) if frozen or p.requires_grad)


def test_the_table_and_the_iterator() -> None:
    model = sequential()
    assert tp.attach(model) is model
    assert isinstance(model.parameters, tp.Parameters)
    assert model.parameters.names == NAMES
    assert model.parameters["1.1.bias"] is model[1][1].bias
    assert [id(p) for p in model.parameters()] == [id(p) for p in nn.Module.parameters(model)]
    assert list(model.parameters(recurse=False)) == []
    assert type(model) is nn.Sequential
    assert list(model.state_dict()) == NAMES
    assert repr(model) == repr(sequential())


def test_submodules_on_request() -> None:
    model = tp.attach(sequential())
    assert not isinstance(model[1].parameters, tp.Parameters)
    tp.attach(model, submodules=True)
    assert model[1].parameters.names == ["1.weight", "1.bias"]
    assert model[1][1].parameters.names == ["weight", "bias"]
    assert model[1][0].parameters.names == []
    assert model.parameters.names == NAMES


def test_detach_leaves_nothing() -> None:
    model = sequential()
    before = [set(vars(module)) for module in model.modules()]
    tp.attach(model, submodules=True)
    tp.attach(model)
    assert tp.detach(model) is model
    assert [set(vars(module)) for module in model.modules()] == before
    assert inspect.ismethod(model.parameters)
    assert tp.detach(model) is model


def test_of_a_module_that_has_the_table_nothing_changes() -> None:
    inner = tp.Module()
    model: Any = nn.Sequential(inner)
    tp.attach(model, submodules=True)
    assert "parameters" not in vars(inner)
    tp.detach(model)
    assert isinstance(inner.parameters, tp.Parameters)


def test_the_class_may_have_its_own_method() -> None:
    model: Any = Trainable(3, 2)
    model.bias.requires_grad_(False)
    tp.attach(model)
    assert [p is model.weight for p in model.parameters()] == [True]
    assert len(list(model.parameters(frozen=True))) == 2
    assert model.parameters.names == ["weight", "bias"]
    assert list(inspect.signature(model.parameters).parameters) == ["recurse", "frozen"]


def test_an_object_with_its_own_attribute_is_refused() -> None:
    model = sequential()
    model[1].parameters = lambda: iter([])
    with pytest.raises(NameTaken) as caught:
        tp.attach(model, submodules=True)
    assert str(caught.value) == (
        "Sequential: 1: This object already has its own attribute `parameters`, a function. "
        "Delete that attribute first; or use `torchparams.of(model)`, which attaches nothing."
    )
    assert all(not isinstance(module.parameters, tp.Parameters) for module in model.modules())
    tp.detach(model)
    assert "parameters" in vars(model[1])


def test_what_is_no_model() -> None:
    path: Any = "model.pt"
    with pytest.raises(UnsupportedSource) as caught:
        tp.attach(path)
    assert str(caught.value) == "attach() takes an nn.Module, not str: 'model.pt'"
    kind: Any = nn.Sequential
    with pytest.raises(UnsupportedSource) as caught:
        tp.detach(kind)
    assert str(caught.value) == "detach() takes a model, not the class Sequential. Create a model first: Sequential(…)."


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own_tables(again: Any) -> None:
    model = tp.attach(sequential(), submodules=True)
    copied = again(model)
    assert copied.parameters["0.weight"] is copied[0].weight
    assert copied[1].parameters["1.bias"] is copied[1][1].bias
    assert copied.parameters != model.parameters
    wrapped = again(tp.attach(nn.DataParallel(sequential())))
    assert wrapped.parameters.source.label == "DataParallel(Sequential)"
    assert wrapped.parameters["0.weight"] is wrapped.module[0].weight
    table = again(model.parameters)
    assert table.source.module.parameters == table
    assert type(table) is type(model.parameters)


def test_a_shallow_copy_shares_everything() -> None:
    model = tp.attach(sequential())
    shallow = copy.copy(model)
    assert shallow.parameters is model.parameters
    assert shallow.parameters["0.weight"] is shallow[0].weight


def test_a_model_without_references_is_freed() -> None:
    model = tp.attach(sequential())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    model = tp.detach(tp.attach(sequential(), submodules=True))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_compiled_model_and_the_one_inside_it() -> None:
    model = sequential()
    compiled: Any = torch.compile(model, backend="eager")
    tp.attach(compiled)
    assert compiled.parameters.names == NAMES
    assert inspect.ismethod(model.parameters)
    assert torch.equal(compiled(torch.ones(1, 3)), model(torch.ones(1, 3)))
    tp.detach(compiled)
    assert not isinstance(compiled.parameters, tp.Parameters)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_traced_and_symbolic_models() -> None:
    model = tp.attach(sequential(), submodules=True)
    ones = torch.ones(1, 3)
    made: Any
    for made in (torch.jit.script(model), torch.jit.trace(model, ones), torch.fx.symbolic_trace(model)):  # type: ignore[no-untyped-call]  # torch's own
        assert [name for name, _ in made.named_parameters()] == NAMES
        assert torch.equal(made(ones), model(ones))
        assert tp.attach(made).parameters.names == NAMES
        assert len(list(made.parameters())) == 4


def test_models_that_are_built_anew_come_without_it() -> None:
    model = tp.attach(sequential(), submodules=True)
    graph = tp.attach(torch.fx.symbolic_trace(model))
    exported = torch.export.export(model, (torch.ones(1, 3),))
    assert list(exported.state_dict) == NAMES
    for anew in (copy.deepcopy(graph), exported.module()):
        assert not isinstance(anew.parameters, tp.Parameters)
        assert [name for name, _ in anew.named_parameters()] == NAMES


def test_a_parametrized_model() -> None:
    model = tp.attach(sequential()[0])
    nn.utils.parametrizations.orthogonal(model, "weight")  # gives the object a class of its own
    for one in (model, copy.deepcopy(model)):
        assert one.parameters.names == ["bias", "parametrizations.weight.original"]
        assert one.parameters == tp.of(one)
        assert len(list(one.parameters())) == 2


def test_the_verbs_see_an_ordinary_model() -> None:
    model = tp.attach(sequential(), submodules=True)
    assert not tp.audit(model).findings
    assert model.parameters == tp.of(model)
    tp.freeze(model, "0.*")
    assert model.parameters.select(":trainable").names == NAMES[2:]
    assert tp.diff(model, copy.deepcopy(model)).same
