"""Claim: the recorder costs at most 2 % of a training at 1,024 tokens a step, by default, and 4 % at 192.

    python bench/bench_recorder.py [steps, 200 by default]

A transformer of 25 million parameters on random tokens, and 2,000 parameters of 256 elements. Three ways are compared
with the plain loop: the recorder as it is by default; everything at every step; and hooks on every gradient with
`torch.histc`, as `wandb.watch` sets them. Two trainings of equal models run at once, a step of each by turns: whole
runs one after the other differ by 15 % and more without any recorder. The error is that of the mean of the paired
differences. The recorder's CPU time is also measured directly, in its hook and its `step`; its share of a long run is
that of a step without a record and of a full record at every 100th step.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads would count as CPU time

import pyarrow
import torch
from torch import nn

import torchparams as tp
from common import machine

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, LAYERS, VOCABULARY = 512, 6, 6000


class Transformer(nn.Module):
    """25 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of predicting the tokens themselves."""
        found: torch.Tensor = self.head(self.layers(self.embed(tokens)))
        return nn.functional.cross_entropy(found.flatten(0, 1), tokens.flatten())


class Small(nn.Module):
    """2,000 parameters of 256 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A number."""
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x.square().mean()


class Timed:
    """CPU seconds of a recorder in each step: of its hook and of `step`."""

    def __init__(self, recorder: tp.Recorder) -> None:
        self.recorder = recorder
        self.seconds: list[float] = []
        self._now = 0.0
        before = recorder._before
        recorder._before = lambda *_: self._time(before)  # type: ignore[method-assign]

    def _time(self, call: Callable[[], object]) -> None:
        begun = time.process_time()
        call()
        self._now += time.process_time() - begun

    def step(self) -> None:
        """Record a step."""
        self._time(self.recorder.step)
        self.seconds.append(self._now)
        self._now = 0.0


def histogram(gradient: torch.Tensor) -> None:
    """Compute a histogram, as the hooks of `wandb.watch` do."""
    torch.histc(gradient, 64)


class Training:
    """A training of a copy of a model: one plain, or one with a recorder or hooks."""

    def __init__(self, model: nn.Module, how: str) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.timed: Timed | None = None
        self._around = ExitStack()
        if how == "hooks":
            for parameter in self.model.parameters():
                self._around.callback(cast("Any", parameter).register_hook(histogram).remove)
        elif how != "plain":
            folder = self._around.enter_context(tempfile.TemporaryDirectory())
            options: dict[str, Any] = {"every": 1} if how == "everything" else {}
            recorder = tp.Recorder(self.model, self.optimizer, f"{folder}/run", quiet=True, **options)
            self.timed = Timed(recorder)
            self._around.enter_context(recorder)

    def step(self, batch: torch.Tensor) -> None:
        """One step, and its seconds."""
        begun, used = time.perf_counter(), time.process_time()
        self.model(batch).backward()
        self.optimizer.step()
        if self.timed is not None:
            self.timed.step()
        self.optimizer.zero_grad()
        self.wall.append(time.perf_counter() - begun)
        self.cpu.append(time.process_time() - used)

    def close(self) -> None:
        """End the training: the last pieces of a record are written, which counts."""
        begun, used = time.perf_counter(), time.process_time()
        self._around.close()
        self.wall[-1] += time.perf_counter() - begun
        self.cpu[-1] += time.process_time() - used


def long_run(seconds: list[float], plain: float) -> str:
    """The cost of a default recorder in a long run, from its CPU seconds in each step."""
    middle = statistics.median(seconds)
    full = [each for each in seconds if each > 4 * middle]
    later = statistics.median(full[1:] or full)
    return (
        f"a step without a record {middle * 1e3:.1f} ms of CPU, the first record {full[0] * 1e3:.0f} ms, "
        f"a later one {later * 1e3:.0f} ms: {(middle + later / 100) / plain:.1%} of a long run"
    )


def more(measured: list[float], plain: list[float]) -> str:
    """By how much a series is larger than the other, with the standard error of the paired differences."""
    differences = [a - b for a, b in zip(measured, plain, strict=True)]
    mean = statistics.mean(plain)
    error = statistics.stdev(differences) / math.sqrt(len(plain))
    return f"{statistics.mean(differences) / mean:+6.1%} ± {error / mean:.1%}"


def compare(title: str, model: nn.Module, batch: torch.Tensor, steps: dict[str, int]) -> None:
    """Print what each way costs: two trainings, a step of each by turns."""
    print(f"\n{title}", flush=True)
    for way, count in steps.items():
        torch.manual_seed(0)
        pair = [Training(model, "plain"), Training(model, way)]
        for turn in range(count):
            for training in pair if turn % 2 == 0 else reversed(pair):
                training.step(batch)
        for training in pair:
            training.close()
        plain, other = pair
        print(
            f"  {way:<10} {count} steps of {statistics.mean(plain.wall) * 1e3:.1f} ms: "
            f"{more(other.wall, plain.wall)} of the time, {more(other.cpu, plain.cpu)} of the CPU",
            flush=True,
        )
        if other.timed is not None:
            seconds = other.timed.seconds
            print(f"    the recorder's own CPU: {sum(seconds) / sum(plain.cpu):.1%}", flush=True)
            if way == "default":
                print(f"    {long_run(seconds, statistics.median(plain.cpu))}", flush=True)


def peak(way: str) -> tuple[float, float]:
    """Megabytes that a training adds to this process at its peak, and those of Python, NumPy and Arrow in a second."""
    warm = Training(Small(), "everything")  # what is imported and allocated once
    warm.step(torch.randn(32, 16))
    warm.close()
    model, batch = Transformer(), torch.randint(0, VOCABULARY, (3, 64))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    for own in (False, True):
        if own:
            tracemalloc.start()
        training = Training(model, way)
        for _ in range(6):
            training.step(batch)
        training.close()
        if not own:
            most = resident("VmHWM") - before
    own_peak = tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory()
    return most, own_peak / 1e6


def resident(field: str) -> float:
    """A field of the memory of this process, in megabytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith(field))


def memory() -> None:
    """Print the peak memory of each way, medians of three processes."""
    print(
        "\npeak memory of six steps of 192 tokens; of it, by Python, NumPy and Arrow",
        flush=True,
    )
    found: dict[str, tuple[float, ...]] = {}
    command = [sys.executable, __file__, "peak"]
    for way in ("plain", "default", "everything", "hooks"):
        texts = [subprocess.run([*command, way], capture_output=True, check=True, text=True).stdout for _ in range(3)]
        found[way] = tuple(map(statistics.median, zip(*(map(float, text.split()) for text in texts), strict=True)))
        more = [f"{x:.1f} MB ({x - y:+.1f})" for x, y in zip(found[way], found["plain"], strict=True)]
        print(f"  {way:<10} {more[0]}; {more[1]}", flush=True)


def main(steps: int) -> None:
    print(machine())
    torch.manual_seed(0)
    model = Transformer()
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{nbytes / 4e6:.1f} M parameters, {nbytes / 1e6:.1f} MB")
    memory()
    every = {"default": steps, "everything": max(steps // 4, 4), "hooks": max(steps // 4, 4)}
    compare("2,000 parameters of 256 elements", Small(), torch.randn(32, 16), every)
    for tokens in (192, 1024):
        compare(f"{tokens} tokens", model, torch.randint(0, VOCABULARY, (tokens // 64, 64)), every)


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(*peak(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
