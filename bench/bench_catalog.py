"""Claim: a catalog of 1,000 checkpoints of 200 tensors takes less than 20 s, in memory that 100 take as well.

    python bench/bench_catalog.py [rounds, 3 by default]

Whole processes, page cache warm, without digests; the same for 100 of the checkpoints. The files are hard links to one,
which makes no difference to reading their headers.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial

import numpy as np
from safetensors.numpy import save_file

from common import DATA, machine, paired, print_pairs, process, torchparams

COUNT, TENSORS = 1000, 200


def main(rounds: int) -> None:
    print(machine())
    folder = DATA / "catalog"
    if not (folder / f"step-{COUNT - 1:04}.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / "step-0000.safetensors"
        save_file({f"layers.{i // 10}.m{i % 10}.weight": np.ones((8, 8), np.float32) for i in range(TENSORS)}, first)
        for i in range(1, COUNT):
            os.link(first, folder / f"step-{i:04}.safetensors")
    target = DATA / "catalog.parquet"

    def run(pattern: str) -> tuple[float, int]:
        shutil.rmtree(target, ignore_errors=True)
        return process(torchparams("catalog", str(folder / pattern), "-o", target))

    runs = {"catalog of 1,000 checkpoints": partial(run, "step-*"), "catalog of 100": partial(run, "step-00*")}
    print_pairs(paired(runs, rounds), "catalog of 1,000 checkpoints")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
