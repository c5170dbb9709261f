"""The record on disk: what it holds, what a kill, an error or damage leaves of it, and how it goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn

import torchparams as tp
from recorded_training import batches, layer, net, train
from torchparams.errors import (
    FileFormatError,
    OptionError,
    UnsupportedSource,
    WriteError,
)
from torchparams.record import recorder as module
from torchparams.record.sinks import tensorboard, wandb

if TYPE_CHECKING:
    from pathlib import Path

    from torchparams.record.watchdogs import RecordFinding


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


def test_only_leftovers_of_a_record_are_removed(tmp_path: Path) -> None:
    for resume in (False, True):
        (tmp_path / "draft.unfinished").write_text("of a killed process, if there is a record")
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer, tp.Recorder(model, optimizer, tmp_path, resume=resume), 1)
        assert (tmp_path / "draft.unfinished").exists() == (not resume)


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
