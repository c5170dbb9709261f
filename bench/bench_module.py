"""Claim: a live table is listed in at most the time of `list(model.named_parameters())`; `list(params)` in 1.15 times.

The same holds for `items()`, `values()`, names and loops. `list(params)` also asks for the length, and reads the model
twice.

    python bench/bench_module.py [experts]

The model is a mixture of experts of 45,000 parameters in 75,000 modules, once with small tensors on the CPU and once on
the meta device. Each use is measured in pairs: PyTorch's own listing, then the use, in one process. What is shown are
the median of the use, and the median of the ratios. The cyclic garbage collector runs as it always does: each list of
pairs makes work for it.
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
    from collections.abc import Callable, Iterable

ROUNDS = 9
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
            spent = seconds(use)
            if turn:  # the first fills caches
                taken[name].append(spent)
    return {name: statistics.median(times) for name, times in taken.items()}


def seconds(use: Callable[[], Any]) -> float:
    """Time of one use, without the time that freeing its result takes."""
    start = time.perf_counter()
    given = use()
    stop = time.perf_counter()
    del given
    return stop - start


def pairs(use: Callable[[], Any], reference: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
    """The median time of `use`, and the median of its ratios to `reference`, which runs just before it."""
    seconds(use)  # fills caches
    taken = [(seconds(reference), seconds(use)) for _ in range(rounds)]
    return statistics.median(used for _, used in taken), statistics.median(used / base for base, used in taken)


def loop(given: Iterable[Any]) -> None:
    """Go through everything."""
    for _ in given:
        pass


def reference_of(model: nn.Module) -> Callable[[], Any]:
    """PyTorch's own listing."""
    return lambda: list(model.named_parameters())


def uses_of(model: nn.Module) -> dict[str, tuple[float | None, Callable[[], Any]]]:
    """The uses that are measured, each with the highest ratio that is claimed."""
    params = tp.of(model)
    names, weights = params.names, params.select("**.w1.*")
    return {
        "list(params.items())": (1.0, lambda: list(params.items())),
        "list(params.values())": (1.0, lambda: list(params.values())),
        "list(params.keys())": (1.0, lambda: list(params.keys())),
        "params.names": (1.0, lambda: params.names),
        "for name in params": (1.0, lambda: loop(params)),
        "for name, tensor in params.items()": (1.0, lambda: loop(params.items())),
        "list(params)": (1.15, lambda: list(params)),
        "list(params.named_parameters())": (1.0, lambda: list(params.named_parameters())),
        "list(params())": (1.0, lambda: list(params())),
        "list(model.parameters())": (None, lambda: list(model.parameters())),
        "[params[n] for n in names]": (None, lambda: [params[name] for name in names]),
        "[model.get_parameter(n) for n in names]": (None, lambda: [model.get_parameter(name) for name in names]),
        "params.infos": (None, lambda: params.infos),
        "params.snapshot()": (None, params.snapshot),
        "str(params)": (None, lambda: str(params)),
        "weights.names": (None, lambda: weights.names),
        "[weights[n] for n in weights]": (None, lambda: [weights[name] for name in weights]),
    }


def main(experts: int = 15_000) -> None:
    """Measure and print."""
    for device in ("cpu", "meta"):
        model = mixture(experts, device)
        params = tp.of(model)
        assert params.names == [name for name, _ in model.named_parameters()]
        print(f"{len(params):,} parameters in {sum(1 for _ in model.modules()):,} modules on {device}")
        for name, (most, use) in uses_of(model).items():
            taken, ratio = pairs(use, reference_of(model))
            claim = "" if most is None else f"  at most {most:.2f}: {'yes' if ratio <= most else 'NO'}"
            print(f"  {name:<40} {taken * 1000:9.3f} ms  {ratio:6.2f} ×{claim}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
