"""`torchparams ls` and `show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from command import command
from torchparams.testing import safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    layers = {f"layers.{i}.fc.{part}": sample("float32", shape) for i in range(4) for part, shape in
              (("weight", (2, 3)), ("bias", (2,)))}  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(
        safetensors_bytes({**layers, "head.weight": sample("bfloat16", (5, 2))})
    )
    return "model.safetensors"


def test_flat(model: str, capsys: Captured) -> None:
    assert command(capsys, "ls", model, "-s", "**.bias | head.*").out == (
        "model.safetensors (safetensors)\n"
        "name              shape   dtype     numel  size\n"
        "layers.0.fc.bias  [2]     float32       2   8 B\n"
        "layers.1.fc.bias  [2]     float32       2   8 B\n"
        "layers.2.fc.bias  [2]     float32       2   8 B\n"
        "layers.3.fc.bias  [2]     float32       2   8 B\n"
        "head.weight       [5, 2]  bfloat16     10  20 B\n"
        "5 tensors · 18 parameters · 52 B\n"
    )


def test_by_module_with_subtotals_and_equal_layers_in_one(model: str, capsys: Captured) -> None:
    assert command(capsys, "ls", model, "--tree").out == (
        "model.safetensors (safetensors)\n"
        "name              shape   dtype     tensors  numel   size\n"
        "layers.{0..3}.fc                          8     32  128 B\n"
        "  weight          [2, 3]  float32         4     24   96 B\n"
        "  bias            [2]     float32         4      8   32 B\n"
        "head.weight       [5, 2]  bfloat16        1     10   20 B\n"
        "9 tensors · 42 parameters · 148 B\n"
    )


def test_a_folded_name_is_a_selector(model: str, capsys: Captured) -> None:
    ran = command(capsys, "ls", model, "-s", "layers.{0..3}.fc.weight", "--json")
    assert ran.json["total"] == {"tensors": 4, "numel": 24, "nbytes": 96, "trainable": None}


def test_expanded_and_cut_at_a_depth(model: str, capsys: Captured) -> None:
    ran = command(capsys, "ls", model, "--expand", "--depth", "2")
    names = [line.split()[0] for line in ran.out.splitlines()[2:-1]]
    assert names == ["layers", "0.fc", "1.fc", "2.fc", "3.fc", "head.weight"]


def test_sorted_and_limited(model: str, capsys: Captured) -> None:
    out = command(capsys, "ls", model, "--sort=-nbytes", "--limit", "2").out.splitlines()
    assert out[2].startswith("layers.0.fc.weight")
    assert out[3] == "… 7 more parameters …"
    assert command(capsys, "ls", model, "--sort", "colour").err == (
        "torchparams: No column 'colour' to sort by. "
        "Columns are name, numel, nbytes, size, dtype, shape, module, stored.\n"
    )


def test_json_is_the_records(model: str, capsys: Captured) -> None:
    form = command(capsys, "ls", model, "--json").json
    assert list(form) == ["source", "format", "metadata", "total", "parameters", "undecoded", "left_out", "pickle"]
    assert form["parameters"][-1] == {
        "name": "head.weight", "shape": [5, 2], "dtype": "bfloat16", "numel": 10, "nbytes": 20, "device": "file",
        "kind": "tensor", "requires_grad": None, "module": None, "raw_name": "head.weight", "aliases": [],
        "persistent": True, "layout": None, "encoding": None, "raw_names": ["head.weight"],
        "bpw": 16.0, "sharding": None, "storage": None,
        "location": {"file": "model.safetensors", "start": form["parameters"][-1]["location"]["start"],
                     "stop": form["parameters"][-1]["location"]["start"] + 20},
    }  # fmt: skip


def test_a_selector_that_hits_nothing_is_refused(model: str, capsys: Captured) -> None:
    ran = command(capsys, "ls", model, "-s", "bias")
    assert ran.status == 2
    assert ran.err.startswith("torchparams: model.safetensors: ")


def test_a_mapping_in_a_checkpoint(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "run.ckpt"
    torch.save(
        {"epoch": 3, "model": {"w": torch.ones(2)}, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}, file
    )
    assert [row["name"] for row in command(capsys, "ls", f"{file}#model", "--json").json["parameters"]] == ["w"]
    ran = command(capsys, "ls", f"{file}#modell")
    assert ran.status == 2
    assert ran.err.endswith("Did you mean '#model'?\n")


def test_a_live_model_is_built_on_the_meta_device(capsys: Captured) -> None:
    ran = command(capsys, "ls", "torch.nn:Identity", "--buffers")
    assert ran.out.splitlines()[0] == "Identity (module)"


MODEL = """
import torch
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 2), nn.BatchNorm1d(2))
ready = Net()
number = 3
def broken():
    raise RuntimeError("no\\n  luck")
