"""Claim: `torchparams stats` is 25 × as fast as weightlens, in a fifth of its memory; memory is flat.

    python bench/bench_stats.py [rounds, 3 by default]

Whole processes, from start to end, page cache warm: `torchparams stats FILE` and `lens analyze FILE` (of the package
weightlens, installed in an environment of its own) on a model's file in bfloat16 and in float32, and on one of 20,000
small tensors. weightlens takes less of each tensor: mean, std, min, max, L2, the share of zeros, and about which
magnitude 99 % are below.

Then the memory of `torchparams stats` alone on sparse files of 10 and 20 GB: they take no place on the disk.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from common import DATA, encoded, llama_file, machine, paired, peer, print_pairs, process, torchparams

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = 20_000
GIGABYTE = 10**9


def weightlens() -> str:
    """The command of weightlens."""
    return peer("WEIGHTLENS", "lens", "weightlens==0.3.0")


def small_tensors(count: int = TENSORS) -> Path:
    """A file of so many tensors of 64 to 1,024 elements each, half of them bfloat16."""
    path = DATA / f"small-{count}.safetensors"
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        numbers = np.random.default_rng(0)
        parts = {}
        for i in range(count):
            values = numbers.standard_normal((16, int(numbers.integers(4, 65))), dtype=np.float32)
            dtype, code = (("bfloat16", "BF16"), ("float32", "F32"))[i % 2]
            parts[f"layers.{i // 10}.block{i % 10}.weight"] = code, values.shape, encoded(values, dtype)
        path.write_bytes(safetensors_of(parts))
    return path


def safetensors_of(parts: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A file of tensors with a type, a shape and bytes each."""
    header, at = {}, 0
    for name, (code, shape, data) in parts.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(data for _, _, data in parts.values())])


def sparse_file(gigabytes: int) -> Path:
    """A file of tensors of 100 MB each, all zeros, which takes no place on the disk."""
    path = DATA / f"sparse-{gigabytes}.safetensors"
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        each = GIGABYTE // 10
        header = {
            f"layers.{i}.weight": {"dtype": "BF16", "shape": [each // 2], "data_offsets": [i * each, (i + 1) * each]}
            for i in range(gigabytes * 10)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + gigabytes * GIGABYTE)
    return path


def main(rounds: int = 3) -> None:
    """Measure and print."""
    lens = weightlens()
    print(machine())
    for what, path in {
        "bfloat16, 750 MB": llama_file("bfloat16", 750),
        "float32, 1.5 GB": llama_file("float32", 1500),
        f"{TENSORS:,} tensors": small_tensors(),
    }.items():
        print(f"\n{what}")
        runs = {
            "torchparams stats": partial(process, torchparams("stats", path)),
            "lens analyze": partial(process, [lens, "analyze", path]),
        }
        results = paired(runs, rounds)
        print_pairs(results, "torchparams stats")
        memory = results["lens analyze"][1] / results["torchparams stats"][1]
        print(f"lens analyze takes {memory:.1f} × the memory")

    print("\nsparse files, torchparams stats")
    for gigabytes in (10, 20):
        path = sparse_file(gigabytes)
        seconds, peak = process(torchparams("stats", path))
        print(f"{gigabytes} GB: {seconds:.1f} s, {gigabytes / seconds:.1f} GB/s, peak {peak / 1e6:.0f} MB")
        path.unlink()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
