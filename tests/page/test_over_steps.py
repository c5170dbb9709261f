"""The report over steps: its numbers are those of the history, and it says what it leaves out."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import torchparams as tp
from command import command
from torchparams.errors import FileFormatError, NoMatch, OptionError, SourceError
from torchparams.page import over_steps

if TYPE_CHECKING:
    from pathlib import Path

    from torchparams.page.result import Page
    from torchparams.record.history_tree import History

STEPS = 6


def record(path: Path) -> Path:
    """A record of a small training, whose learning rate explodes at step 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with tp.Recorder(model, optimizer, path, every=1, by="module", quiet=True) as recorder:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = (model(torch.randn(16, 4)) ** 2).mean()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 1e3 if step == 4 else 0.01
            optimizer.step()
            recorder.log(loss=loss.item())
            recorder.step()
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("record") / "run")


def data_of(page: Page) -> dict[str, Any]:
    found = re.search(rb'<script type="application/json" id="data">(.*?)</script>', page.html, re.DOTALL)
    assert found is not None
    form: dict[str, Any] = json.loads(found[1])
    return form


def numbers(packed: dict[str, str]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(packed["data"]), f"<{packed['type']}")


def columns_are_those_of(form: dict[str, Any], history: History) -> None:
    """Each value of the page is the history's, rounded to float32; steps without one are NaN."""
    steps, names = numbers(form["history"]["steps"]).tolist(), form["table"]["names"]
    for key in over_steps.COLUMNS:
        expected = np.full((len(steps), len(names)), np.nan, np.float32)
        for place, name in enumerate(names):
            found = history[name]
            for step, value in zip(found["step"].tolist(), found[key].tolist(), strict=True):
                if step in steps:
                    expected[steps.index(step), place] = value
        if np.isnan(expected).all():
            assert key not in form["history"]["columns"]
        else:
            found = form["history"]["columns"][key]
            assert found["type"] == "f4"
            np.testing.assert_array_equal(numbers(found).reshape(expected.shape), expected, key)


def test_the_columns_are_those_of_the_history(run: Path, tmp_path: Path) -> None:
    history = tp.history(run)
    page = tp.report(run, tmp_path / "r.html")
    form = data_of(page)
    assert (tmp_path / "r.html").read_bytes() == page.html
    assert form["source"]["format"] == "record"
    assert form["table"]["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert numbers(form["history"]["steps"]).tolist() == list(history.steps) == list(range(STEPS))
    assert set(form["history"]["columns"]) == set(over_steps.COLUMNS)
    columns_are_those_of(form, history)
    (loss,) = form["history"]["numbers"]
    assert loss["name"] == "loss"
    assert dict(zip(numbers(loss["steps"]).tolist(), numbers(loss["values"]).tolist(), strict=True)) == {
        step: pytest.approx(value, rel=1e-6) for step, value in history.numbers["loss"].items()
    }
    # Groups are rows of the record, and no tensors.
    assert form["history"]["notes"] == ["2 names without a parameter of its own (groups) are left out."]


def test_findings_lead_to_their_tensor_and_step(run: Path) -> None:
    history = tp.history(run)
    form = data_of(tp.report(run))
    assert history.findings
    expected = {(each.rule, each.name, each.step, each.message) for each in history.findings}
    names = form["table"]["names"]
    found = {(each["id"], names[row], step, why) for each in form["findings"] for row, why, step in each["items"]}
    assert found == expected
    assert all(each["why"] for each in form["findings"])


def test_a_history_of_checkpoints(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 4))
    states = [{"a.0.w": weights * (1 + i), "a.1.w": weights + i} for i in (0, 1, 1)]
    history = tp.history(states)
    form = data_of(tp.report(history))
    assert form["source"]["format"] == "checkpoints"
    columns_are_those_of(form, history)
    assert "grad_norm" not in form["history"]["columns"]
    assert form["history"]["notes"] == ["Step 2 has the same bytes as step 1."]
    chosen = data_of(tp.report(history, selector="a.1.*"))
    assert chosen["table"]["names"] == ["a.1.w"]
    columns_are_those_of(chosen, history)
    with pytest.raises(NoMatch):
        tp.report(history, selector="b")


def test_a_directory_and_a_pattern_of_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import save_file

    for step in (10, 20):
        save_file({"a.w": np.full((2, 2), step, np.float32)}, tmp_path / f"step-{step}.safetensors")
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"a.w": np.full((2, 2), step, np.float32)}, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    for pattern in ("step-*", "checkpoint-*"):
        form = data_of(tp.report(str(tmp_path / pattern)))
        assert numbers(form["history"]["steps"]).tolist() == [10, 20]
    for path in tmp_path.glob("step-*"):
        path.unlink()
    ran = command(capsys, "report", tmp_path, "-o", tmp_path / "report.html")
    assert ran.status == 0 and (tmp_path / "report.html").exists()
    assert numbers(data_of(tp.report(tmp_path))["history"]["steps"]).tolist() == [10, 20]
    # A checkpoint beside those of steps is the target itself.
    save_file({"a.w": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    assert "history" not in data_of(tp.report(tmp_path))
    with pytest.raises(SourceError, match="The pattern matches nothing"):
        tp.report(str(tmp_path / "nothing-*"))


def test_of_a_step_that_ran_twice_the_later_run_counts(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start, resume in ((0, False), (1, True)):
        with tp.Recorder(
            model, optimizer, tmp_path / "run", every=1, start=start, resume=resume, quiet=True
        ) as recorder:
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                recorder.step()
    history = tp.history(tmp_path / "run")
    form = data_of(tp.report(tmp_path / "run"))
    assert history.data["overwritten"].any()
    columns_are_those_of(form, history)
    assert form["history"]["notes"] == ["2 steps ran again after a resume; the later run is shown."]


def test_too_many_steps_are_thinned_and_those_of_findings_stay(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_steps, "MOST_VALUES", 3 * 4 * len(over_steps.COLUMNS))
    history = tp.history(run)
    form = data_of(tp.report(history))
    steps = numbers(form["history"]["steps"]).tolist()
    assert len(steps) == 3
    assert {0, history.findings[0].step, STEPS - 1} == set(steps)
    assert "3 of 6 steps are in this page" in form["history"]["notes"][0]
    columns_are_those_of(form, history)


def test_a_long_number_keeps_its_extremes_and_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_steps, "MOST_POINTS", 30)
    values = np.sin(np.arange(1000.0))
    values[500], values[600], values[700] = 9, -9, np.nan
    kept = over_steps._outline(values)
    assert len(kept) <= 32
    assert {0, 500, 600, 700, 999} <= set(kept.tolist())
    assert over_steps._outline(values[:30]).tolist() == list(range(30))


def test_options_of_checkpoints_are_refused(run: Path) -> None:
    options: list[dict[str, Any]] = [
        {"other": run},
        {"spectra": "*"},
        {"pictures": "*"},
        {"buffers": True},
        {"rename": {}},
    ]
    for option in options:
        with pytest.raises(OptionError, match=f"A report over steps takes no {next(iter(option))}"):
            tp.report(run, **option)


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"[Nn]ot JSON"):
        tp.report(tmp_path)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "report", run, "-o", tmp_path / "r.html", "--json")
    assert ran.status == 0
    assert json.loads(ran.out)["tensors"] == 4
    assert tp.report(run).html == (tmp_path / "r.html").read_bytes()
