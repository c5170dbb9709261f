"""Claim: statistics of 20,000 small tensors take 3.5 × what it takes to read and sum them; of a live model, all numbers
take no longer than four torch calls on each parameter.

    python bench/bench_small.py [rounds, 7 by default]

Within one process, by turns, page cache warm:

- 20,000 tensors of 1,024 float32 in a file: opening it with safetensors and summing each tensor with numpy, beside
  `tp.stats` with mean, std, min and max of every row read and with every number of every row read and
  the widest table printed.
- A live model of 2,000 parameters of 256 elements: `mean`, `std`, `min` and `max` of each by torch, beside `tp.stats`
  with the same four of every row read.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

import torchparams as tp
from bench_stats import safetensors_of
from common import DATA, machine, paired, print_pairs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TENSORS, ELEMENTS = 20_000, 1024
PARAMETERS, SIDE = 2000, 16


def small_file() -> Path:
    """The file, of values as weights have them."""
    path = DATA / f"small-f32-{TENSORS}.safetensors"
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        numbers = np.random.default_rng(0)
        shape = (ELEMENTS // 32, 32)
        values = (0.02 * numbers.standard_normal((TENSORS, *shape))).astype(np.float32)
        parts: dict[str, tuple[str, tuple[int, ...], bytes]] = {
            f"layers.{i // 8}.block{i % 8}.weight": ("F32", shape, values[i].tobytes()) for i in range(TENSORS)
        }
        path.write_bytes(safetensors_of(parts))
    return path


def timed(call: Callable[[], Any]) -> Callable[[], tuple[float, int]]:
    """A run of a call, for `paired`: its seconds, and no figure for memory."""

    def run() -> tuple[float, int]:
        gc.collect()
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun, 0

    return run


def read_and_sum(path: Path) -> None:
    """Each tensor by safetensors, summed by numpy."""
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            file.get_tensor(name).sum()


def four_numbers(x: object) -> None:
    """Mean, std, min and max of every row."""
    for row in tp.stats(x):
        _ = row.mean, row.std, row.min, row.max


def everything(x: object) -> None:
    """Every number of every row, and the widest table as text."""
    found = tp.stats(x, wide=True)
    for row in found:
        for _ in row:
            pass
    str(found)


def by_torch(model: torch.nn.Module) -> None:
    """The four by torch."""
    with torch.no_grad():
        for weight in model.parameters():
            _ = weight.mean().item(), weight.std().item(), weight.min().item(), weight.max().item()


def main() -> None:
    """Measure, and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    print(machine())
    path = small_file()
    print(f"\n{TENSORS:,} tensors of {ELEMENTS:,} float32, {path.stat().st_size / 1e6:.0f} MB")
    base = "safetensors, summed by numpy"
    runs = {
        base: timed(lambda: read_and_sum(path)),
        "stats, mean std min max of each": timed(lambda: four_numbers(str(path))),
        "stats, every column, printed": timed(lambda: everything(str(path))),
    }
    print_pairs(paired(runs, rounds), base)
    model = torch.nn.ModuleList(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(PARAMETERS))
    print(f"\na live model of {PARAMETERS:,} parameters of {SIDE * SIDE} elements")
    base = "four calls of torch on each"
    runs = {base: timed(lambda: by_torch(model)), "stats, the same four of each": timed(lambda: four_numbers(model))}
    print_pairs(paired(runs, rounds), base)


if __name__ == "__main__":
    main()
