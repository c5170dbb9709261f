"""Optimizer states in files: complete in every format, and training continues with the same bits."""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import torchparams as tp
from optimizers import OPTIMIZERS, Complex, Net, step, trained
from torchparams.errors import FileFormatError, NotReadable, PlanError, TorchParamsError, UnsupportedSource
from torchparams.train._placeholders import copied
from torchparams.train.optimizer_file import KEY, read_optimizer_file

if TYPE_CHECKING:
    from pathlib import Path

dcp: Any = checkpoint  # which does not declare what it exports
SUFFIXES = ("safetensors", "pt")


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "complex"])
def test_training_goes_on_as_after_torchs_own(kind: str, tmp_path: Path) -> None:
    model: nn.Module = Complex() if kind == "complex" else Net()
    make = OPTIMIZERS["Adam" if kind == "complex" else kind]
    optimizer = trained(model, make)
    state = tp.optimizer_state(model, optimizer)
    expected = copy.deepcopy(model)
    by_torch = make(expected.parameters())
    by_torch.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for suffix in SUFFIXES:
        written = tp.save(state, tmp_path / f"state.{suffix}")
        assert written.nbytes == os.path.getsize(tmp_path / f"state.{suffix}")
    ours = []
    for x in (state, tmp_path / "state.safetensors", str(tmp_path / "state.pt")):
        other = copy.deepcopy(model)
        going_on = make(other.parameters())
        assert tp.load_optimizer_state(other, going_on, x).complete
        ours.append((other, going_on))
    for number in range(5, 9):
        step(expected, by_torch, number)
        for other, going_on in ours:
            step(other, going_on, number)
    for other, going_on in ours:
        assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), other.parameters(), strict=True))
        assert str(going_on.state_dict()["param_groups"]) == str(by_torch.state_dict()["param_groups"])


