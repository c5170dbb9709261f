"""The page of schemas has every command with `--json`, and its schemas fit results on data other than its examples."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schema_docs
from run_docs import CHECKPOINT
from schema_shape import lines, merged, misfits, shape_of

import torchparams as tp
from torchparams.cli import COMMANDS, SUBCOMMANDS


@pytest.fixture(scope="module")
def shapes() -> dict[str, Any]:
    return schema_docs.schemas()


def _with_json() -> list[str]:
    found = []
    for name in COMMANDS:
        command = getattr(importlib.import_module(f"torchparams.cli.{name}"), name)
        parts = {sub: command.commands[sub] for sub in SUBCOMMANDS.get(name, ())} or {"": command}
        for sub, each in parts.items():
            if any("--json" in option.opts for option in each.params):
                found.append(f"{name} {sub}".strip())
    return found


def test_every_command_with_json_has_an_example() -> None:
    lines = [line for commands in schema_docs.EXAMPLES.values() for line in commands]
    missing = [name for name in _with_json() if not any(f"{line} ".startswith(f"{name} ") for line in lines)]
    assert missing == []
    assert len(_with_json()) >= 19


def test_every_command_prints_json() -> None:
    """A command without `--json` would be missed above."""
    commands = [" ".join((name, sub)).strip() for name in COMMANDS for sub in SUBCOMMANDS.get(name, ("",))]
    assert _with_json() == commands


NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
"""


@pytest.mark.parametrize(
    ("title", "line"),
    [
        ("ls", "ls silero.safetensors"),
        ("ls", "ls net.py:Net"),
        ("ls", "ls long.pt --raw"),
        ("ls, several targets", "ls silero.safetensors missing.pt long.pt"),
        ("show, a tensor", "show long.pt layers.3.weight"),
        ("show, a tensor", "show net.py:Net head.weight"),
        ("show, a metadata entry", "show step-20.safetensors format"),
        ("explain", "explain net.py:Net"),
        ("explain, one name", "explain net.py:Net attention.out_proj.weight"),
        ("stats", "stats silero.safetensors --by layer"),
        ("stats", "stats net.py:Net --buffers"),
        ("stats --check, several targets", "stats --check silero.safetensors long.pt"),
        ("spectra", "spectra long.pt"),
        ("diff", "diff silero.safetensors long.pt"),
        ("diff", "diff long.pt net.py:Net --numeric --by layer"),
        ("report", "report long.pt -o page.html"),
        ("digest", "digest silero.safetensors"),
        ("digest, several targets", "digest silero.safetensors long.pt"),
        ("verify", "verify long.pt"),
        ("verify, several targets", "verify long.pt silero.safetensors --max-size 1KB"),
        ("catalog", "catalog long.pt silero.safetensors -o table.parquet --digest --stats"),
        ("audit", "audit net.py:Net"),
        ("audit --rules", "audit --rules --select O"),
        ("history", "history step-*.safetensors"),
        ("diagnose", "diagnose step-*.safetensors"),
        ("convert, merge, delta, apply, lora fold", "convert long.pt long.safetensors --dtype f16"),
        ("convert, merge, delta, apply, lora fold", "merge long.pt long.pt long.pt soup.pt"),
        ("--dry-run of convert, merge, delta, apply, lora", "merge long.pt long.pt slerp.pt -m slerp --dry-run"),
        ("--dry-run of convert, merge, delta, apply, lora", "merge long.pt long.pt ties.pt -m ties -b long.pt -n"),
    ],
)
def test_a_schema_fits_other_data(
    title: str, line: str, shapes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("silero.safetensors").write_bytes(CHECKPOINT.read_bytes())
    Path("net.py").write_text(NET)
    tp.save({f"layers.{i}.weight": rng.standard_normal((6, 5)) for i in range(12)}, "long.pt")
    for step in (1, 20, 300):
        tp.save({"w": np.full((3, 3), step, np.float32)}, f"step-{step}.safetensors")
    assert schema_docs.unlisted(title, schema_docs.printed(line), shapes) == []


def test_a_value_that_does_not_fit_is_found(shapes: dict[str, Any]) -> None:
    report = {"source": "a", "other": None, "tensors": 1, "findings": 0, "path": "p", "nbytes": 1}
    assert schema_docs.unlisted("report", report, shapes) == []
    assert schema_docs.unlisted("report", report | {"tensors": "1", "new": 0}, shapes) == ["tensors: text", "new"]
    operation = {"tensors": [{"from": {"operation": "cast", "by": 1}}]}
    assert schema_docs.unlisted("--dry-run of convert, merge, delta, apply, lora", operation, shapes) == [
        "operation.by"
    ]


def test_shapes_of_several_values_are_merged() -> None:
    shape = merged(shape_of({"a": 1, "b": [{"c": "x"}]}), shape_of({"a": 0.5, "b": None, "d": []}))
    assert lines(shape) == ["a: number", "b: [", "  c: text", "] or null", "d?: […]"]
    assert misfits(shape, {"a": 2, "b": [{"c": 1}]}) == ["b[].c: integer"]
