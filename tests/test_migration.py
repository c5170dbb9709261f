"""The page on migration lists every deprecated name, and each listed name warns with the new one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torchparams as tp
from torchparams.lint.findings import Finding

ROOT = Path(__file__).resolve().parents[1]
_TEXT = (ROOT / "docs" / "migration.md").read_text()
_SECTION = _TEXT[_TEXT.index("## Old names that still work") : _TEXT.index("## From 0.1.0")]
ROWS = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", _SECTION, flags=re.MULTILINE)


def _warning_functions() -> set[str]:
    """Functions of the package that warn of deprecation, by name."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(
                isinstance(node, ast.Name) and node.id in ("DeprecationWarning", "PendingDeprecationWarning")
                for node in ast.walk(function)
            ):
                found.add(function.name)
    return found


def test_the_page_lists_every_name_that_warns() -> None:
    assert len(ROWS) > len(tp._MOVED)
    functions = _warning_functions() - {"__getattr__"}  # moved classes, below
    assert {old.removesuffix("()").rpartition(".")[2] for old, _ in ROWS if old.endswith("()")} == functions
    assert {old.removeprefix("tp."): new for old, new in ROWS if old.startswith("tp.")} == {
        name: f"{home}.{name}" for name, home in tp._MOVED.items()
    }


@pytest.mark.parametrize(("old", "new"), ROWS, ids=[old for old, _ in ROWS])
def test_an_old_name_warns_and_gives_what_the_new_one_gives(old: str, new: str) -> None:
    import importlib

    weights = {"w": np.ones(3, np.float32)}
    finding = Finding("M101", "hidden-parameter", "error", ("w",), "what", "why", "fix")
    names: dict[str, Any] = {"tp": tp, "result": tp.stats(weights), "finding": finding, "params": tp.of(weights)}
    with pytest.warns(
        DeprecationWarning,
        match=re.escape(f"is now {new.rpartition('.')[2].removesuffix('()')}")
        if old.endswith("()")
        else re.escape(new),
    ):
        before = eval(old, names)
    if old.endswith("()"):
        after = eval(new, names)
        assert type(before) is type(after)
        assert getattr(before, "names", before) == getattr(after, "names", after)
    else:
        home, _, name = new.rpartition(".")
        assert before is getattr(importlib.import_module(home), name)
