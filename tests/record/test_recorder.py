"""The recorder in trainings: every number against torch, what is due when, and what must not happen."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn

import torchparams as tp
from command import command
from torchparams.engines import ThreadEngine
from torchparams.errors import (
    FileFormatError,
    NoMatch,
    NotReadable,
    OptionError,
    SourceError,
    UnknownName,
    UnsupportedSource,
    WriteError,
)
from torchparams.record import meter, transfer
from torchparams.record import recorder as module
from torchparams.record.meter import Meter
from torchparams.record.sinks import tensorboard, wandb
from torchparams.sources.live import module as live_module
from torchparams.sources.live import tensors as live_tensors
from torchparams.sources.live import traverse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torchparams.record.recorder import Recorder
    from torchparams.record.watchdogs import RecordFinding


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))


def layer(model: nn.Sequential, i: int) -> Any:
    return model[i]


def batches(count: int) -> Iterator[torch.Tensor]:
    numbers = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(32, 8, generator=numbers)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder, steps: int) -> None:
    with recorder:
        for x in batches(steps):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss.item())
            recorder.step()
            optimizer.zero_grad()


def test_every_number_is_that_of_torch(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    expected: list[dict[str, dict[str, float]]] = []
    recorder = tp.Recorder(model, optimizer, tmp_path / "run", every=2)
    with recorder:
        for x in batches(5):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            model(x).square().mean().backward()
            optimizer.step()
            assert recorder.step()
            expected.append({})
            for name, p in model.named_parameters():
                assert p.grad is not None
                moved = (p.detach() - before[name]).double().norm()
                expected[-1][name] = {
                    "weight_norm": p.double().norm().item(),
                    "mean": p.double().mean().item(),
                    "std": p.double().std().item(),
                    "max_abs": p.abs().max().item(),
                    "zeros": (p == 0).double().mean().item(),
                    "nonfinite": 0,
                    "grad_norm": p.grad.double().norm().item(),
                    "grad_nonfinite": 0,
                    "update_norm": moved.item(),
                    "update_ratio": (moved / before[name].double().norm()).item() if before[name].any() else math.nan,
                }
            optimizer.zero_grad()
    found = tp.history(tmp_path / "run")
    assert found.steps == (0, 2, 4)
    for name, _ in model.named_parameters():
        rows = found[name]
        for i, step in enumerate((0, 2, 4)):
            for key, value in expected[step][name].items():
                assert rows[key][i] == pytest.approx(value, rel=1e-6, abs=1e-12, nan_ok=True), (name, key, step)


def test_histograms_count_powers_of_two(tmp_path: Path) -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.75, 3.0, 0.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with tp.Recorder(model, optimizer, tmp_path) as recorder:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        recorder.step()
    (row,) = tp.history(tmp_path).rows()
    assert (row.exponent, row.counts) == (-1, [2, 0, 1])  # two of [0.5, 1), none of [1, 2), one of [2, 4)
    assert row.zeros == 0.25


def test_the_default_records_at_step_0_and_at_least_every_100(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    recorder = tp.Recorder(model, optimizer, tmp_path)
    with recorder:
        for _ in range(250):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    steps = tp.history(tmp_path).steps
    assert steps[0] == 0
    assert all(10 <= b - a <= 100 for a, b in pairwise(steps))
    assert 250 - steps[-1] <= 100


def test_quantities_have_intervals_of_their_own(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every={"weights": 3, "gradients": 2}), 7)
    rows = tp.history(tmp_path)["0.weight"]
    assert rows["step"].tolist() == [0, 2, 3, 4, 6]
    assert rows["step"][~np.isnan(rows["weight_norm"])].tolist() == [0, 3, 6]
    assert rows["step"][~np.isnan(rows["grad_norm"])].tolist() == [0, 2, 4, 6]
    assert np.isnan(rows["update_norm"]).all()


def test_nothing_is_copied_where_no_update_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(module.Recorder, "_copy", lambda self: copies.append(self._next))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every={"updates": 4, "gradients": 1}), 9)
    assert copies == [0, 4, 8]


def test_steps_without_a_record_read_gradients_once_and_weights_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("measure", "distance", "nonfinite"):
        original = getattr(Meter, name)

        def counted(self: Any, *args: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
            calls.append(_name)
            return _original(self, *args, **options)

        monkeypatch.setattr(Meter, name, counted)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=5), 5)
    assert calls == ["measure", "measure", "distance"] + ["nonfinite"] * 4


def test_the_model_and_the_training_are_as_without_it(tmp_path: Path) -> None:
    results = []
    for recorded in (False, True):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        keys = set(vars(model)), set(vars(optimizer))
        if recorded:
            recorder = tp.Recorder(model, optimizer, tmp_path, every=1, rows="*.weight", by="module")
            assert not optimizer._optimizer_step_pre_hooks
            train(model, optimizer, recorder, 5)
            assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
            assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
        else:
            for x in batches(5):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert keys == (set(vars(model)), set(vars(optimizer)))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_groups_have_rows(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=1, by=["0.**", "3.**"]), 1)
    found = tp.history(tmp_path)
    group = found["0.**"]
    parts = [found[name] for name in ("0.weight", "0.bias")]
    assert group["weight_norm"][0] == pytest.approx(math.hypot(*(part["weight_norm"][0] for part in parts)))
    assert group["grad_norm"][0] == pytest.approx(math.hypot(*(part["grad_norm"][0] for part in parts)))
    assert {row.kind for row in found.rows() if row.name in ("0.**", "3.**", "(rest)")} == {"group"}
    with pytest.raises(NoMatch):
        tp.Recorder(model, optimizer, tmp_path / "other", by="nothing")
    assert not (tmp_path / "other").exists()


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counted = []
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        for i, x in enumerate(batches(8)):
            model(x).square().mean().backward()
            if i % 4 == 3:
                optimizer.step()
            counted.append(recorder.step())
            if i % 4 == 3:
                optimizer.zero_grad()
    assert counted == [False, False, False, True] * 2
    assert tp.history(tmp_path).steps == (0, 1)


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_step_that_a_scaler_skips_is_not_counted_but_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], accelerator: bool
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counted, norms = [], []
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        recorder._meter = Meter(by_torch=accelerator)
        for i, x in enumerate(batches(4)):
            loss = model(x * math.inf if i == 2 else x).square().mean()
            norms.append(torch.autograd.grad(loss, layer(model, 0).weight, retain_graph=True)[0].norm().item())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            counted.append(recorder.step())
            optimizer.zero_grad()
    assert counted == [True, True, False, True]
    found = tp.history(tmp_path)
    assert found.steps == (0, 1, 2)
    assert found["0.weight"]["grad_norm"].tolist() == pytest.approx([norms[i] for i in (0, 1, 3)])  # without the scale
    first = tp.diagnose(tmp_path).first
    assert first is not None and (first.step, first.rule) == (2, "nonfinite-gradient")
    assert "step 2: 0.weight: the gradient has" in capsys.readouterr().err


def test_the_number_of_elements_that_are_not_finite_is_right_or_unknown(tmp_path: Path) -> None:
    for accelerator in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        recorder = tp.Recorder(model, optimizer, tmp_path / str(accelerator), every=10, quiet=True)
        with recorder:
            recorder._meter = Meter(by_torch=accelerator)
            for step, x in enumerate(batches(3)):
                model(x).square().mean().backward()
                if step == 1:
                    layer(model, 0).weight.grad[0, :3] = math.nan
                    layer(model, 3).bias.grad[2] = math.inf
                optimizer.step()
                recorder.step()
                optimizer.zero_grad()
        gradients = [each for each in recorder.findings if (each.step, each.rule) == (1, "nonfinite-gradient")]
        assert [(each.step, each.name) for each in gradients] == [(1, "0.weight"), (1, "3.bias")]
        messages = [each.message.removeprefix("the gradient has ") for each in gradients]
        if accelerator:
            assert messages == ["elements that are not finite"] * 2
            assert all(math.isnan(each.value) for each in gradients)
        else:
            assert messages == ["3 elements that are not finite", "1 element that is not finite"]
            assert [each.value for each in gradients] == [3, 1]


def test_on_an_accelerator_a_record_is_one_transfer_and_other_steps_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    original = transfer.to_host

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        fetched.append(tensor.numel())
        return original(tensor)

    monkeypatch.setattr(transfer, "to_host", counted)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, tmp_path, every=4, rows="**.weight") as recorder:
        recorder._meter = Meter(by_torch=True)
        made = []
        for x in batches(6):
            model(x).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
            made.append(len(fetched))
            fetched.clear()
    assert made == [1, 0, 0, 0, 1, 0]


def test_a_record_measured_on_an_accelerator_is_the_same(tmp_path: Path) -> None:
    histories = []
    for accelerator in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = tp.Recorder(model, optimizer, tmp_path / str(accelerator), every=1, rows="**.weight", by="module")
        recorder._meter = Meter(by_torch=accelerator)
        train(model, optimizer, recorder, 3)
        histories.append(tp.history(recorder.path))
    for name in histories[0].names:
        for key, values in histories[0][name].items():
            np.testing.assert_allclose(histories[1][name][key], values, rtol=1e-6, err_msg=f"{name} {key}")
    assert [row.counts for row in histories[0].rows()] == [row.counts for row in histories[1].rows()]


def test_steps_without_a_record_run_no_python_for_each_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = meter.plain

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.numel())
        return original(tensor)

    monkeypatch.setattr(meter, "plain", counted)
    model = net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, tmp_path, every=100) as recorder:
        for x in batches(5):
            model(x).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
            made, calls[:] = len(calls), []
    assert made == 0


def test_the_model_is_listed_a_fixed_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    original = traverse.list_tensors

    def counted(*arguments: Any) -> Any:
        listed.append(1)
        return original(*arguments)

    for home in (live_module, live_tensors, traverse):
        monkeypatch.setattr(home, "list_tensors", counted)
    found = []
    for layers in (2, 40):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(layers)))
        for parameter in layer(model, 0).parameters():
            parameter.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        listed.clear()
        tp.Recorder(model, optimizer, tmp_path / str(layers))
        found.append(len(listed))
    assert found[0] == found[1] < 8


def test_gradients_that_are_gone_are_an_error(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        tp.Recorder(model, optimizer, tmp_path) as recorder,
        pytest.raises(OptionError, match=r"after optimizer.step\(\) and before zero_grad\(\)"),
    ):
        recorder.step()
    with pytest.raises(OptionError, match="inside `with recorder:`"):
        recorder.step()


def test_a_parameter_without_a_gradient_has_none_in_the_record(tmp_path: Path) -> None:
    model = net()
    layer(model, 0).bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=1), 2)
    found = tp.history(tmp_path)
    assert np.isnan(found["0.bias"]["grad_norm"]).all()
    assert not np.isnan(found["0.weight"]["grad_norm"]).any()
    assert found["0.bias"]["update_norm"].tolist() == [0, 0]


def test_a_layer_that_is_replaced_is_recorded_under_its_name(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        for i, x in enumerate(batches(4)):
            if i == 2:
                model[3] = nn.Linear(16, 2)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                recorder._optimizers[:] = [optimizer]
                for handle in recorder._handles:
                    handle.remove()
                recorder.__enter__()
            model(x).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    assert tp.history(tmp_path)["3.weight"]["step"].tolist() == [0, 1, 2, 3]


def test_a_finding_keeps_its_name_if_layers_before_it_are_removed(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with tp.Recorder(model, optimizer, tmp_path, every=3, quiet=True) as recorder:
        recorder._meter = Meter(by_torch=True)  # flags wait for the next record
        for step, x in enumerate(batches(4)):
            (model(x) if step < 3 else model(torch.randn(4, 16))).square().mean().backward()
            if step == 2:
                layer(model, 3).weight.grad[0] = math.nan
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
            if step == 2:
                model[0] = nn.Identity()
    assert [(each.step, each.name) for each in recorder.findings][:1] == [(2, "3.weight")]


def test_parameters_without_values_are_refused(tmp_path: Path) -> None:
    for model in (nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)):
        with pytest.raises(NotReadable, match="Initialise the model first"):
            tp.Recorder(model, torch.optim.SGD([nn.Parameter(torch.ones(1))]), tmp_path)


def test_dead_rows_are_counted(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        layer(model, 0).bias[:5] = -1e3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=1, rows="0.weight", quiet=True), 1)
    found = tp.history(tmp_path)
    assert found["0.weight"]["dead_rows"].tolist() == [5]
    assert np.isnan(found["3.weight"]["dead_rows"]).all()


def test_weights_that_are_given_other_memory_are_still_read(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        for i, x in enumerate(batches(3)):
            if i == 1:
                for p in model.parameters():
                    p.data = torch.full_like(p, 2.0)
            model(x).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
            norm = layer(model, 3).bias.detach().double().norm().item()
    assert tp.history(tmp_path)["3.bias"]["weight_norm"][-1] == pytest.approx(norm)


# --- the record on disk ----------------------------------------------------------------------------


def test_other_tools_read_the_record(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=1), 3)
    (piece,) = tmp_path.glob("parameters-*.parquet")
    table = pyarrow.parquet.read_table(piece)
    assert table.num_rows == 3 * 6
    assert {"step", "name", "weight_norm", "grad_norm", "update_ratio", "counts"} <= set(table.column_names)
    numbers = pyarrow.parquet.read_table(next(tmp_path.glob("numbers-*.parquet")))
    assert numbers.column("name").to_pylist() == ["loss"] * 3
    assert json.loads((tmp_path / "record.json").read_text())["format"] == "torchparams.record"


def test_a_row_takes_about_250_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(30)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        for _ in range(10):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    pieces = list(tmp_path.glob("parameters-*.parquet"))
    rows = sum(pyarrow.parquet.read_metadata(piece).num_rows for piece in pieces)
    assert rows == 600
    assert sum(piece.stat().st_size for piece in pieces) / rows < 250


def test_rows_wait_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER", (10_000, 20_000))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    waiting = []
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        for x in batches(30):
            model(x).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
            waiting.append(recorder._writer.nbytes)  # type: ignore[union-attr]
    assert max(waiting) <= 10_000 and len(list(tmp_path.glob("parameters-*.parquet"))) > 2
    assert tp.history(tmp_path).steps == tuple(range(30))


def test_a_record_is_resumed_and_overwritten_steps_stay_visible(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=1), 4)
    with pytest.raises(WriteError, match="resume=True"):
        tp.Recorder(model, optimizer, tmp_path)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=1, resume=True), 2)
    assert tp.history(tmp_path).steps == (0, 1, 2, 3, 4, 5)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=1, resume=True, start=3), 1)
    found = tp.history(tmp_path)
    rows = [(row.step, row.session, row.overwritten) for row in found.rows() if row.name == "0.weight"]
    assert rows == [
        *((step, 0, step == 3) for step in range(4)),
        *((4, 1, True), (5, 1, True), (3, 2, False)),
    ]
    assert found["0.weight"]["step"].tolist() == [0, 1, 2, 3]
    assert "3 steps from 3 on ran again after a resume" in str(found)


def test_findings_and_numbers_of_steps_that_ran_again_are_gone(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def session(steps: range, nan_at: int, **options: Any) -> None:
        with tp.Recorder(model, optimizer, tmp_path, every=1, quiet=True, **options) as recorder:
            for step in steps:
                model(torch.randn(8, 8)).mean().backward()
                if step == nan_at:
                    layer(model, 3).bias.grad[0] = math.nan
                recorder.log(loss=float(step))
                recorder._stepped = True
                recorder.step()
                optimizer.zero_grad()

    session(range(6), 4)
    first = tp.diagnose(tmp_path).first
    assert first is not None and (first.step, first.name) == (4, "3.bias")
    session(range(3, 5), -1, resume=True, start=3)
    assert tp.diagnose(tmp_path).first is None
    found = tp.history(tmp_path)
    assert found.numbers["loss"] == {step: float(step) for step in range(5)} and found.findings == ()


def test_resuming_reads_one_piece_and_continues_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, tmp_path, every=4) as recorder:
        for x in batches(11):
            model(x).square().mean().backward()
            optimizer.step()
            recorder.step()
            recorder.flush()
            optimizer.zero_grad()
    assert len(list(tmp_path.glob("parameters-*.parquet"))) == 3
    read = []
    original = pyarrow.parquet.read_table

    def counted(path: str, columns: list[str]) -> Any:
        read.append((os.path.basename(path), columns))
        return original(path, columns=columns)

    monkeypatch.setattr(pyarrow.parquet, "read_table", counted)
    recorder = tp.Recorder(model, optimizer, tmp_path, every=4, resume=True)
    assert read == [("parameters-000008.parquet", ["step", "session"])]
    assert recorder._next == 11  # the last record was of step 8, but ten more steps ran
    recorder = tp.Recorder(model, optimizer, tmp_path, every=4, resume=True)
    assert recorder._next == 11  # a session without steps changes nothing


def test_norms_of_nothing_finite_are_nan(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with tp.Recorder(model, optimizer, tmp_path, every=1, quiet=True) as recorder:
        for scale in (1.0, math.nan):
            (model(torch.ones(1, 2)).sum() * scale).backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    found = tp.history(tmp_path)
    for key in ("weight_norm", "max_abs", "mean", "grad_norm"):
        assert np.isnan(found["weight"][key]).tolist() == [False, True], key
    assert found["weight"]["nonfinite"].tolist() == [0, 4]
    (row,) = [line for line in str(found).splitlines() if line.startswith("weight")]
    assert "NaN" in row


def test_a_loss_that_is_nan_stays_nan(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        recorder.log(loss=math.nan, rate=math.inf)
        recorder.step()
    numbers = pyarrow.parquet.read_table(next(tmp_path.glob("numbers-*.parquet")))
    assert numbers.column("value").null_count == 0
    assert math.isnan(tp.history(tmp_path).numbers["loss"][0]) and tp.history(tmp_path).numbers["rate"][0] == math.inf


def test_a_training_does_not_import_what_it_does_not_need(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", KILLED.replace("100000", "3") + "print(*sys.modules)", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"pandas", "pyarrow.compute", "polars"} & set(found.stdout.split())


KILLED = """
import sys, torch, torchparams as tp
from torch import nn
model = nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with tp.Recorder(model, optimizer, sys.argv[1], every=1) as recorder:
    for step in range(100000):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        recorder.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            recorder.flush()
            print(step, flush=True)
