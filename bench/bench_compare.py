"""Claim: exact sums of a comparison cost no more than rounded ones did: 0.9 ns for an element of float32.

    python bench/bench_compare.py [rounds, 25 by default]

The kernel alone, on one thread, on 2²⁰ elements that all differ, for each vector unit of this machine. Shown are
the least nanoseconds for an element. The same script runs in an environment with an older version, for comparison.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from common import machine
from torchparams.sketch import _compare
from torchparams.sketch.compare import Values, comparison

ELEMENTS = 1 << 20


def main(rounds: int = 25) -> None:
    """Measure and print."""
    print(machine())
    numbers = np.random.default_rng(0)
    a = 0.02 * numbers.standard_normal(ELEMENTS)
    b = a + 0.001 * numbers.standard_normal(ELEMENTS)
    levels = _compare.levels()
    for dtype in ("float64", "float32", "float16"):
        x, y = (values.astype(dtype).view(np.uint8) for values in (a, b))
        found = []
        for level in range(levels):
            _compare.use(level)
            times = []
            for _ in range(rounds):
                made = comparison(Values.of(dtype), "c")
                begun = time.thread_time()
                made.update(x, y)
                times.append(time.thread_time() - begun)
            found.append(f"unit {level}: {min(times) / ELEMENTS * 1e9:5.2f} ns")
        print(f"{dtype:<10} {'   '.join(found)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
