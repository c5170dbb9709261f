"""Minima and maxima for every dtype and layout against torch, and the rules that use them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.lint import values
from torchparams.lint.values import read_extremes

FLOATS = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


def extremes(tensor: torch.Tensor) -> tuple[float, float] | None:
    found, unread = read_extremes([tensor])
    assert not unread
    return found.get(id(tensor))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [1, 7, values.SMALL, values.SMALL + 1])
def test_every_type_and_size(dtype: torch.dtype, numel: int) -> None:
    tensor = torch.linspace(-3, 5, numel).to(dtype)
    expected = tensor.double()
    assert extremes(tensor) == (expected.min().item(), expected.max().item())
    tensor = tensor.float()
    tensor[numel // 2] = float("nan")
    tensor = tensor.to(dtype)
    least, greatest = extremes(tensor) or (0.0, 0.0)
    assert math.isnan(least)
    assert math.isnan(greatest)


def test_layouts_and_kinds() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    assert extremes(base.t()) == (0, 11)
    assert extremes(base[1:, ::2]) == (4, 10)
    assert extremes(torch.tensor(2.5)) == (2.5, 2.5)
    assert extremes(nn.Parameter(base)) == (0, 11)
    assert extremes(base.to_sparse()) == (1, 11)
    assert extremes(torch.tensor([1 + 5j, -2j])) == (-2, 5)
    assert extremes(torch.tensor([1 + 5j]).conj()) == (-5, 1)
    assert extremes(torch.ones(3).expand(4, 3)) == (1, 1)
    for none in (torch.empty(0), torch.empty(3, device="meta"), torch.ones(3, dtype=torch.int64), torch.tensor(True)):
        assert extremes(none) is None
    assert extremes(nn.parameter.UninitializedParameter()) is None


def test_many_small_ones_are_each_their_own() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size) for size in (1, 5, 3, 300, 2)] + [torch.randn(4).bfloat16(), torch.empty(0)]
    found, _ = read_extremes(tensors)
    assert found == {id(t): (t.min().item(), t.max().item()) for t in tensors if t.numel()}


def test_small_ones_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "TOGETHER", 10)
    monkeypatch.setattr(values, "SLICE", 4)
    tensors = [torch.full((3,), float(i)) for i in range(20)]
    found, _ = read_extremes(tensors)
    assert [found[id(tensor)] for tensor in tensors] == [(i, i) for i in range(20)]
    assert extremes(torch.arange(9.0).to(torch.float8_e5m2)) == (0, 8)


class Closed(torch.Tensor):
    """Keeps its values to itself."""

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise RuntimeError("not for you")


def test_what_cannot_be_read_is_said() -> None:
    closed = torch.Tensor._make_subclass(Closed, torch.ones(3))
    assert read_extremes([closed]) == ({}, {id(closed)})
    model = nn.Module()
    model.register_buffer("closed", closed)
    found = tp.audit(model, select="M")
    assert found.unread == ("closed",)
    assert str(found) == (
        "Module\n1 tensor whose values could not be read\n    closed\nno findings · 0 parameter tensors · 18 rules"
    )


# --- rules ----------------------------------------------------------------------------------


def ids(model: nn.Module) -> list[str]:
    return [finding.id for finding in tp.audit(model)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(value: float) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].bias[2] = value
    (finding,) = tp.audit(model)
    assert (finding.id, finding.names, finding.where) == ("M301", ("0.bias",), "0")
    assert finding.what == f"1 tensor holds {'NaN' if math.isnan(value) else 'infinite values'}"


def test_buffers_may_be_infinite_on_purpose() -> None:
    model: Any = nn.BatchNorm1d(4)
    model.register_buffer("table", torch.zeros(3))
    assert ids(model) == []
    model.running_var[0] = float("inf")
    assert ids(model) == ["M301"]
    plain: Any = nn.Module()
    plain.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    assert ids(plain) == []
    plain.mask[0, 0] = float("nan")
    assert ids(plain) == ["M301"]


def test_constants_that_are_meant() -> None:
    fixed = nn.Conv2d(1, 1, 3, bias=False)
    nn.init.constant_(fixed.weight, 1 / 9)
    assert ids(fixed) == ["M302"]
    assert ids(fixed.requires_grad_(False)) == ["M110"]
    assert ids(nn.LayerNorm((4, 4))) == []
    scale = nn.Module()
    scale.weight = nn.Parameter(torch.ones(1, 8, 1, 1))
    scale.gate = nn.Parameter(torch.ones(8, 8))
    assert ids(scale) == []


def test_constants_in_one_finding() -> None:
    model: Any = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    for layer in model:
        nn.init.constant_(layer.weight, 0.5)
    (finding,) = tp.audit(model)
    assert finding.what == "every element of 0.weight is 0.5, and 3 other weights are constant too"
    assert finding.names == ("0.weight", "1.weight", "2.weight", "3.weight")


def test_on_the_meta_device_on_purpose_and_by_mistake() -> None:
    def of(meta: int, real: int) -> list[str]:
        devices = ["meta"] * meta + ["cpu"] * real
        return ids(nn.ParameterList([nn.Parameter(torch.ones(2, device=device)) for device in devices]))

    assert of(3, 0) == ["M107"]
    assert of(3, 1) == ["M107"]
    assert of(1, 3) == ["M106"]
    assert of(0, 3) == []
    assert of(0, 0) == []
