"""A small network and its training under a recorder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.record.recorder import Recorder


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))


def layer(model: nn.Sequential, i: int) -> Any:
    return model[i]


def batches(count: int) -> Iterator[torch.Tensor]:
    numbers = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(32, 8, generator=numbers)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder, steps: int) -> None:
    with recorder:
        for x in batches(steps):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss.item())
            recorder.step()
            optimizer.zero_grad()