def wrong():
    return {}
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("nets")
def test_live_targets(capsys: Captured) -> None:
    form = command(capsys, "ls", "some_nets:Net", "--json").json
    assert [row["name"] for row in form["parameters"]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert {row["device"] for row in form["parameters"]} == {"meta"}
    assert form["total"]["trainable"] == 12
    form = command(capsys, "ls", "some_nets:ready", "--buffers", "--json").json
    assert form["total"]["tensors"] == 7
    assert "yes" in command(capsys, "ls", "some_nets:Net", "--tree").out


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("some_nets:Nett", "some_nets:Nett: 'some_nets' has no 'Nett'. Did you mean Net?"),
        ("some_nets:number", "some_nets:number: Is an int, which cannot be called"),
        (
            "some_nets:broken",
            "some_nets:broken: Building it on the meta device failed with RuntimeError: no luck. --debug shows where.",
        ),
        (
            "some_nets:wrong",
            "some_nets:wrong: Returned a dict, not an nn.Module. Name a function without required "
            "arguments that returns a model, or a model class.",
        ),
        (
            "no_such_nets:Net",
            "no_such_nets:Net: Module not found: 'no_such_nets'. The search path is the current directory, "
            "then the installed packages.",
        ),
    ],
)
def test_live_targets_that_fail(target: str, message: str, capsys: Captured) -> None:
    ran = command(capsys, "ls", target)
    assert (ran.status, ran.out, ran.err) == (2, "", f"torchparams: {message}\n")


def test_show(model: str, capsys: Captured) -> None:
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    with open("values.safetensors", "wb") as file:
        file.write(safetensors_bytes({"head.weight": values}))
    assert command(capsys, "show", "values.safetensors", "head.weight").out == (
        "head.weight\n"
        "source  values.safetensors (safetensors)\n"
        "shape   [5, 2]\n"
        "dtype   float32 (32 bits)\n"
        "numel   10\n"
        "size    40 B\n"
        "kind    tensor\n"
        "file    values.safetensors\n"
        "bytes   88 to 128 (exclusive)\n"
        "\n"
        "[[0. 1.]\n [2. 3.]\n [4. 5.]\n [6. 7.]\n [8. 9.]]\n"
    )


def test_show_names_the_nearest(model: str, capsys: Captured) -> None:
    ran = command(capsys, "show", model, "head.wieght")
    assert (ran.status, ran.err) == (
        2, "torchparams: model.safetensors: No parameter is named 'head.wieght'. Did you mean 'head.weight'?\n"
    )  # fmt: skip


@pytest.mark.usefixtures("nets")
def test_show_of_a_model_without_values(capsys: Captured) -> None:
    ran = command(capsys, "show", "some_nets:Net", "1.running_mean", "--json")
    assert ran.status == 0
    assert ran.json["kind"] == "buffer"
    assert ran.json["values"] is None
    assert ran.json["unreadable"].startswith("Cannot read the values: ")


def test_repeated_selectors_are_a_union(model: str, capsys: Captured) -> None:
    form = command(capsys, "ls", model, "-s", "head.*", "-s", "layers.{-1}.**", "--json").json
    names = [entry["name"] for entry in form["parameters"]]
    assert "head.weight" in names and "layers.3.fc.weight" in names and "layers.0.fc.weight" not in names
    stats = command(capsys, "stats", model, "-s", "head.*", "-s", "layers.{-1}.**", "--json").json
    assert stats["selector"] == "head.* | layers.{-1}.**"


@pytest.mark.parametrize(("sort", "rows"), [("stored", ["l.10.w", "l.2.w"]), ("-stored", ["l.2.w", "l.10.w"])])
def test_rows_that_are_written_have_the_order_of_the_table(
    sort: str, rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = tmp_path / "m.safetensors", tmp_path / "rows.csv"
    path.write_bytes(safetensors_bytes({"l.10.w": sample("float32", (2,)), "l.2.w": sample("float32", (2,))}))
    assert command(capsys, "ls", str(path), f"--sort={sort}", "-o", str(target)).status == 0
    assert [line.partition(",")[0] for line in target.read_text().splitlines()[1:]] == rows
