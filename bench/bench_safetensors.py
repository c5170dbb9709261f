"""Claim: a safetensors file of 100,000 tensors is listed in at most twice the time of `json.loads` of its header.

    python bench/bench_safetensors.py [tensors]

Listing is opening the file and having name, shape and dtype of every tensor. Both are timed by turns in one process;
the ratio is of their medians. The reference's own reader stands beside them: it gives the names, and shape and dtype
of each on being asked.
"""

from __future__ import annotations

import json
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 9


def header_of(count: int) -> dict[str, object]:
    """Entries such as a mixture of experts has, of four bytes each or a little more."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for i in range(count):
        shape = [2, 1 + i % 3] if i % 4 else [4]
        stop = start + 2 * (shape[0] * (shape[1] if len(shape) > 1 else 1))
        name = f"model.layers.{i // 400}.block_sparse_moe.experts.{i % 400 // 4}.w{i % 4}.weight"
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    return entries


def list_ours(path: str) -> int:
    return sum(1 for info in tp.of(path).infos.values() if info.name and info.dtype and info.shape is not None)


def list_theirs(path: str) -> int:
    with safetensors.safe_open(path, "np") as file:
        pieces = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118  # it is no mapping
        return sum(1 for name, piece in pieces if name and piece.get_dtype() and piece.get_shape() is not None)


def main(count: int = 100_000) -> None:
    """Measure and print."""
    entries = header_of(count)
    text = json.dumps(entries, separators=(",", ":"))
    header = text.encode() + b" " * (-len(text) % 8)
    last = list(entries.values())[-1]
    assert isinstance(last, dict)
    del entries
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "many.safetensors"))
        Path(path).write_bytes(struct.pack("<Q", len(header)) + header + bytes(last["data_offsets"][1]))
        runs: dict[str, Callable[[], object]] = {
            "json.loads of the header": lambda: json.loads(header),
            "torchparams: open, list all": lambda: list_ours(path),
            "safetensors: open, ask for all": lambda: list_theirs(path),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                begun = time.perf_counter()
                kept = run()
                times[name].append(time.perf_counter() - begun)
                del kept
    print(f"{count:,} tensors, header of {len(header) / 1e6:.1f} MB, medians of {ROUNDS} rounds")
    base = statistics.median(times["json.loads of the header"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"  {name:32} {median * 1e3:7.1f} ms   {median / base:5.2f} ×")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
