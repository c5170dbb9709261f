"""Claim: digests of a file take at most 1.25 times as long as BLAKE3 alone, on all processors, of the same bytes.

    python bench/bench_digest.py [megabytes of the file, 750 by default]

The file has the shapes of a Llama model in bf16 and is in the page cache. It is held against one call of
`blake3(data, max_threads=blake3.AUTO)` on the same bytes in memory, and against `update_mmap` of the same file. So is
a file of a single tensor, which no two threads can share but within BLAKE3; and the file that `torch.save` makes of the
same tensors. Verifying reads instead of mapping, so that a file which becomes shorter meanwhile is an error.

All run by turns in one process. Rates are medians of rounds, the greatest of them in parentheses; shares are medians of
each round's own. Last comes a process of its own, from start to end, with its peak memory, on the file and on one of
twice its size.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

import torchparams as tp
from common import DATA, llama_file, machine, process, torchparams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROUNDS = 9


def single_tensor(megabytes: int) -> Path:
    """A file of one bf16 tensor, with the bytes of the other file."""
    path = DATA / f"single-{megabytes}.safetensors"
    if not path.exists():
        data = llama_file(megabytes=megabytes).read_bytes()
        data = data[: len(data) // 2 * 2]
        entry = {"dtype": "BF16", "shape": [len(data) // 2], "data_offsets": [0, len(data)]}
        header = json.dumps({"w": entry}).encode()
        header += b" " * (-len(header) % 8)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(len(header).to_bytes(8, "little") + header + data)
        unfinished.rename(path)
    return path


def in_memory(data: np.ndarray[Any, Any]) -> bytes:
    """BLAKE3 alone."""
    return blake3(data.data, max_threads=blake3.AUTO).digest()


def on_file(path: Path) -> bytes:
    """BLAKE3 alone, of a mapped file."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).digest()


def by_turns(nbytes: int, runs: dict[str, Callable[[], object]]) -> None:
    """Print rates in GB/s, and what share they are of the first two."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn:
                rates[name].append(nbytes / (time.perf_counter() - begun) / 1e9)
    memory, mapped = list(runs)[:2]
    for name, found in rates.items():
        shares = [
            statistics.median(a / b for a, b in zip(found, rates[base], strict=True)) for base in (memory, mapped)
        ]
        of = (
            f"   {shares[0]:.2f} of it in memory, {shares[1]:.2f} of it on the file"
            if name not in (memory, mapped)
            else ""
        )
        print(f"  {name:34}{statistics.median(found):6.2f} ({max(found):5.2f}) GB/s{of}")


def main(megabytes: int = 750) -> None:
    """Measure and print."""
    print(f"{machine()}; {ROUNDS} rounds")
    files = {
        "Llama shapes": llama_file(megabytes=megabytes),
        "one tensor": single_tensor(megabytes),
        "Llama shapes, torch.save": llama_file(megabytes=megabytes, suffix=".pt"),
    }
    for what, path in files.items():
        data = np.fromfile(path, np.uint8)
        expected = tp.digest(path)
        print(f"\n{what}: {path.name}, {len(data) / 1e6:.0f} MB")
        runs: dict[str, Callable[[], object]] = {
            "BLAKE3, memory": partial(in_memory, data),
            "BLAKE3, file (update_mmap)": partial(on_file, path),
            "digest": partial(tp.digest, path),
            "verify with a manifest": partial(tp.verify, path, expected),
        }
        if path.suffix == ".pt":
            runs["verify without (stored CRC-32)"] = partial(tp.verify, path)
        by_turns(len(data), runs)
        del data, runs

    print("\nprocesses")
    for path in (llama_file(megabytes=megabytes), llama_file(megabytes=2 * megabytes)):
        taken = [process(torchparams("digest", path)) for _ in range(ROUNDS)]
        seconds, peak = statistics.median(s for s, _ in taken), max(p for _, p in taken)
        print(f"  torchparams digest {path.name:38}{seconds:6.3f} s {peak / 1e6:6.0f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
