"""Claim: all statistics of a file cost at most 2.5 plain sums of it, and a 30th of torch's calls (of f32 a 15th).

    python bench/bench_sketch.py [millions of elements, 375 by default]

The statistics are zeros, NaN, ±Inf, min, max, mean, std, L1, L2, L∞, five quantiles, a histogram of 100 bins, entropy
and distinct values: exact for bf16; for f32 exact but for quantiles, histogram, entropy and distinct values.

Tensors have the shapes of a Llama model, once in a safetensors file in a warm page cache, once in memory. They are held
against a sum on as many threads as there are processors: of the same file, read the same way, and of the same tensors
in memory by `torch.sum`; and against mean, std, min, max, norm, isfinite, a count of zeros and histc by separate calls
of torch. Then fewer elements come as other kinds of data, and of other types: no kind may lose more than a factor 2.5.

Everything runs by turns in one process. Rates are medians of rounds, and the greatest of them in parentheses: on a
machine that others use too, the medians say more about them.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchparams.dtypes import DType
from torchparams.engines import Block, Folding, ThreadEngine, jobs_of, sketches
from torchparams.sketch import kernels
from torchparams.sources.opening import open_source
from torchparams.testing import MemorySource, safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.sources.base import Source

ROUNDS = 7
WIDTH, HIDDEN, VOCABULARY = 2048, 5632, 32_000
Array = np.ndarray[Any, Any]


def shapes(millions: float) -> dict[str, tuple[int, int]]:
    """Names and shapes of about so many elements."""
    found = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    layer = 0
    while sum(a * b for a, b in found.values()) < millions * 1e6:
        for name, shape in {
            **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
            **{f"mlp.{name}_proj": (HIDDEN, WIDTH) for name in ("gate", "up", "down")},
            **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (1, WIDTH)),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
        layer += 1
    return found


def numbers(kind: str, name: str, count: int) -> Array:
    """So many elements of a type: as weights are distributed, or as no weights are."""
    rng, dtype = np.random.default_rng(0), DType.of(name)
    if kind == "random bits":
        return np.frombuffer(rng.bytes(count * dtype.itemsize), np.uint8).view(dtype.numpy)
    few = rng.standard_normal(min(count, 1 << 24), dtype=np.float32)
    if dtype.kind in ("int", "uint"):
        few = abs(few) * np.float32(40 if dtype.bits == 8 else 30_000)
    elif dtype.bits > 8:
        few *= np.float32(0.02)
    values = np.resize(few, count)
    if kind == "constant":
        values = np.full(count, few[0])
    elif kind == "sorted":
        values = np.sort(values)
    elif kind == "half zeros":
        values *= np.resize(rng.integers(0, 2, 1 << 20).astype(np.float32), count)
    return values.astype(dtype.numpy)


def statistics_of(source: Source) -> int:
    """All statistics of every tensor."""
    count = 0
    for _, s in sketches(source):
        counts = (s.zeros, s.nan, s.posinf, s.neginf, s.distinct)
        moments = (s.min, s.max, s.mean, s.std(), s.l1, s.l2, s.linf, s.entropy)
        count += len(counts) + len(moments) + len(s.quantile([0.01, 0.25, 0.5, 0.75, 0.99])) + len(s.histogram(100)[0])
    return count


class Sum:
    """The fold that sums a tensor's bytes, as integers of 8."""

    def __init__(self) -> None:
        self.total = 0

    def update(self, block: Block) -> None:
        """Add a block."""
        self.total += int(block.data[: len(block.data) // 8 * 8].view(np.int64).sum())

    def finish(self) -> int:
        """The sum."""
        return self.total


def sum_of(source: Source) -> int:
    """A plain sum of every tensor, read as the statistics read it."""
    return sum(ThreadEngine().map(jobs_of(source), Folding(lambda job: Sum(), lambda job, parts: sum(parts))).values())


def torch_calls(tensor: torch.Tensor) -> None:
    """What one calls without a sketch."""
    wide = tensor.float()  # histc and norm want it
    tensor.mean(), tensor.std(), tensor.min(), tensor.max(), wide.norm()
    torch.isfinite(tensor).all(), (tensor == 0).sum(), torch.histc(wide, 100)


def rate(count: float, run: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Billions of `count` a second, of each round."""
    run()
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        taken.append(count / (time.perf_counter() - begun) / 1e9)
    return taken


def model(name: str, millions: float, folder: str) -> None:
    """The statistics of a model, in a file and in memory."""
    sizes = shapes(millions)
    pool = numbers("normal", name, 1 << 24)
    arrays = {key: np.resize(pool, a * b).reshape(a, b) for key, (a, b) in sizes.items()}
    total = sum(array.nbytes for array in arrays.values())
    numel = sum(array.size for array in arrays.values())
    path = Path(folder, f"{name}.safetensors")
    path.write_bytes(safetensors_bytes(arrays))
    in_file, in_memory = open_source(str(path)), MemorySource(arrays)
    kind = DType.of(name).torch
    tensors = [torch.from_numpy(array.view(f"i{array.itemsize}")).view(kind) for array in arrays.values()]
    some = max(tensors, key=torch.numel)

    print(f"\n{name}: {len(arrays)} tensors, {numel / 1e6:.0f} M elements, {total / 1e6:.0f} MB")
    runs: dict[str, Callable[[], object]] = {
        "plain sum, file": lambda: sum_of(in_file),
        "all statistics, file": lambda: statistics_of(in_file),
        "plain sum, memory": lambda: [tensor.sum() for tensor in tensors],
        "all statistics, memory": lambda: statistics_of(in_memory),
        "separate calls of torch, memory": lambda: torch_calls(some),
    }
    rates: dict[str, list[float]] = {what: [] for what in runs}
    for turn in range(ROUNDS):
        for what, run in runs.items():
            if what.startswith("separate"):
                if turn % 3 == 0:  # they take long enough to be sure of
                    rates[what] += rate(some.nbytes, run, 1)
            else:
                rates[what] += rate(total, run, 1)
    middle = {what: statistics.median(found) for what, found in rates.items()}
    for what, found in rates.items():
        share = ""
        if what.startswith("all"):
            where = what.rpartition(" ")[2]
            share = f"   {middle[what] / middle[f'plain sum, {where}']:5.2f} of that sum"
            share += f", {middle[what] / middle['separate calls of torch, memory']:5.1f} × the separate calls"
        per_second = middle[what] / total * numel
        print(f"  {what:34}{middle[what]:7.2f} ({max(found):6.2f}) GB/s {per_second:6.2f} G elements/s{share}")
    path.unlink()


def kinds(millions: float) -> None:
    """Other kinds of data, and other types."""
    count = int(millions * 1e6 / 8)
    print(
        f"\nsketches of {count / 1e6:.0f} M elements in memory: G elements/s of normal data, factors that others lose"
    )
    for name in ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "int8", "int32", "int64"):
        found: dict[str, float] = {}
        for kind in ("normal", "constant", "sorted", "random bits", "half zeros"):
            source = MemorySource({"w": numbers(kind, name, count)})
            found[kind] = max(rate(count, lambda: dict(sketches(source)), ROUNDS))  # noqa: B023  # it is called at once
        losses = ", ".join(f"{kind} {found['normal'] / r:.2f}" for kind, r in found.items() if kind != "normal")
        print(f"  {name:16}{found['normal']:8.2f}   {losses}")


def main(millions: float = 375) -> None:
    """Measure and print."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"kernels: {kernels.implementation()}; {torch.get_num_threads()} threads; {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bfloat16", "float32"):
            model(name, millions, folder)
    kinds(millions)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
