"""Every optimizer of torch, and small networks that they train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Make = Callable[[Iterable[Any]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam with amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, history_size=3),
}


class Net(nn.Module):
    """Two layers whose weights have one shape, registered in either order; the function is the same."""

    a: nn.Linear
    b: nn.Linear

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        layers = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}
        for name in reversed(layers) if reverse else layers:
            self.add_module(name, layers[name])

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.b(torch.tanh(self.a(x_BI)))
        return out


class Complex(nn.Module):
    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        for name in "ba" if reverse else "ab":
            self.register_parameter(
                name, nn.Parameter(torch.ones(2, 3, dtype=torch.complex64 if name == "a" else None))
            )

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (x_BI @ self.a.T).abs() + (x_BI.real @ self.b.T)
        return out


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    numbers = torch.Generator().manual_seed(number)
    inputs = torch.randn(4, 3, generator=numbers)
    if isinstance(model, Complex):
        inputs = inputs.to(torch.complex64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = ((model(inputs) - 1) ** 2).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own omission
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch's own omission
    else:
        closure()
        optimizer.step()


def trained(model: nn.Module, make: Make, steps: int = 5) -> torch.optim.Optimizer:
    optimizer = make(model.parameters())
    for number in range(steps):
        step(model, optimizer, number)
    return optimizer
