"""Modules, classes of modules and parameters as selectors of a live model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams import Selector
from torchparams.errors import NoMatch, SelectorError, UnsupportedSource


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.blocks = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Sequential(nn.Linear(3, 3)))
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.blocks(self.norm(self.stem(x_BI))))
        return out


def names(model: nn.Module, what: Any) -> list[str]:
    return tp.of(model).select(what).names


def test_a_module_selects_all_that_is_below_it() -> None:
    model = Net()
    assert names(model, model.head) == ["head.weight"]
    assert names(model, model.blocks) == [
        "blocks.0.0.weight",
        "blocks.0.0.bias",
        "blocks.1.0.weight",
        "blocks.1.0.bias",
    ]
    assert names(model, model) == tp.of(model).names
    assert tp.of(model, buffers=True).select(model.norm).names[-1] == "norm.num_batches_tracked"


def test_a_class_selects_what_is_below_every_such_module() -> None:
    model = Net()
    assert names(model, nn.BatchNorm1d) == ["norm.weight", "norm.bias"]
    assert names(model, nn.modules.batchnorm._NormBase) == ["norm.weight", "norm.bias"], "base classes too"
    assert names(model, nn.Sequential) == names(model, model.blocks)
    assert len(names(model, nn.Linear)) == 7


def test_lists_of_modules_classes_parameters_and_names() -> None:
    model = Net()
    assert names(model, [model.head, nn.BatchNorm1d, "stem.bias", model.stem.weight]) == [
        *("stem.weight", "stem.bias", "norm.weight", "norm.bias", "head.weight"),
    ]
    assert names(model, model.stem.parameters()) == ["stem.weight", "stem.bias"]
    assert names(model, model.stem.weight) == ["stem.weight"]


def test_they_combine_with_other_selectors() -> None:
    model = Net()
    assert names(model, Selector(nn.Linear) & "**.bias") == ["stem.bias", "blocks.0.0.bias", "blocks.1.0.bias"]
    assert names(model, ~Selector([model.blocks, model.stem])) == ["norm.weight", "norm.bias", "head.weight"]
    assert Selector(model.stem) == Selector(model.stem)
    assert Selector(model.stem) != Selector(model.head)
    assert Selector(model.stem.weight) == Selector(model.stem.weight)
    assert len({Selector(model.stem), Selector(model.stem)}) == 1
    assert str(Selector([model.stem, nn.Linear, model.stem.bias])) == "<module Linear> | <class Linear> | <Parameter>"


def test_a_selection_by_class_is_never_stale() -> None:
    model = Net()
    chosen = tp.of(model).select(nn.Linear)
    model.blocks.append(nn.Linear(1, 1))
    assert "blocks.2.weight" in chosen.names


def test_a_tied_tensor_is_that_of_either_module() -> None:
    model: Any = Net()
    model.blocks[0][0].weight = model.blocks[1][0].weight
    assert names(model, model.blocks[1]) == ["blocks.0.0.weight", "blocks.1.0.bias"]


def test_wrapped_models_and_copies() -> None:
    model = Net()
    assert names(nn.DataParallel(model), model.head) == ["head.weight"]
    table = tp.of(model).select(model.head)
    for copied in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert copied.names == ["head.weight"]


def test_the_verbs_take_them() -> None:
    model = Net()
    frozen = tp.freeze(model, [model.stem, nn.BatchNorm1d])
    assert frozen.names == ("stem.weight", "stem.bias", "norm.weight", "norm.bias")
    assert frozen.statistics == ("norm",)
    groups = tp.groups(model, tp.rule(model.head, lr=0.5), lr=0.1)
    assert [len(group["params"]) for group in groups if group["lr"] == 0.5] == [1]
    model(torch.ones(4, 2)).sum().backward()
    assert tp.gradients(model).select(model.head).names == ["head.weight"]
    assert tp.apply_(model, nn.Linear, nn.init.zeros_).names[-1] == "head.weight"
    assert [row.name for row in tp.stats(model, model.head)] == ["head.weight"]
    norms = tp.grad_norms(model, by=[model.blocks[0], model.blocks[1]])
    assert list(norms.members) == ["<module Sequential>", "<module Sequential> (2)"]


def test_what_is_not_in_the_model_is_refused() -> None:
    model: Any = Net()
    for what, why in (
        (nn.Conv2d, "`<class Conv2d>` matches nothing. The modules of this model are Linear, Sequential"),
        (nn.Linear(2, 2), "`<module Linear>` matches nothing. The module is not in this model"),
        (model.blocks[0][1], "`<module ReLU>` matches nothing. The table has no parameter of it"),
        ([model.stem.weight, torch.ones(2)], r"The tensor of shape \[2\] is not among the 9 tensors of this table"),
    ):
        with pytest.raises(NoMatch, match=why):
            names(model, what)
    assert tp.of(model).select(nn.Conv2d, strict=False).names == []


def test_records_alone_cannot_tell() -> None:
    with pytest.raises(SelectorError, match="needs the live model"):
        tp.of(Net().state_dict()).select(nn.Linear)


def test_verbs_on_a_model_say_what_to_pass_in_place_of_a_path() -> None:
    said = "needs a live model, not the path of a checkpoint. Build the model, fill it with torchparams.load"
    for verb in (tp.freeze, tp.unfreeze, tp.groups, tp.gradients, tp.grad_norms):
        with pytest.raises(UnsupportedSource, match=said):
            verb("model.pt")


def test_many_parameters_are_one_term() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(2000)))
    assert len(Selector(model.parameters()).branches) == 1
    assert len(names(model, model.parameters())) == 4000


def test_state_outside_the_table_is_named_where_it_lies_between() -> None:
    class Packed(nn.Module):
        def get_extra_state(self) -> Any:
            return {"packed": 1}

    model: Any = nn.Sequential(nn.Sequential(nn.Linear(2, 2), Packed(), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert [each.name for each in tp.of(model).select(model[0]).left_out] == ["0.1"]
    assert [each.name for each in tp.freeze(model, model).left_out] == ["0.1"]
    assert not tp.of(model).select(model[1]).left_out
