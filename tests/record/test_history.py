"""Histories of records and of checkpoints, and their diagnosis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from recorded_training import batches, net, train
from torchparams.engines import ThreadEngine
from torchparams.errors import SourceError, UnknownName

if TYPE_CHECKING:
    from pathlib import Path


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
