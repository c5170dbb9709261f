"""Claim: `named_parameters()` costs no more than `parameters()`, which is a loop over it.

    python bench/bench_parameters.py [rounds]

Both are run to their end, by turns in one process, on a transformer of some hundred parameters and on a mixture of
experts of 45,000. What is shown are medians, and the ratio to `parameters()`.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench_module import medians, mixture
from common import machine

if TYPE_CHECKING:
    from collections.abc import Callable


def transformer() -> nn.Module:
    """Twelve layers, as small ones as make no difference to the walk."""
    layers = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(12)]
    return nn.ModuleDict({"embed": nn.Embedding(10, 8), "layers": nn.ModuleList(layers), "head": nn.Linear(8, 10)})


def uses_of(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Each run to its end, keeping nothing."""
    return {
        "parameters()": lambda: deque(model.parameters(), maxlen=0),
        "named_parameters()": lambda: deque(model.named_parameters(), maxlen=0),
        "state_dict()": lambda: model.state_dict(),
    }


def main(rounds: int = 15) -> None:
    """Measure and print."""
    print(f"torch {torch.__version__}; {machine()}")
    for title, model in {"transformer": transformer(), "mixture of experts": mixture(15_000, "cpu")}.items():
        times = medians(uses_of(model), rounds)
        print(f"{title}: {sum(1 for _ in model.parameters()):,} parameters")
        for name, seconds in times.items():
            print(f"  {name:<20} {seconds * 1e3:9.3f} ms  {seconds / times['parameters()']:5.2f} × parameters()")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
