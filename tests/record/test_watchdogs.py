"""Watchdogs: each finds its example, and a planted bug of its kind by name and step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.record.watch import KEPT, Watch
from torchparams.record.watchdogs import HISTORY, WATCHDOGS, Seen, Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


def seen(step: int, columns: Mapping[str, float], before: Mapping[str, float]) -> Seen:
    def arrays(numbers: Mapping[str, float]) -> dict[str, Any]:
        return {key: np.array([float(value)]) for key, value in numbers.items() if key != "trainable"}

    ratios = np.full((1, KEPT), np.nan)
    if "update_ratio" in before:
        ratios[:, -HISTORY - 2 :] = [*[before["update_ratio"]] * HISTORY, *[columns["update_ratio"]] * 2]
    trainable = np.array([bool(columns.get("trainable", 1))])
    return Seen(step, ["w"], trainable, arrays(columns), arrays(before), ratios, np.array([False]), np.array([1.0]))


@pytest.mark.parametrize("watchdog", WATCHDOGS, ids=lambda watchdog: watchdog.name)
def test_each_finds_its_example_and_nothing_before(watchdog: Watchdog) -> None:
    first, second = watchdog.example
    assert not list(watchdog.look(seen(1, first, first)))
    (found,) = watchdog.look(seen(2, second, first))
    assert (found.step, found.rule, found.name) == (2, watchdog.name, "w")
    assert watchdog.about.endswith(".")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.backbone(x))
        return found


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    plant: Callable[[int], None] = lambda step: None,
    steps: int = 30,
    **options: Any,
) -> Any:
    numbers = torch.Generator().manual_seed(1)
    with tp.Recorder(model, optimizer, folder, every=1, quiet=True, **options) as recorder:
        for step in range(steps):
            plant(step)
            x = torch.randn(64, 8, generator=numbers)
            (model(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    return tp.diagnose(folder)


def test_a_sound_training_has_no_finding(tmp_path: Path) -> None:
    for i, make in enumerate((torch.optim.AdamW, torch.optim.SGD)):
        model = Net()
        found = run(model, make(model.parameters(), lr=1e-3), tmp_path / str(i), rows="**.weight", steps=60)
        assert [each for each in found.findings if each.rule != "dead-rows"] == []


def test_the_learning_rate_of_one_group(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam([{"params": part.parameters()} for part in (model.backbone, model.head)], lr=1e-3)

    def plant(step: int) -> None:
        if step == 12:
            optimizer.param_groups[1]["lr"] = 3.0

    found = run(model, optimizer, tmp_path, plant)
    assert found.first.step == 12
    assert found.first.rule == "exploding-update"
    assert found.first.name.startswith("head.")
    assert [step for step, _ in found.before] == [7, 8, 9, 10, 11, 12]


def test_a_frozen_backbone_that_moves(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def plant(step: int) -> None:
        if step == 5:  # by hand, after steps with momentum: its buffers go on, and running statistics too
            for parameter in model.backbone.parameters():
                parameter.requires_grad_(False)
        if step >= 5:
            for parameter in model.backbone.parameters():
                parameter.grad = torch.zeros_like(parameter)

    found = run(model, optimizer, tmp_path, plant)
    moving = {each.name: each.step for each in found.findings if each.rule == "frozen-moves"}
    assert moving["backbone.0.weight"] == 5
    assert moving["backbone.1.running_mean"] == 6
    assert not any(name.startswith("head") for name in moving)


def test_overflow_of_float16_in_one_layer(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    layer: Any = model.head[0]

    def overflow(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return (output.half() * 65504 * 2).float() if steps[0] == 9 else output

    steps = [0]
    layer.register_forward_hook(overflow)

    def plant(step: int) -> None:
        steps[0] = step

    found = run(model, optimizer, tmp_path, plant)
    assert (found.first.step, found.first.rule) == (9, "nonfinite-gradient")
    assert found.first.name.split(".")[0] in ("backbone", "head")
    assert {each.rule for each in found.findings if each.step == 9} >= {"nonfinite-gradient", "nonfinite-weight"}


def test_dying_relus(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    first: Any = model.head[0]

    def plant(step: int) -> None:
        if step == 7:
            with torch.no_grad():
                first.bias[:10] = -1e4

    found = run(model, optimizer, tmp_path, plant, rows="head.0.weight")
    dead = [each for each in found.findings if each.rule == "dead-rows" and each.step >= 7]
    rows = tp.history(tmp_path)["head.0.weight"]["dead_rows"]
    assert rows[7] >= 10 > rows[6]
    assert {each.name for each in found.findings if each.rule == "dead-rows"} == {"head.0.weight"} and dead is not None


def test_findings_between_records_have_their_step(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with tp.Recorder(model, optimizer, tmp_path, every=100, quiet=True) as recorder:
        for step in range(20):
            x = torch.randn(16, 8)
            (model(x).mean() * (math.nan if step == 13 else 1)).backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    found = tp.diagnose(tmp_path)
    assert found.first is not None and found.first.step == 13
    assert {(each.step, each.rule) for each in found.findings} >= {(13, "nonfinite-gradient"), (13, "nonfinite-weight")}


def test_records_without_weights_find_no_frozen_parameter_that_moves(tmp_path: Path) -> None:
    model = Net()
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    model.backbone.eval()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1e-3)
    with tp.Recorder(model, optimizer, tmp_path, every={"weights": 3, "gradients": 2}, quiet=True) as recorder:
        for _ in range(7):
            model(torch.randn(8, 8)).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    assert recorder.findings == [] and tp.diagnose(tmp_path).ok


def test_freezing_one_layer_keeps_what_is_known_of_the_others() -> None:
    watch = Watch(WATCHDOGS)
    watch.parameters(["a", "b"], [True, True])
    for step in range(6):
        assert not watch.record(step, {"update_ratio": np.array([1e-4, 1e-4]), "update_norm": np.ones(2)})
    watch.parameters(["c", "b"], [True, True], [None, 1])
    (found,) = watch.record(6, {"update_ratio": np.array([0.05, 0.05]), "update_norm": np.ones(2)})
    assert found.name == "b"


def test_checkpoints_far_apart_may_differ_much() -> None:
    rng = np.random.default_rng(0)
    weights = [{"w": rng.standard_normal(50), "bias": np.full(3, step / 1000)} for step in range(4)]
    assert tp.diagnose(weights).ok
    usual = [{"w": np.array([1.0 + 1e-4 * step])} for step in range(8)]
    found = tp.diagnose([*usual, {"w": np.array([1.5])}]).first
    assert found is not None and (found.step, found.rule) == (8, "exploding-update")
    assert found.message == "it changed since the previous checkpoint by 0.499 times its norm"


def test_a_parameter_that_passes_near_zero_does_not_explode() -> None:
    watch = Watch(WATCHDOGS)
    watch.parameters(["bias"], [True])
    for step, (before, after) in enumerate(pairwise([0.04, 0.033, 0.026, 0.019, 0.012, 0.005, -0.002])):
        update = abs(after - before)
        numbers = {"weight_norm": abs(after), "update_norm": update, "update_ratio": update / abs(before)}
        assert not watch.record(30 + step, {key: np.array([value]) for key, value in numbers.items()})
    numbers = {"weight_norm": 0.09, "update_norm": 0.1, "update_ratio": 10.0}
    (found,) = watch.record(40, {key: np.array([value]) for key, value in numbers.items()})
    assert found.rule == "exploding-update"