"""


def test_a_killed_training_keeps_what_was_flushed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    flushed = -1
    for _ in range(20):
        flushed = int(child.stdout.readline())
    time.sleep(0.003)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    found = tp.history(tmp_path)
    assert set(range(flushed + 1)) <= set(found.steps)
    assert found["weight"]["step"].tolist() == list(range(len(found.steps)))


def test_a_full_disk_is_an_error_and_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = tp.Recorder(model, optimizer, tmp_path, every=1)
    train(model, optimizer, recorder, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    recorder._writer.add("numbers", {"step": [1], "name": ["loss"], "value": [1.0]})  # type: ignore[union-attr]
    with pytest.raises(WriteError, match="No space left on device"):
        recorder.flush()
    monkeypatch.undo()
    recorder.flush()
    assert tp.history(tmp_path).numbers["loss"].keys() == {0, 1}


def test_an_error_in_the_middle_of_a_flush_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = tp.Recorder(model, optimizer, tmp_path, every=1)
    original = os.replace

    def full(source: str, target: str) -> None:
        if "numbers-" in target:
            raise OSError(28, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WriteError, match="No space left on device"):
        train(model, optimizer, recorder, 1)
    monkeypatch.undo()
    train(model, optimizer, recorder, 1)
    found = tp.history(tmp_path)
    assert found["0.weight"]["step"].tolist() == [0, 1] and found.numbers["loss"].keys() == {0, 1}


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("record.json", b"{"),
        ("record.json", b"[]"),
        ("record.json", b'{"format": "torchparams.record", "version": 99, "sessions": []}'),
        ("parameters-000000.parquet", b"no parquet"),
        ("parameters-000001.parquet", b""),
    ],
)
def test_a_damaged_record_is_one_error(tmp_path: Path, name: str, contents: bytes) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=1), 1)
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(FileFormatError) as caught:
        tp.history(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_sinks_get_the_numbers(tmp_path: Path) -> None:
    scalars: list[tuple[str, float, int]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.append((step, numbers))

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sinks = [tensorboard(Writer()), wandb(Run())]
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, every=2, sinks=sinks), 3)
    assert [step for step, _ in logged] == [0, 2]
    rows = tp.history(tmp_path)["0.weight"]
    assert [numbers["weight_norm/0.weight"] for _, numbers in logged] == rows["weight_norm"].tolist()
    assert "loss" in logged[0][1]
    assert ("weight_norm/0.weight", rows["weight_norm"][1], 2) in scalars


def test_what_is_no_model_and_no_optimizer_is_refused(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedSource):
        tp.Recorder(model.state_dict(), optimizer, tmp_path)
    with pytest.raises(UnsupportedSource):
        tp.Recorder(model, "adam", tmp_path)
    with pytest.raises(OptionError, match="weights, gradients, updates, histograms"):
        tp.Recorder(model, optimizer, tmp_path, every={"norms": 1})
    with pytest.raises(OptionError):
        tp.Recorder(model, optimizer, tmp_path, every=-1)
    assert not list(tmp_path.iterdir())


def test_it_shows_its_cost_and_its_findings(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    found: list[RecordFinding] = []
    recorder = tp.Recorder(model, optimizer, tmp_path, every=1, on_finding=found.append, quiet=True)
    train(model, optimizer, recorder, 3)
    assert 0 < recorder.cost < 1
    assert f"3 steps · 3 records of 6 parameters · {recorder.cost:.1%} of the time" in str(recorder)
    assert found == recorder.findings != []


# --- history and diagnosis ---------------------------------------------------------------------------


def test_a_history_of_nothing_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing: No such file or directory$"):
        tp.history(tmp_path / "nothing")
    with pytest.raises(SourceError, match="No record and no checkpoints of several steps"):
        tp.history(tmp_path)


def test_history_of_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for step, x in zip((5, 10, 100), batches(3), strict=True):
        if step != 10:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        (tmp_path / f"step-{step}").mkdir()
        save_file(states[-1], tmp_path / f"step-{step}" / "model.safetensors")
    (tmp_path / "logs").mkdir()
    found = tp.history(tmp_path)
    assert found.steps == (5, 10, 100)
    assert found.repeated == ((10, 5),)
    rows = found["0.weight"]
    norms = [state["0.weight"].double().norm().item() for state in states]
    moved = (states[2]["0.weight"].double() - states[1]["0.weight"].double()).norm().item()
    assert rows["weight_norm"].tolist() == pytest.approx(norms)
    assert rows["update_norm"][1:].tolist() == pytest.approx([0, moved])
    assert rows["update_ratio"][2] == pytest.approx(moved / norms[1])
    assert "step 10 has the same bytes as step 5" in str(found)
    assert set(tp.history(tmp_path / "step-*", "0.*", steps=(10, None)).names) == {"0.weight", "0.bias"}
    with pytest.raises(SourceError):
        tp.history(tmp_path / "logs")
    with pytest.raises(UnknownName):
        found["nothing"]


def test_checkpoints_of_every_dtype_have_updates() -> None:
    rng = np.random.default_rng(0)
    a, b = (
        {
            "f32": torch.from_numpy(rng.standard_normal((7, 5), np.float32)),
            "bf16": torch.from_numpy(rng.standard_normal(900, np.float32)).bfloat16(),
            "f16": torch.from_numpy(rng.standard_normal(3, np.float32)).half(),
            "f64": torch.from_numpy(1e-200 * rng.standard_normal(4)),
            "int": torch.from_numpy(rng.integers(0, 100, 9)),
            "changed": torch.ones(2, dtype=dtype),
            "reshaped": torch.ones(2 if dtype == torch.float32 else 3),
            "empty": torch.zeros(0),
        }
        for dtype in (torch.float32, torch.bfloat16)
    )
    found = tp.history([a, b])
    for name in ("f32", "bf16", "f16", "f64", "int", "changed"):
        x, y = a[name].double().numpy(), b[name].double().numpy()
        scale = 1e-200 if name == "f64" else 1.0
        norm, base = np.linalg.norm((y - x) / scale) * scale, np.linalg.norm(x / scale) * scale
        assert found[name]["update_norm"].tolist() == pytest.approx([math.nan, norm], nan_ok=True), name
        assert found[name]["update_ratio"].tolist() == pytest.approx([math.nan, norm / base], nan_ok=True), name
    assert np.isnan(found["reshaped"]["update_norm"]).all()


def test_only_steps_of_the_same_bytes_are_repeated() -> None:
    steps: list[Any] = [{"w": np.array([0.0, 1.0])}, {"w": np.array([-0.0, 1.0])}, {"w": np.array([-0.0, 1.0])}]
    steps += [{"w": np.array([np.nan, 1.0], np.float32)}] * 2
    found = tp.history(steps)
    assert found.repeated == ((2, 1), (4, 3))
    assert found["w"]["update_norm"][1:3].tolist() == [0, 0]
    assert found["w"]["update_ratio"][1:3].tolist() == [0, 0]


class Counting(ThreadEngine):
    """Engine that counts the bytes of its jobs."""

    nbytes = 0

    def run(self, jobs: Any, *arguments: Any, **options: Any) -> Any:
        jobs = list(jobs)
        self.nbytes += sum(job.nbytes for job in jobs)
        return super().run(jobs, *arguments, **options)


def test_history_reads_checkpoints_once_to_measure_and_once_to_compare(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    for step in range(5):
        save_file({"w": rng.standard_normal((100, 10), np.float32)}, tmp_path / f"step-{step}.safetensors")
    engine = Counting()
    tp.history(tmp_path, engine=engine)
    assert engine.nbytes == 4000 * (5 + 2 * 4)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, optimizer, tp.Recorder(model, optimizer, tmp_path / "run", every=1), 4)
    shown = command(capsys, "history", tmp_path / "run", "-s", "3.*", "--steps", "1:2", "--show", "grad_norm")
    assert (shown.status, shown.err) == (0, "")
    assert "2 steps, 1 to 2 · 2 parameters" in shown.out
    form = command(capsys, "history", tmp_path / "run", "--json").json
    assert form["steps"] == [0, 1, 2, 3] and form["numbers"]["loss"].keys() == {"0", "1", "2", "3"}
    written = command(capsys, "history", tmp_path / "run", "-o", tmp_path / "h.csv")
    assert written.status == 0 and len((tmp_path / "h.csv").read_text().splitlines()) == 1 + 4 * 6
    assert command(capsys, "diagnose", tmp_path / "run").status == 0
    huge = torch.optim.SGD(model.parameters(), lr=1e20)
    train(model, huge, tp.Recorder(model, huge, tmp_path / "bad", every=1, quiet=True), 3)
    ran = command(capsys, "diagnose", tmp_path / "bad")
    assert ran.status == 1 and "first: step 0: 0.weight: one step changed the parameter by" in ran.out
    assert command(capsys, "diagnose", tmp_path / "bad", "--json").json["first"]["name"] == "0.weight"
    assert command(capsys, "history", tmp_path / "run", "--steps", "x").status == 2
    assert command(capsys, "history", tmp_path / "run", "--show", "nothing").status == 2
    assert command(capsys, "history", tmp_path).status == 2
