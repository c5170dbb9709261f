"""Claim: the history of a directory of checkpoints is measured at memory's rate.

    python bench/bench_history.py [checkpoints, 20 by default] [megabytes of each, 100 by default]

Checkpoints of 10 float32 matrices, each the one before with a small update; `tp.history` of all, beside `tp.stats`
of each file, which reads every byte once, and `tp.diff` of neighbours. The files lie in the page cache.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

import torchparams as tp
from common import machine

if TYPE_CHECKING:
    from collections.abc import Callable


def write(folder: str, count: int, megabytes: int) -> list[str]:
    """Write checkpoints with 10 matrices each, named by their steps."""
    rng = np.random.default_rng(0)
    size = megabytes * 10**6 // 4 // 10 // 1000
    weights = {f"layers.{i}.weight": rng.standard_normal((size, 1000), np.float32) for i in range(10)}
    update = 1e-3 * rng.standard_normal((size, 1000), np.float32)
    paths = []
    for step in range(count):
        paths.append(f"{folder}/step-{100 * step}.safetensors")
        save_file(weights, paths[-1])
        for value in weights.values():
            value += update
    return paths


def main(count: int, megabytes: int) -> None:
    print(machine())
    folder = tempfile.mkdtemp(dir=".")
    try:
        paths = write(folder, count, megabytes)
        ways: dict[str, Callable[[], object]] = {
            "stats of each": lambda: [tp.stats(path) for path in paths],
            "diff of neighbours": lambda: [tp.diff(a, b, numeric=True) for a, b in pairwise(paths)],
            "history": lambda: tp.history(folder),
        }
        took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(3):
            for way, call in ways.items():
                begun, used = time.perf_counter(), time.process_time()
                call()
                took[way].append((time.perf_counter() - begun, time.process_time() - used))
        size = count * megabytes / 1e3
        for way, pairs in took.items():
            wall, cpu = (statistics.median(each) for each in zip(*pairs, strict=True))
            print(f"{way:<20} {wall:6.2f} s, {cpu:6.2f} s of CPU: {size / wall:5.2f} GB/s", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*(int(each) for each in (*sys.argv[1:], *("20", "100")[len(sys.argv) - 1 :])))
