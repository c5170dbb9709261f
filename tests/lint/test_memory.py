"""Overlapping and tied tensors, found by their memory addresses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchparams as tp
from torchparams.lint.context import Context
from torchparams.lint.memory import sharing


def holder(*tensors: torch.Tensor) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])


def overlaps(model: nn.Module) -> list[tuple[str, ...]]:
    return [finding.names for finding in tp.audit(model, select="M201")]


def test_a_long_view_over_several_short_ones() -> None:
    base = torch.arange(20.0)
    # The last one overlaps the first, not the one before it.
    model = holder(base[:15], base[2:4], base[4:6], base[12:20])
    assert overlaps(model) == [("0", "1"), ("0", "2"), ("0", "3")]


def test_neighbours_and_exact_ties_do_not_overlap() -> None:
    base = torch.arange(20.0)
    assert overlaps(holder(base[:10], base[10:], base[:10])) == []
    shared = nn.Parameter(base)
    assert overlaps(nn.ParameterDict({"a": shared, "b": shared})) == []


def test_views_that_lie_between_each_other() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    assert overlaps(holder(base[:, ::2], base[:, 1::2])) == []
    assert overlaps(holder(*base.chunk(3, dim=1))) == []
    assert overlaps(holder(base[:, :4], base[:, 3:])) == [("0", "1")]
    assert overlaps(holder(base[:, 1], base[2])) == [("0", "1")]
    assert overlaps(holder(base, base.t())) == [("0", "1")]


def test_of_several_types() -> None:
    base = torch.arange(8, dtype=torch.float32)
    assert overlaps(holder(base[:4], base.view(torch.float16)[8:])) == []
    assert overlaps(holder(base[:5], base.view(torch.float16)[8:])) == [("0", "1")]
    assert overlaps(holder(base[::2], base.view(torch.float16)[::4])) == [("0", "1")]
    assert overlaps(holder(base[::2], base.view(torch.float16)[2::4])) == []


def test_a_parameter_that_overlaps_itself() -> None:
    finding = tp.audit(holder(torch.ones(1).expand(3)), select="M201")[0]
    assert finding.what == "0 has one element at several indices, as after expand()"
    assert overlaps(holder(torch.ones(4).as_strided((3, 2), (1, 1)))) == [("0",)]
    assert overlaps(holder(torch.ones(1).expand(1, 1), torch.ones(0), torch.ones(()))) == []


def test_on_the_meta_device() -> None:
    base = torch.empty(20, device="meta")
    assert overlaps(holder(base[:10], base[5:])) == [("0", "1")]
    assert overlaps(holder(base[:10], base[10:], torch.empty(20, device="meta"))) == []


def test_flat_recurrent_weights_do_not_overlap() -> None:
    assert overlaps(nn.LSTM(3, 4, num_layers=2)) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=5))
def test_against_counting_every_element(places: list[tuple[int, int, int]]) -> None:
    base = torch.arange(40.0)
    tensors = [base[start : start + count * step : step] for start, count, step in places]
    model = holder(*tensors)
    sets = [frozenset(np.asarray(tensor).astype(int)) for tensor in tensors]
    distinct = {
        (tensor.data_ptr(), tensor.shape, tensor.stride()): held for tensor, held in zip(tensors, sets, strict=True)
    }
    members = list(distinct.values())
    expected = any(a & b for i, a in enumerate(members) for b in members[:i])
    assert bool(sharing(Context(model).parameters).partial) == expected


# --- ties -----------------------------------------------------------------------------------


class Language(nn.Module):
    """An embedding, and a head of the same shape."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def ties(model: nn.Module) -> list[tuple[str, ...]]:
    return [finding.names for finding in tp.audit(model, select="M202")]


def test_whole_and_broken_ties() -> None:
    model = Language()
    assert ties(model) == []
    assert ties(copy.deepcopy(model)) == []
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    assert ties(model) == [("embed.weight", "head.weight")]
    assert ties(Language(tied=False)) == []


def test_two_parameters_for_one_memory() -> None:
    model = Language()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    finding = tp.audit(model, select="M202")[0]
    assert finding.what == "embed.weight and head.weight are different parameters with the same memory"
    assert finding.fix == "model.head.weight = model.embed.weight"
    model.head.weight.requires_grad_(False)  # a frozen view is a way to use it as a constant
    assert ties(model) == []


def test_equal_parts_of_equal_copies_are_no_ties() -> None:
    student = Language()
    teacher = copy.deepcopy(student)
    assert ties(nn.ModuleDict({"student": student, "teacher": teacher})) == []
    assert ties(nn.ModuleDict({"student": student, "teacher": teacher.requires_grad_(False)})) == []
    layer = nn.Linear(4, 4)
    assert ties(nn.Sequential(layer, copy.deepcopy(layer))) == []


def test_constant_and_broken_values_say_nothing() -> None:
    for value in (0.0, 1.0, float("nan")):
        model = Language(tied=False)
        nn.init.constant_(model.embed.weight, value)
        nn.init.constant_(model.head.weight, value)
        assert ties(model) == []


@pytest.mark.parametrize("keys", [["b.weight"], {"b.weight": "a.weight"}, ("b.weight",)])
def test_what_a_model_declares(keys: object) -> None:
    class Declares(nn.Module):
        _tied_weights_keys = keys

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

    model: Any = nn.Sequential(Declares())
    assert ties(model) == []
    model[0].b.weight.data.copy_(model[0].a.weight.data)
    assert ties(model) == [("0.a.weight", "0.b.weight")]


@pytest.mark.parametrize("keys", [["head.weight"], {"head.weight": "embed.weight"}])
def test_copies_of_what_is_declared_are_no_ties(keys: object) -> None:
    class Declares(Language):
        _tied_weights_keys = keys

    model = Declares()
    towers = nn.ModuleDict({"a": model, "b": copy.deepcopy(model), "teacher": copy.deepcopy(model)})
    towers["teacher"].requires_grad_(False)
    assert ties(towers) == []


def test_equal_extremes_are_not_equal_values() -> None:
    model = Language(tied=False)
    values = torch.tensor([-1.0, 1.0]).repeat(16).reshape(8, 4)
    model.embed.weight.data.copy_(values)
    model.head.weight.data.copy_(values.flip(1))
    assert ties(model) == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_read_by_their_values() -> None:
    for layout in (torch.strided, torch.jagged):
        model = nn.Module()
        model.w = nn.Parameter(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout))
        assert not [found for found in tp.audit(model).findings if found.severity != "note"]


def test_views_whose_base_has_changed_are_results() -> None:
    made = torch.ones(4, requires_grad=True) * 1
    model = nn.Linear(2, 2)
    model.__dict__["view"], _ = torch.split(made, [2, 2])
    torch.Tensor.add_(made, 1)  # as FSDP does with its flat parameter before the first forward pass
    assert not tp.audit(model).findings


def test_a_scale_far_from_its_siblings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    assert not tp.audit(model).findings
    with torch.no_grad():
        nn.init.normal_(model[3].get_parameter("weight"), std=4.0)
    (found,) = tp.audit(model).findings
    assert (found.id, found.names) == ("M305", ("3.weight",))
    assert "of its 7 nearest siblings *.weight" in found.what
