"""Claim: the recorder costs at most 2 % of a training at 1,024 tokens a step, by default, and 4 % at 192.

    python bench/bench_recorder.py [rounds, 3 by default] [steps, 100 by default]

A transformer of 25 million parameters on random tokens, whole trainings by turns: the plain loop; the recorder as it is
by default; everything at every step; and hooks on every gradient with `torch.histc`, as `wandb.watch` sets them. Then
2,000 parameters of 256 elements.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

import torchparams as tp
from common import machine

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, LAYERS, VOCABULARY = 512, 6, 6000


class Transformer(nn.Module):
    """25 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of predicting the tokens themselves."""
        found: torch.Tensor = self.head(self.layers(self.embed(tokens)))
        return nn.functional.cross_entropy(found.flatten(0, 1), tokens.flatten())


class Small(nn.Module):
    """2,000 parameters of 256 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A number."""
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x.square().mean()


def training(model: nn.Module, batch: torch.Tensor, steps: int, how: str) -> float:
    """Seconds of a training."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    folder = tempfile.mkdtemp()
    handles: list[Any] = []
    if how == "hooks":

        def hook(grad: torch.Tensor) -> None:
            torch.histc(grad, 64)

        handles = [cast("Any", parameter).register_hook(hook) for parameter in model.parameters()]
    options: dict[str, Any] = {"every": 1} if how == "everything" else {}
    recorded = how in ("default", "everything")
    recorder = tp.Recorder(model, optimizer, f"{folder}/run", quiet=True, **options) if recorded else None
    begun = time.perf_counter()
    with recorder or nullcontext():
        for _ in range(steps):
            model(batch).backward()
            optimizer.step()
            if recorder is not None:
                recorder.step()
            optimizer.zero_grad()
    took = time.perf_counter() - begun
    for handle in handles:
        handle.remove()
    shutil.rmtree(folder)
    if recorder is not None:
        print(f"  {how}: it says {recorder.cost:.1%}", flush=True)
    return took


def compare(title: str, model: nn.Module, batch: Callable[[], torch.Tensor], rounds: int, steps: int) -> None:
    """A table of what each way costs."""
    ways = ("plain", "default", "everything", "hooks")
    took: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            took[way].append(training(model, batch(), steps, way))
    base = statistics.median(took["plain"])
    print(f"{title}: {base / steps * 1e3:.0f} ms a step")
    for way in ways[1:]:
        print(f"  {way:<12} +{statistics.median(took[way]) / base - 1:.1%}")


def main(rounds: int, steps: int) -> None:
    print(machine())
    model = Transformer()
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    for tokens in (192, 1024):
        compare(f"{tokens} tokens", model, lambda t=tokens: torch.randint(0, VOCABULARY, (t // 64, 64)), rounds, steps)  # type: ignore[misc]
    compare("2,000 parameters of 256 elements", Small(), lambda: torch.randn(32, 16), rounds, steps)


if __name__ == "__main__":
    main(*(int(each) for each in (*sys.argv[1:], *("3", "100")[len(sys.argv) - 1 :])))
