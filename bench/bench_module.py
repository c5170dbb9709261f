"""Claim: a live table is traversed in less time than `list(model.named_parameters())`, about half of it.

    python bench/bench_module.py [experts]

The model is a mixture of experts of 45,000 parameters in 75,000 modules, once with small tensors on the CPU and once on
the meta device. Everything is timed by turns in one process; what is shown are medians, and the ratio to PyTorch's own
listing. The cyclic garbage collector runs as it always does: each list of pairs makes work for it.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import torchparams as tp
from torchparams.sources.live.module import ModuleSource

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 15
LAYERS = 24


class Expert(nn.Module):
    """Three projections and an activation: five modules, three parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, width, bias=False)
        self.w2 = nn.Linear(width, width, bias=False)
        self.w3 = nn.Linear(width, width, bias=False)
        self.act = nn.SiLU()


class Layer(nn.Module):
    """A layer's experts."""

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))


def mixture(experts: int, device: str) -> nn.Module:
    """A mixture of `experts` experts in all; 4,096 wide where that costs no memory."""
    with torch.device(device):
        return nn.Sequential(*[Layer(experts // LAYERS, 4096 if device == "meta" else 2) for _ in range(LAYERS)])


def medians(uses: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds that each use takes, by turns."""
    taken: dict[str, list[float]] = {name: [] for name in uses}
    for turn in range(rounds + 1):
        for name, use in uses.items():
            start = time.perf_counter()
            given = use()
            stop = time.perf_counter()
            del given  # freeing what was given is nobody's traversal
            if turn:  # the first fills caches
                taken[name].append(stop - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def uses_of(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """What is measured; PyTorch's own stands before ours."""
    params, source = tp.of(model), ModuleSource(model)
    names = params.names
    return {
        "list(model.named_parameters())": lambda: list(model.named_parameters()),
        "list(params.items())": lambda: list(params.items()),
        "list(params.named_parameters())": lambda: list(params.named_parameters()),
        "names and tensors, as a dict": source.keys,
        "list(params)": lambda: list(params),
        "list(model.parameters())": lambda: list(model.parameters()),
        "list(params())": lambda: list(params()),
        "[model.get_parameter(n) for n in names]": lambda: [model.get_parameter(name) for name in names],
        "[params[n] for n in names]": lambda: [params[name] for name in names],
        "all records": lambda: params.infos,
        "str(params)": lambda: str(params),
        "params.select('**.w1.*').names": lambda: params.select("**.w1.*").names,
    }


def main(experts: int = 15_000) -> None:
    """Measure and print."""
    for device in ("cpu", "meta"):
        model = mixture(experts, device)
        params = tp.of(model)
        assert params.names == [name for name, _ in model.named_parameters()]
        uses = uses_of(model)
        times = medians(uses)
        print(f"{len(params):,} parameters in {sum(1 for _ in model.modules()):,} modules on {device}")
        reference = times["list(model.named_parameters())"]
        for name, seconds in times.items():
            print(f"  {name:<38} {seconds * 1000:9.3f} ms  {seconds / reference:6.2f} ×")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
