"""`torchparams stats`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from command import command
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    arrays: dict[str, Any] = {
        "layers.0.fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "layers.0.fc.bias": np.zeros(2, np.float32),
        "layers.1.fc.weight": np.array([[np.nan, 1, 2], [3, 4, 5]], np.float32),
        "head.weight": np.array([[-1, 1]], np.float16),
    }
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(arrays))
    return "m.safetensors"


def test_a_row_for_each_tensor_and_what_to_look_at(model: str, capsys: Captured) -> None:
    ran = command(capsys, "stats", model)
    assert ran.status == 0
    assert ran.err == ""
    assert ran.out == (
        "m.safetensors (safetensors)\n"
        "name                mean   std  min  max  zeros  NaN/Inf  histogram\n"
        "layers.0.fc.weight   2.5  1.87    0    5    17%           █ █ █  █ █ █\n"
        "layers.0.fc.bias       0     0    0    0   100%                 █\n"
        "layers.1.fc.weight     3  1.58    1    5               1  █  █  █  █ █\n"
        "head.weight            0  1.41   -1    1                  █          █\n"
        "4 tensors · 16 parameters · 60 B\n"
        "flags: 1 non-finite\n"
        "  layers.1.fc.weight: 1 NaN among 6 values\n"
    )


def test_groups(model: str, capsys: Captured) -> None:
    assert command(capsys, "stats", model, "--by", "layer").out == (
        "m.safetensors (safetensors)\n"
        "group     tensors  numel  mean   std  min  max  zeros  NaN/Inf  histogram\n"
        "layers.0        2      8  1.88  1.96    0    5    38%           █ ▃ ▃  ▃ ▃ ▃\n"
        "layers.1        1      6     3  1.58    1    5               1  █  █  █  █ █\n"
        "head            1      2     0  1.41   -1    1                  █          █\n"
        "4 tensors · 16 parameters · 60 B\n"
        "flags: 1 non-finite\n"
        "  layers.1.fc.weight: 1 NaN among 6 values\n"
    )


def test_by_selectors(model: str, capsys: Captured) -> None:
    ran = command(capsys, "stats", model, "--by", "**.bias", "--by", "layers.**", "--json")
    assert [(row["name"], row["tensors"]) for row in ran.json["rows"]] == [
        ("**.bias", 1), ("layers.**", 3), ("(rest)", 1),
    ]  # fmt: skip
    assert ran.json["by"] == ["**.bias", "layers.**"]


def test_select_sort_limit_quantiles(model: str, capsys: Captured) -> None:
    ran = command(capsys, "stats", model, "-s", "**.weight", "--sort=-mean", "--limit", "2", "-q", "0.5,1")
    lines = ran.out.splitlines()
    assert lines[1].split()[5:7] == ["50%", "100%"]
    assert [line.split()[0] for line in lines[2:5]] == ["layers.1.fc.weight", "…", "head.weight"]


def test_wide(model: str, capsys: Captured) -> None:
    assert "distinct" in command(capsys, "stats", model, "--wide").out


def test_json(model: str, capsys: Captured) -> None:
    ran = command(capsys, "stats", model, "--json")
    assert ran.status == 0
    assert ran.json["source"] == "m.safetensors"
    assert ran.json["rows"][0]["quantiles"]["0.5"] == pytest.approx(2.5, rel=2**-7)
    assert ran.json["flags"] == [{"name": "layers.1.fc.weight", "kind": "non-finite", "reason": "1 NaN among 6 values"}]


def test_a_live_model_has_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "live_for_stats.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))\n"
    )
    ran = command(capsys, "stats", "live_for_stats:build", "--buffers", "--json")
    assert [row["name"] for row in ran.json["rows"]] == [
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
    ]  # fmt: skip
    assert ran.json["unread"] == []


def test_what_is_wrong_is_said_in_a_line(model: str, capsys: Captured) -> None:
    ran = command(capsys, "stats", model, "-q", "50")
    assert (ran.status, ran.err) == (
        2, "torchparams: Quantiles must be numbers between 0 and 1, not '50'. Write 0.01,0.5,0.99.\n",
    )  # fmt: skip
    ran = command(capsys, "stats", model, "--sort", "size")
    assert ran.status == 2
    assert ran.err.startswith("torchparams: No column 'size' to sort by. Columns are name, numel,")
    assert command(capsys, "stats", model, "--by", "**.gamma").status == 2


def test_an_interrupt_ends_it_cleanly(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    from torchparams.engines.threads import ThreadEngine

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadEngine, "run", interrupted)
    ran = command(capsys, "stats", model)
    assert (ran.status, ran.out) == (130, "")
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ((), 0),
        (("--check",), 1),
        (("--check", "--rules", "non-finite,zero"), 1),
        (("--check", "--rules", "zero,constant"), 0),
        (("--check", "-s", "head.weight"), 0),
        (("--check", "--by", "layer", "--json"), 1),
    ],
)
def test_the_exit_status_for_odd_values(model: str, capsys: Captured, options: tuple[str, ...], status: int) -> None:
    ran = command(capsys, "stats", model, *options)
    assert (ran.status, ran.err) == (status, "")
    assert ran.out


def test_rules_that_are_none(model: str, capsys: Captured) -> None:
    ran = command(capsys, "stats", model, "--check", "--rules", "nan")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == (
        "torchparams: Unknown kind of flag 'nan'. Kinds are non-finite, zero, constant, saturated, scale.\n"
    )
    ran = command(capsys, "stats", model, "--rules", "zero")
    assert ran.status == 2
    assert "it needs --check" in ran.err


def test_verify_includes_the_values(model: str, capsys: Captured) -> None:
    assert command(capsys, "verify", model).status == 0
    ran = command(capsys, "verify", model, "--values")
    assert ran.status == 1
    assert "values     failed        non-finite: layers.1.fc.weight\n" in ran.out
    ran = command(capsys, "verify", model, "--values", "-s", "head.* | layers.0.**")
    assert ran.status == 0
    assert "3 tensors: no flags" in ran.out


def test_codes_are_no_values_to_check(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "codes.safetensors"
    path.write_bytes(safetensors_bytes({"l.weight": np.ones((2, 2), np.int8), "l.SCB": np.ones(2, np.float32)}))
    ran = command(capsys, "verify", path, "--values", "--json")
    assert [(each["outcome"], each["tensors"]) for each in ran.json["checks"] if each["check"] == "values"] == [
        ("ok", []),
        ("not possible", ["l.weight"]),
    ]
