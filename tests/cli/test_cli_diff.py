"""`torchparams diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from command import command
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {f"layers.{i}.fc.weight": np.full((2, 2), i + 1, np.float32) for i in range(3)}
    tuned = {**tensors, "layers.1.fc.weight": np.array([[2, 2], [2, 3]], np.float32)}
    wrapped = {f"model.{name}": tensor for name, tensor in tensors.items()}
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    files: dict[str, dict[str, Any]] = {"base": tensors, "tuned": tuned, "wrapped": wrapped, "wide": wide}
    for name, made in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes(made))


def test_the_same(capsys: Captured) -> None:
    ran = command(capsys, "diff", "base.safetensors", "base.safetensors")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == "A  base.safetensors\nB  base.safetensors\nidentical, bit for bit: 3 tensors, 12 elements\n"


def test_a_difference(capsys: Captured) -> None:
    ran = command(capsys, "diff", "base.safetensors", "tuned.safetensors")
    assert (ran.status, ran.err) == (1, "")
    assert ran.out == (
        "A  base.safetensors\n"
        "B  tuned.safetensors\n"
        "changed             shape   elements  max |Δ|  rel. L2   cosine\n"
        "layers.1.fc.weight  [2, 2]    25.0 %        1     0.25  0.98198\n"
        "1 changed · 2 identical\n"
    )


def test_by_layer(capsys: Captured) -> None:
    ran = command(capsys, "diff", "base.safetensors", "tuned.safetensors", "--by", "layer", "--limit", "1")
    assert ran.status == 1
    assert "… 2 more groups …" in ran.out
    ran = command(capsys, "diff", "base.safetensors", "tuned.safetensors", "--by", "2")
    assert "layers.1       1        1    25.0 %        1     0.25  0.98198\n" in ran.out


def test_renames(capsys: Captured) -> None:
    ran = command(capsys, "diff", "base.safetensors", "wrapped.safetensors")
    assert ran.status == 1
    assert ran.out.endswith("more names match with --rename auto (rename='auto'): strip 'model.' from 3 of 3 names\n")
    for rename in ("auto", r"^model\.="):
        assert command(capsys, "diff", "base.safetensors", "wrapped.safetensors", "--rename", rename).status == 0
    ran = command(capsys, "diff", "base.safetensors", "wrapped.safetensors", "--rename", "model")
    assert ran.status == 2
    assert ran.err == (
        "torchparams: 'model' is not a rename. As text, a rename is 'regex=replacement'. "
        "To remove it, write 'model='.\n"
    )


def test_values_of_two_types(capsys: Captured) -> None:
    assert command(capsys, "diff", "base.safetensors", "wide.safetensors").status == 1
    ran = command(capsys, "diff", "base.safetensors", "wide.safetensors", "--numeric")
    assert ran.status == 0
    assert ran.out.endswith("equal in value: 3 tensors, 12 elements\n")


def test_json(capsys: Captured) -> None:
    arguments = ("base.safetensors", "tuned.safetensors", "-s", "layers.{0..1}.**", "--sort=-max", "--json")
    ran = command(capsys, "diff", *arguments)
    assert ran.status == 1
    assert ran.json["counts"]["identical"] == 1
    assert [row["relative"] for row in ran.json["tensors"]] == [0.25]


def test_errors(capsys: Captured) -> None:
    ran = command(capsys, "diff", "base.safetensors", "nothing.safetensors")
    assert ran.status == 2
    assert "nothing.safetensors: No such file or directory" in ran.err
    ran = command(capsys, "diff", "base.safetensors", "tuned.safetensors", "-s", "head.*")
    assert ran.status == 2
    assert ran.err.startswith("torchparams: base.safetensors and tuned.safetensors: `head.*` matches nothing.")


def test_a_model_and_a_file(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "three_layers.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build():\n"
        "    layers = [nn.ModuleDict({'fc': nn.Linear(2, 2, bias=False)}) for _ in range(3)]\n"
        "    made = nn.ModuleDict({'layers': nn.ModuleList(layers)})\n"
        "    for i, parameter in enumerate(made.parameters()):\n"
        "        nn.init.constant_(parameter, i + 1)\n"
        "    return made\n"
    )
    ran = command(capsys, "diff", "three_layers:build", "base.safetensors")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("A  ModuleDict\nB  base.safetensors\nidentical, bit for bit: 3 tensors")


def test_help_teaches(capsys: Captured) -> None:
    ran = command(capsys, "diff", "--help")
    assert ran.status == 0
    assert "--rename '^encoder\\.=backbone.'" in ran.out


NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
"""


@pytest.mark.parametrize("other", ["net.py:build", "plain.pt"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_the_state_dict_of_a_lightning_file_is_proposed(
    other: str, prefix: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(model.state_dict(), "plain.pt")
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state, "optimizer_states": [optimizer.state_dict()]}, "run.ckpt")
    for a, b, how in (
        (other, "run.ckpt", "strip 'model.' from 4 of 4 names"),
        ("run.ckpt", other, "add 'model.' to 4 of 4 names"),
    ):
        ran = command(capsys, "diff", a, b)
        assert ran.status == 1
        last = ran.out.splitlines()[-1]
        options: tuple[str, ...] = ()
        if prefix:
            assert last == f"compare run.ckpt#state_dict with --rename auto (rename='auto'): {how}"
            options = ("--rename", "auto")
        else:
            assert last == "compare run.ckpt#state_dict: it has the tensors of the other source"
        a, b = (target.replace("run.ckpt", "run.ckpt#state_dict") for target in (a, b))
        ran = command(capsys, "diff", a, b, *options)
        assert "only in" not in ran.out
        assert ran.status == (other == "net.py:build")


def test_a_rename_within_the_same_mapping_of_both_is_proposed_as_before(capsys: Captured) -> None:
    for name, prefix in (("a.pt", ""), ("b.pt", "module.")):
        state = {f"{prefix}{layer}.weight": torch.ones(2, 2) for layer in "uv"}
        torch.save({"state_dict": state, "optimizer": {"momentum": torch.zeros(3)}}, name)
    ran = command(capsys, "diff", "a.pt", "b.pt")
    assert ran.out.endswith("more names match with --rename auto (rename='auto'): strip 'module.' from 2 of 3 names\n")
    assert command(capsys, "diff", "a.pt", "b.pt", "--rename", "auto").status == 0
