"""`torchparams audit`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from command import command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Captured = pytest.CaptureFixture[str]

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        nn.init.ones_(self.fc.weight)
        self.gate = nn.Linear(2, 2)
        nn.init.zeros_(self.gate.weight)

class Clean(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
"""


NOT_RUN = "not run: O101 to O110 (no optimizer was given), G101 to G103 (no gradients before backward())\n"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "audited_nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("audited_nets", None)


def test_findings(capsys: Captured) -> None:
    ran = command(capsys, "audit", "audited_nets:Net")
    assert (ran.status, ran.err) == (1, "")
    assert ran.out == (
        "Net\n"
        "warning M302 constant-weight: all units compute the same output and get the same gradient, so "
        "they stay equal\n"
        "  every element of fc.weight is 1\n"
        "    fc.weight\n"
        "    fix: nn.init.kaiming_uniform_(model.fc.weight)\n"
        "note M303 zero-weight: earlier layers get no gradient until it changes, and it never changes if it is "
        "frozen\n"
        "  1 weight is zero in every element\n"
        "    gate.weight\n"
        "    fix: nn.init.kaiming_uniform_(model.gate.weight)  # unless it is zero on purpose\n"
        "1 warning, 1 note · 4 parameter tensors · 21 of 34 rules\n"
        "not run: O101 to O110 (no optimizer was given), G101 to G103 (no gradients before backward())\n"
    )


def test_nothing_found(capsys: Captured) -> None:
    ran = command(capsys, "audit", "audited_nets:Clean")
    assert (ran.status, ran.out) == (0, "Clean\nno findings · 2 parameter tensors · 21 of 34 rules\n" + NOT_RUN)


def test_notes_alone_are_fine(capsys: Captured) -> None:
    ran = command(capsys, "audit", "audited_nets:Net", "--ignore", "M302", "--json")
    assert ran.status == 0
    assert [finding["id"] for finding in ran.json["findings"]] == ["M303"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--select", "M302"], ["M302"]),
        (["--select", "M302,M303"], ["M302", "M303"]),
        (["--select", "M302", "--select", "zero-weight"], ["M302", "M303"]),
        (["--select", "M3", "--ignore", "M303"], ["M302"]),
        (["--suppress", "M302=fc.**"], ["M303"]),
        (["--suppress", "M302=fc.**", "--suppress", "M303=[ndim=2]"], []),
        (["--suppress", "M3=fc.**", "--suppress", "M3=gate.**"], []),
        (["--meta"], ["M107"]),
    ],
)
def test_options(options: list[str], found: list[str], capsys: Captured) -> None:
    ran = command(capsys, "audit", "audited_nets:Net", *options, "--json")
    assert [finding["id"] for finding in ran.json["findings"]] == found
    assert ran.status == int("M302" in found)


def test_the_rules(capsys: Captured) -> None:
    ran = command(capsys, "audit", "--rules", "--select", "M101,M102")
    assert (ran.status, ran.out) == (
        0,
        "id    name              severity  finds\n"
        "M101  hidden-parameter  error     Trainable parameters in a list, dict, tuple, set or dataclass\n"
        "M102  hidden-state      note      Frozen parameters, buffers or dropout in a list, dict, tuple, set or "
        "dataclass\n",
    )
    ids = [rule["id"] for rule in command(capsys, "audit", "--rules", "--json").json["rules"]]
    assert len(ids) == 34


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "torchparams: Invalid value: TARGET is missing: name the model, as package.module:callable or "
            "file.py:callable. See torchparams audit --help\n",
        ),
        (
            ["audited_nets:Net", "--select", "M9"],
            "torchparams: No rule is called 'M9'. Did you mean 'M109'?\n",
        ),
        (
            ["audited_nets:Net", "--suppress", "M302"],
            "torchparams: 'M302' is not RULE=SELECTOR. An example is M303=head.**.\n",
        ),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: Captured) -> None:
    ran = command(capsys, "audit", *arguments)
    assert (ran.status, ran.out, ran.err) == (2, "", message)


def test_a_file_is_no_live_model(capsys: Captured) -> None:
    ran = command(capsys, "audit", "model.safetensors")
    assert (ran.status, ran.out, ran.err) == (
        2,
        "",
        "torchparams: model.safetensors: A checkpoint cannot be audited. An audit needs a live nn.Module. "
        "torchparams.stats looks at the values of a checkpoint.\n",
    )
