"""Twelve small programs about parameters, each run three ways with its exact output.

A program in `programs/` is what somebody writes who knows PyTorch alone. It runs as it is; with `tp.Module` in the
place of `nn.Module`; and with its model attached. What it prints is in a `.txt` file beside it: once, since a table
changes nothing of what PyTorch does. Where `model.parameters` is used without the call, `.table.txt` is what the two
others print.
"""

from __future__ import annotations

import ast
import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchparams as tp

PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))
UNCALLED = {"printing", "uncalled_loop", "uncalled_optimizer"}


class Sequential(tp.Module, nn.Sequential):
    """How a Sequential has the table."""


class _WithTable(ast.NodeTransformer):
    """`nn.Module` is `tp.Module`, and `nn.Sequential` one that has it as a base class."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        text = ast.unparse(node)
        if text == "nn.Module":
            return ast.parse("tp.Module", mode="eval").body
        return ast.parse("Sequential", mode="eval").body if text == "nn.Sequential" else node


class _Attached(ast.NodeTransformer):
    """`model = …` is `model = tp.attach(…, submodules=True)`."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        if ast.unparse(node.targets[0]) == "model":
            call = ast.parse("tp.attach(model, submodules=True)", mode="eval").body
            assert isinstance(call, ast.Call)
            call.args[0] = node.value
            node.value = call
        return node


WAYS: dict[str, ast.NodeTransformer] = {
    "plain": ast.NodeTransformer(),
    "module": _WithTable(),
    "attached": _Attached(),
}


def output(program: Path, way: str) -> str:
    """What a program prints, written one way."""
    tree = ast.fix_missing_locations(WAYS[way].visit(ast.parse(program.read_text())))
    namespace: dict[str, Any] = {"__name__": "program", "tp": tp, "Sequential": Sequential}
    printed = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(program), "exec"), namespace)
    model = namespace["model"]
    assert isinstance(model.parameters, tp.Parameters) == (way != "plain")
    return printed.getvalue()


def expected(program: Path, way: str) -> str:
    """What it is to print."""
    table = program.with_suffix(".table.txt")
    return (table if way != "plain" and table.exists() else program.with_suffix(".txt")).read_text()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_prints(program: Path, way: str) -> None:
    assert output(program, way) == expected(program, way)


def test_a_table_shows_only_where_the_call_is_missing() -> None:
    assert len(PROGRAMS) == 12
    assert {path.name.partition(".")[0] for path in PROGRAMS[0].parent.glob("*.table.txt")} == UNCALLED
