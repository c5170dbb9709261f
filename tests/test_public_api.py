"""The public API: its names, their documentation, and lazy imports."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest

import torchparams as tp

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "torchparams" / "__init__.py"
CALLABLES = [name for name in tp._HOMES if callable(getattr(tp, name))]


def test_every_public_name_is_there() -> None:
    for name in tp.__all__:
        assert getattr(tp, name) is not None, name
    assert dir(tp) == sorted(tp.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'torchparams' has no attribute 'parameters_of'"):
        tp.parameters_of  # noqa: B018  # looking it up is what is tested


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "an explicit re-export"
            seen[alias.name] = node.module
    assert {name: home for name, home in seen.items() if home != "torchparams"} == tp._HOMES
    assert {name for name, home in seen.items() if home == "torchparams"} == set(tp._MODULES)


def test_classes_are_few() -> None:
    assert {name for name in tp._HOMES if inspect.isclass(getattr(tp, name))} == {
        *("Module", "Parameters", "ParameterInfo", "Selector", "Plan", "TorchParamsError"),
        *("Penalty", "Recorder"),  # made by name, unlike results
    }


@pytest.mark.parametrize("name", tp._MOVED)
def test_result_classes_work_under_their_old_names_and_warn(name: str) -> None:
    home = tp._MOVED[name]
    with pytest.warns(DeprecationWarning, match=f"torchparams.{name} is now {home}.{name}") as caught:
        thing = getattr(tp, name)
    assert thing is getattr(importlib.import_module(home), name)
    assert inspect.getdoc(thing)
    assert caught[0].filename == __file__
    assert name not in tp.__all__


def test_report_is_the_old_name_of_tree() -> None:
    found = tp.stats({"w": np.ones(3, np.float32)})
    with pytest.warns(DeprecationWarning, match="Stats.report is now tree") as caught:
        assert found.report() == found.tree()
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="Parameters.report is now tree"):
        assert tp.of({"a": np.ones(2), "b": np.ones(3)}).report(limit=1) is not None


@pytest.mark.parametrize("name", CALLABLES)
def test_every_public_name_has_a_docstring_with_an_example(name: str) -> None:
    thing = getattr(tp, name)
    text = inspect.getdoc(thing)
    assert text is not None
    assert len(text.splitlines()[0]) <= 120
    if inspect.isclass(thing):  # what a verb gives back is shown in the verb's own example
        assert ">>> " in text or "Attributes:" in text or issubclass(thing, BaseException), name
    else:
        assert ">>> " in text, f"{name} has no example"


@pytest.mark.parametrize("name", CALLABLES)
def test_a_function_documents_what_it_takes(name: str) -> None:
    thing = getattr(tp, name)
    if inspect.isclass(thing):
        return
    text = inspect.getdoc(thing) or ""
    taken = list(inspect.signature(thing).parameters.values())
    if not taken:
        return
    assert "Args:" in text
    for parameter in taken:
        stars = (
            "**"
            if parameter.kind is parameter.VAR_KEYWORD
            else "*"
            if parameter.kind is parameter.VAR_POSITIONAL
            else ""
        )
        documented = text[text.index("Args:") :]
        assert any(
            form in documented for form in (f"{parameter.name}:", f"{stars}{parameter.name}:", f"{parameter.name},")
        ), f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", CALLABLES)
def test_a_name_is_that_of_its_home(name: str) -> None:
    assert getattr(importlib.import_module(tp._HOMES[name]), name) is getattr(tp, name)
