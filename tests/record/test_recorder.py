"""The recorder in trainings: every number against torch, what is due when, and what must not happen."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from recorded_training import batches, layer, net, train
from torchparams.errors import (
    NoMatch,
    NotReadable,
    OptionError,
)
from torchparams.record import meter, transfer
from torchparams.record import recorder as module
from torchparams.record.meter import Meter
from torchparams.sources.live import module as live_module
from torchparams.sources.live import tensors as live_tensors
from torchparams.sources.live import traverse

if TYPE_CHECKING:
    from pathlib import Path


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


@pytest.mark.parametrize("every", [1, 100, {"gradients": 1, "weights": 100}, {"gradients": 100, "updates": 1}])
@pytest.mark.parametrize("accelerator", [False, True])
def test_weights_are_checked_where_a_gradient_was_not_finite(tmp_path: Path, every: Any, accelerator: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tp.Recorder(model, optimizer, tmp_path, every=every, quiet=True) as recorder:
        recorder._meter = Meter(by_torch=accelerator)
        for step, x in enumerate(batches(3)):
            model(x).square().mean().backward()
            if step == 1:
                layer(model, 0).weight.grad[0, :3] = math.nan
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
            if step == 1 and not (accelerator and every == 100):  # there, the flag waits for the next record
                found = {(each.step, each.rule, each.name) for each in recorder.findings}
                assert found >= {(1, "nonfinite-gradient", "0.weight"), (1, "nonfinite-weight", "0.weight")}


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
