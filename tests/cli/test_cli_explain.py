"""`torchparams explain`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from command import command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Captured = pytest.CaptureFixture[str]

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.blocks = [nn.Linear(2, 2)]
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "explained_nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("explained_nets", None)


def test_explain_explains_and_does_not_judge(capsys: Captured) -> None:
    ran = command(capsys, "explain", "explained_nets:Net")
    assert (ran.status, ran.err) == (0, "")
    assert (
        ran.out
        == """\
Net
   call                tensors  numel
P  parameters()              2      6  all trainable
   named_parameters()        2      6  the same, with their names
B  buffers()                 0      0
S  state_dict()              2      6  P

in Python        shape   in   trainable  owner
model.fc.weight  [2, 2]  P-S  yes        Linear
model.fc.bias    [2]     P-S  yes        Linear

Not among the parameters
model.blocks: a list that hides 2 tensors in 1 module: nn.Module does not look
  into a list. Write self.blocks = nn.ModuleList(self.blocks)
"""
    )


def test_one_name(capsys: Captured) -> None:
    ran = command(capsys, "explain", "explained_nets:Net", "model.fc.bias")
    assert ran.status == 0
    assert ran.out.startswith("fc.bias\nmodel.fc.bias is a trainable parameter of model.fc (Linear): [2], 2 elements")


def test_a_wrong_name_is_an_error_with_its_neighbours(capsys: Captured) -> None:
    ran = command(capsys, "explain", "explained_nets:Net", "fc.wieght")
    assert (ran.status, ran.out) == (2, "")
    assert "Did you mean 'fc.weight'" in ran.err


def test_json(capsys: Captured) -> None:
    ran = command(capsys, "explain", "explained_nets:Net", "--json")
    assert [tensor["python"] for tensor in json.loads(ran.out)["tensors"]] == ["model.fc.weight", "model.fc.bias"]


def test_a_checkpoint_is_refused(capsys: Captured) -> None:
    ran = command(capsys, "explain", "model.pt")
    assert ran.status == 2
    assert "torchparams ls" in ran.err or "torchparams.ls" in ran.err
