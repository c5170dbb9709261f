"""Claim: groups of a mixture of 50,000 experts' weights are made in less than 0.3 s, layer decay included.

    python bench/bench_groups.py [experts]

The model has 24 layers of experts, each of two linear layers with biases and a norm, and 50,000 trainable parameters.
What is shown are medians of uses by turns in one process, beside the loop that people write (names tested for words,
one group for decay and one without) and what PyTorch itself takes to list the parameters.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 9
LAYERS = 24


class Expert(nn.Module):
    """Two linear layers and a norm: six parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)


class Layer(nn.Module):
    """A layer's experts and their router."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))


class Mixture(nn.Module):
    """A language model of such layers."""

    def __init__(self, experts: int, width: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Layer(experts // LAYERS, width) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 16)


def by_hand(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, by words in the names."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if parameter.ndim < 2 or name.endswith("bias") or "norm" in name else decay).append(parameter)
    return [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]


def medians(uses: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds that each use takes, by turns; the first turn fills caches."""
    taken: dict[str, list[float]] = {name: [] for name in uses}
    for turn in range(ROUNDS + 1):
        for name, use in uses.items():
            start = time.perf_counter()
            given = use()
            stop = time.perf_counter()
            del given
            if turn:
                taken[name].append(stop - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main(experts: int = 8_328) -> None:
    """Measure and print."""
    model = Mixture(experts)
    no_decay = tp.rule(tp.no_decay, weight_decay=0.0)
    head = tp.rule("head.**", lr=1e-2)
    muon = tp.rule("**.experts.**[ndim=2]", optimizer="muon")
    made = tp.groups(model, no_decay, head, lr=1e-3, weight_decay=0.05, layer_decay=0.8)
    uses: dict[str, Callable[[], Any]] = {
        "list(model.named_parameters())": lambda: list(model.named_parameters()),
        "two groups by hand": lambda: by_hand(model),
        "tp.groups, no rules": lambda: tp.groups(model, lr=1e-3),
        "tp.groups, no_decay": lambda: tp.groups(model, no_decay, lr=1e-3, weight_decay=0.05),
        "tp.groups, three rules": lambda: tp.groups(model, no_decay, head, muon, lr=1e-3, weight_decay=0.05),
        "… and layer decay": lambda: tp.groups(
            model, no_decay, head, muon, lr=1e-3, weight_decay=0.05, layer_decay=0.8
        ),
        "… by a pattern": lambda: tp.groups(
            model, no_decay, head, muon, lr=1e-3, weight_decay=0.05, layer_decay=0.8, depth="layers.{}.**"
        ),
        "str(groups)": lambda: str(made),
        "groups.to_json()": made.to_json,
        "torch.optim.AdamW(groups)": lambda: torch.optim.AdamW([{**group} for group in made]),
    }
    print(f"{len(tp.of(model)):,} parameters in {sum(1 for _ in model.modules()):,} modules, {len(made)} groups")
    for name, seconds in medians(uses).items():
        print(f"  {name:<32} {seconds * 1000:9.1f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
