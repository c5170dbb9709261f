"""Imports between packages go one way, and heavy modules are imported only when needed."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from check_imports import cycles, graph, typed, violations

from torchparams.testing import safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path


def test_imports_go_one_way() -> None:
    assert violations(graph()) == []


def test_the_rules_can_be_broken() -> None:
    edges = {
        "errors": {"info"},
        "info": {"errors"},
        "train.freeze": {"lint.rules"},
        "lint.rules": set(),
        "new": set(),
    }
    assert violations(edges) == [
        "errors imports info, which stands above it",
        "new: in no layer",
        "train.freeze imports lint.rules: these verbs do not know each other",
        "a cycle: errors → info → errors",
    ]


def test_types_make_no_cycles_either(tmp_path: Path) -> None:
    assert cycles(typed()) == []
    (tmp_path / "result.py").write_text("from torchparams.look import report\n")
    (tmp_path / "look.py").write_text("if TYPE_CHECKING:\n    from torchparams.result import Result\n")
    assert cycles(graph(tmp_path)) == []
    assert len(cycles(typed(tmp_path))) == 1


def imported_by(code: str, *arguments: str) -> set[str]:
    """The top-level modules that a process has imported at its end."""
    program = f"import sys\n{code}\nprint('\\n' + ' '.join({{name.split('.')[0] for name in sys.modules}}))"
    process = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(process.stdout.splitlines()[-1].split())


def test_the_package_alone_imports_next_to_nothing() -> None:
    assert not imported_by("import torchparams") & {"torch", "numpy", "rich", "click", "ml_dtypes", "blake3"}


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--tree"], ["ls", "--json"], ["ls", "-s", "**"]])
def test_listing_a_file_imports_neither_torch_nor_numpy(arguments: list[str], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes({"a.weight": sample("float32", (2, 3))}))
    command, *options = arguments
    code = f"from torchparams.cli.app import run; assert run({[command, str(file), *options]!r}) == 0"
    assert not imported_by(code) & {"torch", "numpy", "rich", "ml_dtypes", "blake3", "pydantic"}


@pytest.mark.parametrize("command", ["diff", "digest"])
def test_equal_files_and_digests_need_no_numpy(command: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        file.write_bytes(safetensors_bytes({"a.weight": sample("bfloat16", (200, 300)), "b": sample("int8", ())}))
    code = f"from torchparams.cli.app import run; assert run([{command!r}, *{[*map(str, files)]!r}]) == 0"
    assert not imported_by(code) & {"torch", "numpy", "rich", "ml_dtypes", "pydantic"}


def test_a_command_imports_no_other(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes({"a.weight": sample("float32", (2, 3))}))
    code = (
        f"from torchparams.cli.app import run; assert run(['ls', {str(file)!r}]) == 0\n"
        "print(*sorted(name for name in sys.modules if name.startswith('torchparams.cli.')))"
    )
    process = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True)
    assert not set(process.stdout.splitlines()[-1].split()) & {f"torchparams.cli.{name}" for name in ("diff", "merge")}


def test_showing_a_tensor_does_not_import_torch(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes({"a.weight": sample("bfloat16", (2, 3))}))
    code = f"from torchparams.cli.app import run; assert run(['show', {str(file)!r}, 'a.weight']) == 0"
    assert "torch" not in imported_by(code)
