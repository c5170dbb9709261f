"""Every error message has the form that the library gives them: what, where, what exists, what to do, in one line."""

from __future__ import annotations

import ast
import builtins
import inspect
from pathlib import Path

import pytest

import torchparams
from torchparams import errors
from torchparams.errors import TorchParamsError

PACKAGE = Path(torchparams.__file__).parent
CLASSES = {
    name for name, thing in vars(errors).items() if inspect.isclass(thing) and issubclass(thing, TorchParamsError)
}


def literals(node: ast.expr) -> str | None:
    """The text of a string in the source, `{}` for what is filled in; None for what is no string there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def raised() -> list[tuple[str, str, str]]:
    """Place, part (`what`, `exists`, `hint`) and text of every message in the source."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES):
                continue
            place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            parts = {"what": node.args[0]} if node.args and node.func.id != "SelectorSyntaxError" else {}
            parts |= {word.arg: word.value for word in node.keywords if word.arg in ("exists", "hint")}
            for part, value in parts.items():
                text = literals(value)
                if text is not None:
                    found.append((place, part, text))
    return found


def test_there_are_messages() -> None:
    assert len(raised()) > 100


@pytest.mark.parametrize("part", ["what", "exists", "hint"])
def test_messages_have_one_form(part: str) -> None:
    wrong = []
    for place, which, text in raised():
        if which != part:
            continue
        if text.endswith((".", "!")) and not text.endswith(("…", "...")):
            wrong.append(f"{place}: the stop is added where the message is put together: {text!r}")
        if "\n" in text:
            wrong.append(f"{place}: more than one line: {text!r}")
        if not text.strip() or text != text.strip():
            wrong.append(f"{place}: blank, or blanks around it: {text!r}")
        if part == "what" and text[:1].isupper() and not text.split()[0].isupper() and text.split()[0].isalpha():
            wrong.append(f"{place}: begins with a capital: {text!r}")
    assert wrong == []


def test_a_message_is_put_together_in_one_order() -> None:
    error = TorchParamsError("it broke", where="file.pt", exists="there are two", hint="did you mean one?")
    assert str(error) == "file.pt: it broke. there are two. did you mean one?"
    assert str(TorchParamsError("it broke.")) == "it broke"
    assert str(TorchParamsError("it broke", hint="mend it")) == "it broke. mend it."


@pytest.mark.parametrize("name", sorted(CLASSES - {"TorchParamsError", "SourceError"}))
def test_every_class_is_also_the_error_that_people_catch(name: str) -> None:
    kind = getattr(errors, name)
    plain = [base for base in kind.__mro__ if base.__name__ in vars(builtins)]
    assert plain[0] not in (Exception, BaseException, object)


def test_the_tree_at_the_top_of_the_module_is_the_tree() -> None:
    drawn = (errors.__doc__ or "").splitlines()
    for name in CLASSES:
        assert any(name in line.split("(")[0].split() or f"── {name}" in line for line in drawn), name
