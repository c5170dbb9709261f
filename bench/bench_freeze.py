"""Claim: freezing half of 50,000 parameters takes less than 0.5 s, in time linear in their count.

    python bench/bench_freeze.py [parameters]

The model is a stack of blocks of a projection and a batch norm, on the meta device, so that nothing but the bookkeeping
is timed; then the same with another norm in each block that has no parameters of its own, so that freezing has to look
around it. Undoing and applying a record are timed too. Every figure is the median of several rounds; the first model
stands there at twice the count as well, to show how it grows.
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

ROUNDS = 7


def stack(parameters: int, bare: bool) -> nn.Module:
    """A model of so many parameters, and a quarter as many norms; with `bare`, as many again without parameters."""
    with torch.device("meta"):
        return nn.Sequential(
            *[
                nn.Sequential(
                    nn.Linear(4, 4),
                    nn.BatchNorm1d(4),
                    nn.BatchNorm1d(4, affine=False) if bare else nn.Identity(),
                    nn.ReLU(),
                )
                for _ in range(parameters // 4)
            ]
        )


def median(use: Callable[[], Any], after: Callable[[Any], Any]) -> float:
    """Seconds that `use` takes; `after` gets what it gave, untimed."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        given = use()
        times.append(time.perf_counter() - start)
        after(given)
    return statistics.median(times)


def measure(count: int, bare: bool = False) -> None:
    """Measure and print, for a model of so many parameters."""
    model = stack(count, bare)
    half = f"{{0..{count // 8 - 1}}}.**"
    record = tp.freeze(model, half)
    record.undo()
    print(f"{len(tp.of(model)):,} parameters, {len(record.names):,} frozen, {len(record.statistics):,} norms stopped")
    for name, seconds in {
        "freeze(model, half)": median(lambda: tp.freeze(model, half), lambda frozen: frozen.undo()),
        "freeze(model)": median(lambda: tp.freeze(model), lambda frozen: frozen.undo()),
        "record.apply(model)": median(lambda: record.apply(model), lambda frozen: frozen.undo()),
        "freeze and undo": median(lambda: tp.freeze(model, half).undo(), lambda _: None),
        "select alone": median(lambda: tp.of(model).select(half), lambda _: None),
    }.items():
        print(f"  {name:<20} {seconds * 1000:8.1f} ms")


def main(parameters: int = 50_000) -> None:
    """Measure at that count, at twice that, and with norms that have no parameters."""
    measure(parameters)
    measure(2 * parameters)
    measure(parameters, bare=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