def odd_state() -> tuple[nn.Module, torch.optim.Optimizer]:
    """An optimizer that keeps values of every kind."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {
        "momentum_buffer": torch.ones(2, 2, dtype=torch.bfloat16),
        "none": None,
        "flag": True,
        "count": 2**70,
        "nan": float("nan"),
        "inf": -float("inf"),
        "text": "é\n",
        "pair": (1, 2.5),
        "list": [torch.tensor(3), {"inner": torch.zeros(0)}],
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        7: "a number as key",
    }
    optimizer.param_groups[0]["counter"] = torch.tensor(5)
    return model, optimizer


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_value_comes_back(suffix: str, tmp_path: Path) -> None:
    model, optimizer = odd_state()
    state = tp.optimizer_state(model, optimizer)
    tp.save(state, tmp_path / f"state.{suffix}")
    # Not through an optimizer: torch's own load_state_dict makes a generator's name of a text.
    assert repr(copied(read_optimizer_file(str(tmp_path / f"state.{suffix}")))) == repr(state.state_dict())


def test_a_safetensors_file_is_a_table_of_its_tensors(tmp_path: Path) -> None:
    model = Net()
    state = tp.optimizer_state(model, trained(model, OPTIMIZERS["AdamW"]))
    tp.save(state, tmp_path / "state.safetensors", metadata={"epoch": "3"})
    params = tp.of(tmp_path / "state.safetensors")
    assert sorted(params) == sorted(state)
    assert params.metadata["epoch"] == "3"
    assert tp.diff(state, params).same


def test_a_pickle_is_what_torch_saves(tmp_path: Path) -> None:
    model = Net()
    state = tp.optimizer_state(model, trained(model, OPTIMIZERS["AdamW"]))
    tp.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(read) == {"optimizer", "state", "param_groups", "shapes", "shared", "extra"}
    assert torch.equal(read["state"]["a.weight"]["exp_avg"], state["a.weight.exp_avg"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_list_of_optimizers_and_an_unstepped_one(suffix: str, tmp_path: Path) -> None:
    model = Net()
    two = [torch.optim.SGD(model.a.parameters(), lr=0.1), torch.optim.Adam(model.b.parameters())]
    tp.save(tp.optimizer_state(model, two), tmp_path / f"state.{suffix}")
    assert tp.load_optimizer_state(model, two, tmp_path / f"state.{suffix}").complete


def test_inside_a_checkpoint(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.named_parameters())
    step(model, optimizer, 0)
    path = tmp_path / "run.ckpt"
    torch.save({"epoch": 3, "model": model.state_dict(), "optimizers": [optimizer.state_dict()]}, path)
    other = torch.optim.Adam(model.parameters())
    assert tp.load_optimizer_state(model, other, f"{path}#optimizers.0").complete
    assert tp.load_optimizer_state(model, other, f"{path}#optimizers").complete
    assert torch.equal(other.state[model.a.weight]["exp_avg"], optimizer.state[model.a.weight]["exp_avg"])
    with pytest.raises(UnsupportedSource, match=r"There is no 'optimizer' in the file\. Did you mean 'optimizers'\?"):
        tp.load_optimizer_state(model, other, f"{path}#optimizer")
    torch.save({"epoch": 3, "optimizer": optimizer.state_dict()}, path)
    with pytest.raises(UnsupportedSource, match=r"a checkpoint with an optimizer state inside\. Load .*#optimizer"):
        tp.load_optimizer_state(model, other, path)


def test_files_that_hold_no_state(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tp.save(model, tmp_path / "model.safetensors")
    tp.save(model, tmp_path / "model.pt")
    (tmp_path / "text.pt").write_text("nothing of the kind")
    for name in ("model.safetensors", "model.pt", "text.pt", "none.pt", "model.safetensors#optimizer"):
        with pytest.raises(TorchParamsError):
            tp.load_optimizer_state(model, optimizer, tmp_path / name)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/nowhere/at/all",)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    model = Net()
    torch.save({"state": {}, "param_groups": [], "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(FileFormatError, match="cannot read it"):
        tp.load_optimizer_state(model, torch.optim.SGD(model.parameters()), tmp_path / "evil.pt")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2, "state": {}}',
        '{"version": 1, "state": [1]}',
        '{"version": 1, "state": {"tensor": "none"}}',
        '{"version": 1, "state": {"dtype": "nn"}}',
        '{"version": 1, "state": {"device": "nowhere"}}',
        '{"version": 1, "state": {"a": 1, "b": 2}}',
        '{"version": 1, "state": ' + '{"list": [' * 3000 + "]}" * 3000 + "}",
        '{"version": 1, "state": {"dict": [["state", 3], ["param_groups", 4]]}}',
        '{"version": 1, "state": {"dict": [["state", {"dict": []}], ["param_groups", {"list": [7]}]]}}',
    ],
)
def test_metadata_that_is_broken(text: str, tmp_path: Path) -> None:
    model = Net()
    path = tmp_path / "state.safetensors"
    tp.save({"w": torch.zeros(1)}, path, metadata={KEY: text})
    with pytest.raises(TorchParamsError):
        tp.load_optimizer_state(model, torch.optim.SGD(model.parameters(), lr=0.1), path)


def test_what_cannot_be_written_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    model, optimizer = odd_state()
    weight = model.get_parameter("weight")
    tp.save(tp.optimizer_state(model, optimizer), tmp_path / "state.pt")
    old = (tmp_path / "state.pt").read_bytes()
    optimizer.state[weight]["odd"] = Evil()
    state = tp.optimizer_state(model, optimizer)
    with pytest.raises(PlanError, match=r"torch\.load\(weights_only=True\) cannot read"):
        tp.save(state, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == old
    with pytest.raises(PlanError, match=r"state\.weight\.odd: A safetensors file cannot hold a Evil"):
        tp.save(state, tmp_path / "state.safetensors")
    assert os.listdir(tmp_path) == ["state.pt"]


def test_the_state_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    model, optimizer = odd_state()
    state = tp.optimizer_state(model, optimizer)
    with pytest.raises(PlanError, match="is written whole"):
        tp.save(state, tmp_path / "state.pt", "weight.*")
    with pytest.raises(PlanError, match="is written to one file"):
        tp.save(state, f"{tmp_path}/state/")
    with pytest.raises(PlanError, match="cannot store metadata"):
        tp.save(state, tmp_path / "state.pt", metadata={"a": "b"})
    (tmp_path / "there.pt").write_text("old")
    with pytest.raises(PlanError, match="It exists already"):
        tp.save(state, tmp_path / "there.pt", overwrite=False)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(PlanError, match="is written to one file"):
        tp.save(state, tmp_path / "folder.pt")


def test_names_that_meet(tmp_path: Path) -> None:
    model = nn.ModuleDict({"param_groups": nn.ModuleDict({"0": nn.Linear(1, 1, bias=False)})})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameter = next(model.parameters())
    optimizer.state[parameter]["momentum_buffer"] = torch.tensor([[1.0]])
    optimizer.param_groups[0]["weight"] = {"momentum_buffer": torch.tensor([[2.0]])}
    tp.save(tp.optimizer_state(model, optimizer), tmp_path / "state.safetensors")
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    tp.load_optimizer_state(model, other, tmp_path / "state.safetensors")
    assert other.state[parameter]["momentum_buffer"].item() == 1
    assert other.param_groups[0]["weight"]["momentum_buffer"].item() == 2
    assert json.loads(tp.of(tmp_path / "state.safetensors").metadata[KEY])["version"] == 1


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("kind", ["by position", "by name", "ours", "flattened", "SGD"])
def test_a_distributed_checkpoint_holds_a_state(kind: str, tmp_path: Path) -> None:
    model = Net()
    make = OPTIMIZERS["SGD" if kind == "SGD" else "AdamW"]
    optimizer = trained(model, make)
    flat = StateDictOptions(flatten_optimizer_state_dict=kind == "flattened")
    saved = {
        "by position": optimizer.state_dict,
        "ours": tp.optimizer_state(model, optimizer).state_dict,
        "SGD": optimizer.state_dict,
    }.get(kind, lambda: get_optimizer_state_dict(model, optimizer, options=flat))()
    dcp.save({"run": {"optimizer": saved}, "step": 3}, checkpoint_id=tmp_path / "step-3", no_dist=True)
    names = [name for name, _ in model.named_parameters()] if kind in ("by position", "SGD") else None
    other = make(model.parameters())
    found = tp.load_optimizer_state(model, other, f"{tmp_path}/step-3#run.optimizer", names=names, options=True)
    assert found.complete
    for parameter, state in optimizer.state.items():
        assert state.keys() == other.state[parameter].keys()
        assert all(torch.equal(value, other.state[parameter][key]) for key, value in state.items())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    with pytest.raises(UnsupportedSource, match=r"step-3#run\.optimizer"):
        tp.load_optimizer_state(model, other, f"{tmp_path}/step-3")


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
def test_directories_without_a_state_are_refused(tmp_path: Path) -> None:
    model = Net()
    optimizer = trained(model, OPTIMIZERS["AdamW"])
    tp.convert(model, tmp_path / "shards").run()
    with pytest.raises(UnsupportedSource, match="holds no optimizer state"):
        tp.load_optimizer_state(model, optimizer, tmp_path / "shards")
    state = {**optimizer.state_dict(), "odd": complex(1, 2)}
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "odd", no_dist=True)
    with pytest.raises(NotReadable, match=r"odd: optimizer.odd: It holds"):
        tp.load_optimizer_state(model, optimizer, f"{tmp_path}/odd#optimizer")
