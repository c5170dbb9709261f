"""Targets that are Python files."""

from __future__ import annotations

import json
import subprocess
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
from beside import WIDTH

class Net(nn.Module):
    def __init__(self, depth=1):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

class Wide(nn.Module):
    def __init__(self, width, *, scale):
        super().__init__()

def build(): return Net()
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "types.py").write_text(CODE)
    (tmp_path / "nets" / "beside.py").write_text("WIDTH = 3\n")
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name == "beside" or name.startswith("_torchparams_"):
            del sys.modules[name]


def test_a_class_in_a_file_whatever_its_name(capsys: Captured) -> None:
    for target in ("nets/types.py:Net", "./nets/types.py:build"):
        ran = command(capsys, "ls", target)
        assert (ran.status, ran.err) == (0, "")
        assert "fc.weight  [3, 3]" in ran.out


def test_a_file_in_a_package(capsys: Captured, tmp_path: Path) -> None:
    package = tmp_path / "kit_of_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "beside.py").write_text("WIDTH = 4\n")
    (package / "net.py").write_text(CODE.replace("from beside", "from .beside"))
    ran = command(capsys, "ls", "kit_of_nets/net.py:Net")
    assert "fc.weight  [4, 4]" in ran.out, ran.err


def test_a_bare_file_lists_what_is_in_it_and_is_not_run(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(CODE + "\nraise SystemExit('it was run')\n")
    for verb in ("explain", "ls", "audit", "stats"):
        ran = command(capsys, verb, "run.py")
        assert (ran.status, ran.out) == (2, "")
        assert ran.err == (
            "torchparams: run.py: Names a Python file, but no class or function in it. It has the classes Net(), "
            "Wide(width, scale) and the functions build(). For example run.py:Net.\n"
        )


def test_files_that_are_not_there_or_broken(capsys: Captured, tmp_path: Path) -> None:
    assert "No such file. Did you mean nets/types.py?" in command(capsys, "ls", "nets/tipes.py:Net").err
    assert "No such file. Did you mean nets/types.py?" in command(capsys, "ls", "nets/tipes.py").err
    (tmp_path / "broken.py").write_text("class Net(:\n")
    assert "broken.py: Cannot be read as Python: invalid syntax" in command(capsys, "ls", "broken.py").err
    assert "Importing failed with SyntaxError" in command(capsys, "ls", "broken.py:Net").err
    assert "It has no classes or functions" in (command(capsys, "ls", "nets/beside.py").err)
    assert "has no 'Nett'. Did you mean Net?" in command(capsys, "ls", "nets/types.py:Nett").err
    (tmp_path / "other.py").write_text("def number(): return 3\ndef nothing(): pass\n")
    assert (
        "'other.py' has no 'Zoo'. It has the functions number(), nothing()."
        in command(capsys, "ls", "other.py:Zoo").err
    )
    assert "other.py:number: Returned an int, not an nn.Module. Name a" in command(capsys, "ls", "other.py:number").err
    assert "other.py:nothing: Returned None, not an nn.Module. Name a" in command(capsys, "ls", "other.py:nothing").err


NEEDS_VALUES = {
    "to": "self.fc.to('cpu')",
    "item": "self.scale = self.fc.weight.abs().max().item()",
    "numpy": "self.array = self.fc.weight.detach().numpy().copy()",
}


@pytest.mark.parametrize("kind", NEEDS_VALUES)
def test_a_model_that_needs_its_values_is_built_with_them(capsys: Captured, tmp_path: Path, kind: str) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        f"        super().__init__()\n        self.fc = nn.Linear(3, 2)\n        {NEEDS_VALUES[kind]}\n"
    )
    ran = command(capsys, "ls", "net.py:Net", "--json")
    assert ran.status == 0, ran.err
    assert [(row["name"], row["device"]) for row in ran.json["parameters"]] == [
        ("fc.weight", "cpu"),
        ("fc.bias", "cpu"),
    ]
    assert ran.err.startswith("torchparams: net.py:Net is built with values: building it on the meta device failed")
    assert ran.err.count("\n") == 1


def test_a_model_that_is_quantised_when_it_is_built(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch, warnings\nfrom torch import nn\n\ndef build():\n    warnings.simplefilter('ignore')\n"
        "    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), dtype=torch.qint8)\n"
    )
    ran = command(capsys, "ls", "net.py:build")
    assert ran.status == 0
    assert "0.weight" in ran.out and "(4 stored)" in ran.out  # rows of whole parameters
    assert "net.py:build is built with values" in ran.err


PRINTING = """
import subprocess
print("on import")
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        print("in the constructor")
        subprocess.run(["echo", "by a program"])
"""


def test_what_the_code_prints_does_not_reach_the_result(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(PRINTING)
    ran = subprocess.run(
        [sys.executable, "-m", "torchparams", "ls", "loud.py:Net", "--json"], capture_output=True, text=True, check=True
    )
    assert [row["name"] for row in json.loads(ran.stdout)["parameters"]] == ["fc.weight", "fc.bias"]
    assert ran.stderr.split("\n")[:3] == ["on import", "in the constructor", "by a program"]
