"""Claim: a .pt file of 750 MB is listed at least 10 times as fast as by torch.load(mmap=True), in less than 60 MB.

    python bench/bench_torchzip.py

Both are whole processes that print name, shape and dtype of every tensor, run by turns; the ratio is of their
medians, the memory the most that either ever held. The file is made once, in bench/data. A second table lists 5,000
tensors within one process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
ROUNDS = 7
OURS = """
import sys, torchparams
for info in torchparams.of(sys.argv[1]).infos.values():
    print(info.name, info.shape, info.dtype)
"""
OURS_TABLE = "import sys, torchparams; print(torchparams.of(sys.argv[1]))"
THEIRS = """
import sys, torch
for name, tensor in torch.load(sys.argv[1], mmap=True).items():
    print(name, tuple(tensor.shape), tensor.dtype)
"""


def make(path: Path, layers: int, width: int) -> None:
    """A state_dict of that many layers of seven matrices and two vectors."""
    import torch

    DATA.mkdir(exist_ok=True)
    state: dict[str, torch.Tensor] = {}
    for i in range(layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            state[f"model.layers.{i}.{part}.weight"] = torch.empty(width, width, dtype=torch.bfloat16)
        for part in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{part}.weight"] = torch.empty(width, dtype=torch.bfloat16)
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.rename(path)


def run(code: str, path: Path) -> tuple[float, float]:
    """Seconds and megabytes that a process takes from start to end."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"the process ended with {process.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def made(name: str, layers: int, width: int) -> Path:
    """The file of that name, which is made by another process: a child's memory counts from that of its parent."""
    path = DATA / name
    if not path.exists():
        code = f"import bench_torchzip as b; b.make(b.Path({str(path)!r}), {layers}, {width})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    return path


def main() -> None:
    """Measure and print."""
    large = made("large.pt", 24, 1488)
    ways = {"torchparams, every record": OURS, "torchparams, the table": OURS_TABLE, "torch.load(mmap=True)": THEIRS}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, float] = dict.fromkeys(ways, 0.0)
    for code in ways.values():
        run(code, large)  # what is not in the page cache yet is not counted
    for _ in range(ROUNDS):
        for name, code in ways.items():
            taken, held = run(code, large)
            seconds[name].append(taken)
            memory[name] = max(memory[name], held)
    print(f"{large.stat().st_size / 1e6:.0f} MB, whole processes, medians of {ROUNDS} rounds")
    base = statistics.median(seconds["torch.load(mmap=True)"])
    for name in ways:
        median = statistics.median(seconds[name])
        print(f"  {name:28} {median * 1e3:7.0f} ms  {base / median:5.1f} × as fast  {memory[name]:4.0f} MB at most")

    many = made("many.pt", 556, 4)
    import torchparams

    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        count = len(torchparams.of(str(many)).infos)
        times.append(time.perf_counter() - begun)
    print(f"{count:,} tensors, listed within a process: {statistics.median(times) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
