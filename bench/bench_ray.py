"""Goal: on two idle cores, statistics on Ray take at most 15 % longer than on threads, with workers warm.

    python bench/bench_ray.py [gigabytes, 4 by default] [rounds, 7 by default] [workers, 2 by default]

Within one process, by turns, page cache warm: `tp.stats` of a directory of shards, with mean, std, min and max of every
row read, on as many threads as there are workers, and on a local Ray cluster of one worker for each. Starting Ray and
the first call, which starts the workers, are not counted. Both give the same rows, which is checked.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import torchparams as tp
from common import DATA, llama_file, machine, paired, print_pairs
from torchparams.engines import Engine, RayEngine, ThreadEngine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHARD_MEGABYTES = 500


def shards(gigabytes: float) -> Path:
    """The directory: shards of bfloat16, copies of one file under other names."""
    count = max(round(gigabytes * 1000 / SHARD_MEGABYTES), 1)
    folder = DATA / f"ray-{count}x{SHARD_MEGABYTES}"
    if folder.exists():
        return folder
    source = llama_file(megabytes=SHARD_MEGABYTES)
    half = folder.with_name(f"{folder.name}.unfinished")
    half.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        one = tp.convert(source, half / f"part-{number}.safetensors", rename=[f"^=part{number}."], overwrite=True)
        one.run()
    places = {f"part{number}.{name}": f"part-{number}.safetensors" for number in range(count) for name in tp.of(source)}
    (half / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    half.rename(folder)
    return folder


def timed(folder: Path, engine: Engine) -> Callable[[], tuple[float, int]]:
    """A run, for `paired`: its seconds, and no figure for memory."""

    def run() -> tuple[float, int]:
        gc.collect()
        begun = time.perf_counter()
        for row in tp.stats(folder, engine=engine).rows:
            _ = row.mean, row.std, row.min, row.max
        return time.perf_counter() - begun, 0

    return run


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    rounds, workers = (int(sys.argv[at]) if len(sys.argv) > at else default for at, default in ((2, 7), (3, 2)))
    folder = shards(gigabytes)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray's 15 would give way to whatever else runs
    import ray

    options: dict[str, Any] = {"num_cpus": workers, "object_store_memory": 200 << 20, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="error", **options)
    try:
        threads, away = ThreadEngine(workers, mapped=True), RayEngine()
        assert tp.stats(folder, engine=away).to_json() == tp.stats(folder, engine=threads).to_json()
        print(machine())
        base, other = f"threads, {gigabytes:g} GB of shards", f"Ray, {gigabytes:g} GB of shards"
        print_pairs(paired({base: timed(folder, threads), other: timed(folder, away)}, rounds), base)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
