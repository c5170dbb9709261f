"""A network with running statistics, and what may change in it."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


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
