"""Claim: the recorder costs at most 2 % of a training at 1,024 tokens a step, by default, and 4 % at 192.

    python bench/bench_recorder.py [rounds, 2 by default] [steps, 40 by default]

A transformer of 25 million parameters on random tokens, and 2,000 parameters of 256 elements; whole trainings by turns:
the plain loop; the recorder as it is by default; everything at every step; and hooks on every gradient with
`torch.histc`, as `wandb.watch` sets them. The recorder's CPU time is also measured directly, in its hook and its
`step`: a short run has relatively many full records, so the share of a long run is that of a step without a record and
of a full record at every 100th step.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads would count as CPU time

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


WAYS = ("plain", "default", "everything", "hooks")


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


def training(model: nn.Module, batch: torch.Tensor, steps: int, how: str) -> tuple[float, float, list[float]]:
    """Wall and CPU seconds of a training, and CPU seconds of the recorder in each step."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    folder = tempfile.mkdtemp()
    handles: list[Any] = []
    if how == "hooks":

        def hook(grad: torch.Tensor) -> None:
            torch.histc(grad, 64)

        handles = [cast("Any", parameter).register_hook(hook) for parameter in model.parameters()]
    options: dict[str, Any] = {"every": 1} if how == "everything" else {}
    recorded = how in ("default", "everything")
    timed = Timed(tp.Recorder(model, optimizer, f"{folder}/run", quiet=True, **options)) if recorded else None
    begun, used = time.perf_counter(), time.process_time()
    with timed.recorder if timed else nullcontext():
        for _ in range(steps):
            model(batch).backward()
            optimizer.step()
            if timed is not None:
                timed.step()
            optimizer.zero_grad()
    took, used = time.perf_counter() - begun, time.process_time() - used
    for handle in handles:
        handle.remove()
    shutil.rmtree(folder)
    return took, used, [] if timed is None else timed.seconds


def compare(title: str, model: nn.Module, batch: Callable[[], torch.Tensor], rounds: int, steps: int) -> None:
    """Print what each way costs, in pairs with the plain loop of the same round."""
    print(f"\n{title}, {steps} steps", flush=True)
    ratios: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    plain: list[float] = []
    for _ in range(rounds):
        base = training(model, batch(), steps, "plain")
        plain.append(base[1] / steps)
        print(f"  plain        {base[0] / steps * 1e3:7.1f} ms a step, {plain[-1] * 1e3:7.1f} ms of CPU", flush=True)
        for way in WAYS[1:]:
            took, used, seconds = training(model, batch(), steps, way)
            ratios[way].append((took / base[0] - 1, used / base[1] - 1))
            text = f"  {way:<12} {ratios[way][-1][0]:+7.1%} of the time, {ratios[way][-1][1]:+7.1%} of the CPU"
            if seconds:
                text += f"; the recorder's CPU: {sum(seconds) / used:.1%}"
            print(text, flush=True)
            if way == "default":
                middle = statistics.median(seconds)
                full = [each for each in seconds if each > 4 * middle]
                later = statistics.median(full[1:] or full)
                share = (middle + later / 100) / statistics.median(plain)
                print(
                    f"    a step without a record {middle * 1e3:.1f} ms of CPU, the first record {full[0] * 1e3:.0f} "
                    f"ms, a later one {later * 1e3:.0f} ms: {share:.1%} of a long run",
                    flush=True,
                )
    for way in WAYS[1:]:
        wall, cpu = (statistics.median(each) for each in zip(*ratios[way], strict=True))
        print(f"  median: {way:<12} {wall:+.1%} of the time, {cpu:+.1%} of the CPU", flush=True)


def main(rounds: int, steps: int) -> None:
    print(machine())
    model = Transformer()
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    compare("2,000 parameters of 256 elements", Small(), lambda: torch.randn(32, 16), rounds, steps)
    for tokens, some in ((192, steps), (1024, steps // 2)):
        compare(f"{tokens} tokens", model, lambda t=tokens: torch.randint(0, VOCABULARY, (t // 64, 64)), rounds, some)  # type: ignore[misc]


if __name__ == "__main__":
    main(*(int(each) for each in (*sys.argv[1:], *("2", "40")[len(sys.argv) - 1 :])))
