"""The cost of reading files instead of mapping them; reading survives truncation of the file during a scan.

python bench/bench_mapped.py [MIB]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import torchparams as tp
from torchparams.engines import ThreadEngine
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

RUNS = 7


def main(mib: int) -> None:
    """Print the best of some runs by turns, mapped and read."""
    numbers = np.random.default_rng(0)
    weights = {f"l.{i}.w": numbers.standard_normal((1024, 3072), np.float32) for i in range(max(mib // 12, 1))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(safetensors_bytes(weights))
        verbs: dict[str, Callable[[ThreadEngine], object]] = {
            "digest": lambda engine: tp.digest(path, engine=engine),
            "stats": lambda engine: tp.stats(path, engine=engine),
            "diff": lambda engine: tp.diff(path, path, engine=engine),
        }
        for name, verb in verbs.items():
            best = {True: float("inf"), False: float("inf")}
            for _ in range(RUNS):
                for mapped in best:
                    begun = time.perf_counter()
                    verb(ThreadEngine(mapped=mapped))
                    best[mapped] = min(best[mapped], time.perf_counter() - begun)
            price = best[False] / best[True] - 1
            print(f"{name:8} mapped {best[True]:.3f} s, read {best[False]:.3f} s: {price:+.0%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
