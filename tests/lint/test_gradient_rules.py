"""Rules that apply after a backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def found(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {finding.id: finding.names for finding in tp.audit(model, select="G")}


def test_nothing_is_said_before_backward_and_after_zero_grad() -> None:
    model = net()
    assert found(model) == {}
    model(torch.randn(3, 4)).sum().backward()
    assert found(model) == {}
    model.zero_grad()
    assert found(model) == {}


def test_no_gradient() -> None:
    model = net()
    model[0](torch.randn(3, 4)).sum().backward()
    assert found(model) == {"G101": ("2.weight", "2.bias")}
    assert found(model.requires_grad_(False)) == {}


def test_zero_gradient() -> None:
    model = net()
    nn.init.constant_(model[0].bias, 1e6)  # saturated
    model(torch.randn(3, 4)).sum().backward()
    assert found(model) == {"G102": ("0.weight", "0.bias")}


def test_a_head_that_begins_as_zero_is_meant() -> None:
    model = net()
    nn.init.zeros_(model[2].weight)
    model(torch.randn(3, 4)).sum().backward()
    assert found(model) == {}


class Block(nn.Module):
    """A residual block, whose last norm lets nothing through before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.norm(self.fc2(self.fc1(x)))


def test_a_branch_that_begins_as_zero_is_meant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2))
    model(torch.randn(3, 4)).square().sum().backward()
    assert float(model[1].fc1.weight.grad.abs().max()) == 0  # type: ignore[operator,union-attr]  # a Linear's
    assert found(model) == {}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    assert found(model) == {}
    model[1].fc1.weight.grad.zero_()  # type: ignore[operator,union-attr]  # as above
    assert found(model) == {"G102": ("1.fc1.weight",)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_that_is_not_finite(value: float) -> None:
    model = net()
    model(torch.randn(3, 4)).sum().backward()
    model[0].bias.grad[3] = value
    assert tp.audit(model, select="G")[0].what == "1 gradient is not finite, the first in 0.bias"
    model[2].weight.grad[1, 1] = value
    assert tp.audit(model, select="G")[0].what == (
        "2 gradients are not finite, the first in 0.bias and the last in 2.weight, which backward reached first"
    )


def test_sparse_gradients() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    model(torch.tensor([1, 2])).sum().backward()
    assert found(model) == {}
    model.zero_grad()
    (model(torch.tensor([1, 2])) * float("nan")).sum().backward()
    assert found(model) == {"G103": ("weight",)}
