"""Helpers of the benchmarks: files with the shapes of a Llama model, and alternating measurements of processes.

    from common import llama_file, paired, process

Files are made once, in bench/data, without torch and in little memory.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DATA = Path(__file__).resolve().parent / "data"
WIDTH, HIDDEN, VOCABULARY = 2048, 5632, 32_000


def llama_shapes(elements: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama model of about so many elements, an embedding of 32,000 × 2,048 included."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    layer = 0
    count = VOCABULARY * WIDTH
    while count < elements:
        for name, shape in {
            **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
            "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
            count += int(np.prod(shape))
        layer += 1
    found["model.norm.weight"] = (WIDTH,)
    return found


def llama_file(dtype: str = "bfloat16", megabytes: int = 750, suffix: str = ".safetensors", seed: int = 0) -> Path:
    """A checkpoint of about so many megabytes (10⁶ bytes), values as weights are: normal, of scale 0.02.

    Args:
        dtype: `bfloat16`, `float16` or `float32`.
        megabytes: Its size.
        suffix: `.safetensors`, or `.pt` for a state dict by torch.save.
        seed: Of the values; another seed gives another file of the same shapes.
    """
    path = DATA / f"llama-{dtype}-{megabytes}-{seed}{suffix}"
    if path.exists():
        return path
    DATA.mkdir(exist_ok=True)
    itemsize = 4 if dtype == "float32" else 2
    shapes = llama_shapes(megabytes * 1e6 / itemsize)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    if suffix == ".pt":
        import torch

        source = llama_file(dtype, megabytes, seed=seed)
        from safetensors.torch import load_file

        torch.save(load_file(source), unfinished)
        unfinished.rename(path)
        return path
    code = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(seed)
    with open(unfinished, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = numbers.standard_normal(int(np.prod(shape)), dtype=np.float32)
            values *= 0.02
            if "norm" in name:
                values += 1
            file.write(encoded(values, dtype))
    unfinished.rename(path)
    return path


def encoded(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    """float32 values in another float type, rounded to nearest."""
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16).tobytes()
    return values.astype(dtype).tobytes()


_RUNNER = """
import os, subprocess, sys, time
begun = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, code, usage = os.wait4(child.pid, 0)
print(time.perf_counter() - begun, usage.ru_maxrss, os.waitstatus_to_exitcode(code))
"""


def process(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, status: int = 0) -> tuple[float, int]:
    """Seconds and peak bytes of memory of a process from start to end; `status` is what it must exit with."""
    # A child's peak begins with the memory of the process that started it, so a small one does.
    told = subprocess.run(
        [sys.executable, "-S", "-E", "-c", _RUNNER, *map(str, argv)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        # What is installed has its bytecode beside it: nothing is compiled anew in each process.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(env or {})},
    ).stdout.split()
    if int(told[2]) != status:
        raise SystemExit(f"{' '.join(map(str, argv))} ended with {told[2]}, not {status}")
    return float(told[0]), int(told[1]) * (1 if sys.platform == "darwin" else 1024)


def torchparams(*arguments: str | Path) -> list[str]:
    """The command line of the installed command."""
    return [str(Path(sys.executable).with_name("torchparams")), *map(str, arguments)]


def peer(variable: str, command: str, requirement: str) -> str:
    """The command of a package that is measured beside ours, installed in an environment of its own.

    Args:
        variable: An environment variable that names the command, where somebody has it already.
        command: Its name; looked for on the path, then in bench/data, where it is installed if it is nowhere.
        requirement: What pip installs.
    """
    found = os.environ.get(variable) or shutil.which(command)
    home = DATA / "peers" / requirement
    if found is None and not (home / "bin" / command).exists():
        print(f"installing {requirement} in {home}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "python"), "-m", "pip", "-q", "install", requirement], check=True)
    return found or str(home / "bin" / command)


def paired(runs: Mapping[str, Callable[[], tuple[float, int]]], rounds: int = 7) -> dict[str, tuple[float, int]]:
    """Median seconds and greatest memory of each, all run by turns after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks = dict.fromkeys(runs, 0)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            took, peak = run()
            peaks[name] = max(peaks[name], peak)
            if turn:
                seconds[name].append(took)
    return {name: (statistics.median(seconds[name]), peaks[name]) for name in runs}


def machine() -> str:
    """What it was measured on."""
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}"


def print_pairs(results: Mapping[str, tuple[float, int]], base: str) -> None:
    """A table of `paired` results; ratios are of the time of `base` to each."""
    for name, (seconds, peak) in results.items():
        ratio = seconds / results[base][0]
        print(f"{name:<44} {seconds * 1e3:>9,.0f} ms  {peak / 1e6:>7,.0f} MB   {ratio:>7.2f} × {base}")
