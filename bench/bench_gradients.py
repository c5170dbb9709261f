"""Claim: the norms of 4,000 gradients by name take at most 1.1 × a hand-written `_foreach_norm`, stack and `tolist`.

    python bench/bench_gradients.py [layers]

The hand-written one has no names, and lists its gradients anew each time, as a training loop does. Beside it stands
`clip_grad_norm_`'s own total, and a loop over the parameters. Everything is timed by turns in one process; what is
shown are medians, the spread of the middle half, and the ratio to the hand-written one.
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

ROUNDS = 60


def network(layers: int, width: int) -> nn.Module:
    """So many linear layers with gradients, two parameters each."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def by_hand(model: nn.Module) -> list[float]:
    """The fastest way there is, without names."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms: list[float] = torch.stack(torch._foreach_norm(grads, 2)).tolist()
    return norms


def measure(layers: int, width: int) -> None:
    """Measure and print, for layers of one width."""
    model = network(layers, width)
    uses: dict[str, Callable[[], Any]] = {
        "by hand, without names": lambda: by_hand(model),
        "tp.grad_norms(model).norms": lambda: tp.grad_norms(model).norms,
        "tp.grad_norms(model).total": lambda: tp.grad_norms(model).total,
        "tp.grad_norms(model, 'module')": lambda: tp.grad_norms(model, "module").groups,
        "a norm and an item() each": lambda: {n: p.grad.norm().item() for n, p in model.named_parameters()},  # type: ignore[union-attr]  # all have one
        "get_total_norm, one number": lambda: nn.utils.get_total_norm(p.grad for p in model.parameters()).item(),  # type: ignore[misc]  # as above
    }
    assert list(tp.grad_norms(model).norms.values()) == by_hand(model)
    times: dict[str, list[float]] = {name: [] for name in uses}
    for turn in range(ROUNDS + 3):
        for name, use in uses.items():
            start = time.perf_counter()
            given = use()
            stop = time.perf_counter()
            del given
            if turn >= 3:  # the first ones warm up
                times[name].append(stop - start)
    print(f"{2 * layers:,} gradients, {width} wide")
    reference = statistics.median(times["by hand, without names"])
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        print(
            f"  {name:<32} {middle * 1000:8.2f} ms ({low * 1000:.2f} to {high * 1000:.2f})  {middle / reference:5.2f} ×"
        )


def main(layers: int = 2_000) -> None:
    """Measure small layers, where the names cost most, and larger ones."""
    measure(layers, 8)
    measure(layers, 64)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
