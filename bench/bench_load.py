"""Claim: a checkpoint of 750 MB is loaded no slower than by model.load_state_dict(torch.load(mmap=True)).

    python bench/bench_load.py [--megabytes 750] [--rounds 7]

The peak of memory is that of the model plus at most 10 %. Each way is a process of its own that makes the model, whose
parameters are of the file's shapes and bfloat16 like it, and loads into it; the time is that of loading alone, taken
within the process, the memory the most that the process held beyond what it held before the model was made. A second
table casts: the file is bfloat16, the model float32. For .safetensors, the other way is
model.load_state_dict(safetensors.torch.load_file(path)). Coverage alone is timed at 50,000 tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from common import DATA, llama_file, machine

if TYPE_CHECKING:
    from pathlib import Path

CODE = """
import json, resource, sys, time
import torch, torchparams as tp
path, way, dtype = sys.argv[1:]
import safetensors.torch
import torchparams.train.load

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

class Model(torch.nn.Module):
    def __init__(self, infos):
        super().__init__()
        for name, info in infos.items():
            *path, last = name.split(".")
            here = self
            for part in path:
                if part not in here._modules:
                    here.add_module(part, torch.nn.Module())
                here = here._modules[part]
            here.register_parameter(last, torch.nn.Parameter(torch.zeros(info.shape, dtype=getattr(torch, dtype))))

infos = tp.of(path).infos
before = resident()
model = Model(infos)
for parameter in model.parameters():
    parameter.data.fill_(1)  # the memory is there: a model has been initialised
begun = time.perf_counter()
if way == "torchparams":
    tp.load(model, path)
elif path.endswith(".safetensors"):
    model.load_state_dict(safetensors.torch.load_file(path))
else:
    model.load_state_dict(torch.load(path, mmap=True))
seconds = time.perf_counter() - begun
nbytes = sum(p.nbytes for p in model.parameters())
print(json.dumps({"seconds": seconds, "peak": (peak() - before) / nbytes}))
"""


def run(path: Path, way: str, dtype: str) -> tuple[float, float]:
    """Seconds of loading, and the peak of memory as a multiple of the model's bytes."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(path), way, dtype], check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout)
    return found["seconds"], found["peak"]


def compare(path: Path, dtype: str, other: str, rounds: int) -> None:
    """Both ways by turns, after a warm-up round."""
    results: dict[str, list[tuple[float, float]]] = {"torchparams": [], other: []}
    for turn in range(rounds + 1):
        for way, found in results.items():
            taken = run(path, way, dtype)
            if turn:
                found.append(taken)
    base = statistics.median(seconds for seconds, _ in results[other])
    print(f"{path.stat().st_size / 1e6:.0f} MB {path.suffix}, bfloat16 into {dtype}, medians of {rounds} rounds")
    for way, found in results.items():
        median = statistics.median(seconds for seconds, _ in found)
        peak = max(peak for _, peak in found)
        print(f"  {way:<44} {median * 1e3:>7,.0f} ms  {median / base:>5.2f} ×   peak {peak:.2f} × the model")


def coverage(count: int) -> None:
    """Time of matching names, of a model and a checkpoint of so many tensors."""
    import torch
    from safetensors.torch import save_file

    import torchparams as tp

    model = torch.nn.ParameterDict({f"p{i}": torch.nn.Parameter(torch.zeros(2)) for i in range(count)})
    path = DATA / f"coverage-{count}.safetensors"
    fitting = {f"p{i}": torch.zeros(2) for i in range(count)}
    save_file(fitting, path)
    states: dict[str, Any] = {
        "all fit": fitting,
        "all fit, a file": path,
        "all have a prefix": {f"module.p{i}": torch.zeros(2) for i in range(count)},
        "none fits": {f"q{i}": torch.zeros(3) for i in range(count)},
    }
    for what, state in states.items():
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            tp.coverage(model, state)
            times.append(time.perf_counter() - begun)
        print(f"coverage of {count:,} tensors, {what:<18} {statistics.median(times) * 1e3:>6,.0f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=750)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(machine())
    for suffix in (".pt", ".safetensors"):
        path = llama_file("bfloat16", arguments.megabytes, suffix)
        other = "load_state_dict(torch.load(mmap=True))" if suffix == ".pt" else "load_state_dict(load_file(path))"
        for dtype in ("bfloat16", "float32"):
            compare(path, dtype, other, arguments.rounds)
    coverage(50_000)


if __name__ == "__main__":
    main()
