"""Every error message has one form: what, where, what exists, what to do, in one line."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from pathlib import Path

import pytest

import torchparams
from torchparams import errors
from torchparams.errors import TorchParamsError, sentence

PACKAGE = Path(torchparams.__file__).parent
CLASSES = {
    name for name, thing in vars(errors).items() if inspect.isclass(thing) and issubclass(thing, TorchParamsError)
}


def _value(part: ast.expr) -> str:
    """`{name}` of a value that is put in as it is, else `{}`."""
    assert isinstance(part, ast.FormattedValue)
    return "{}" if part.conversion == ord("r") else f"{{{ast.unparse(part.value)}}}"


def literals(node: ast.expr) -> str | None:
    """The text of a string in the source, what is filled in between braces; None for what is no string there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else _value(part) for part in node.values)
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
    assert str(error) == "file.pt: It broke. There are two. Did you mean one?"
    assert str(TorchParamsError("it broke.")) == "It broke"
    assert str(TorchParamsError("it broke", hint="mend it")) == "It broke. Mend it."


@pytest.mark.parametrize(
    ("part", "begins"),
    [
        ("the file ends", "The file ends"),
        ("a", "A"),
        ("big-endian floats", "Big-endian floats"),
        ("model's weights", "Model's weights"),
        ("'fc.bias' is lazy", "'fc.bias' is lazy"),
        ("`**.bias` matches nothing", "`**.bias` matches nothing"),
        ("fc.bias", "fc.bias"),
        ("torch.save writes it", "torch.save writes it"),
        ("torch cannot read it", "torch cannot read it"),
        ("pip install torch", "pip install torch"),
        ("layer_decay must be a factor", "layer_decay must be a factor"),
        ("rank=0 is no rank", "rank=0 is no rank"),
        ("models/a.pt", "models/a.pt"),
        ("attach() takes a model", "attach() takes a model"),
        ("float16 is too narrow", "float16 is too narrow"),
        ("3 tensors", "3 tensors"),
    ],
)
def test_sentences_begin_with_a_capital_and_names_are_kept(part: str, begins: str) -> None:
    assert sentence(part) == begins
    assert str(TorchParamsError("x", where="w", exists=part, hint=part)) == f"w: X. {begins}. {begins}."


def test_a_value_that_begins_a_message_is_quoted() -> None:
    # A name that is put in is neither a word to be capitalised nor a text that may drive a terminal.
    wrong = [
        place
        for place, _, text in raised()
        if re.match(r"\{(name|there|module|path|\w+\.(name|summary\(\)))\}(?!=)", text)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", sorted(CLASSES - {"TorchParamsError", "SourceError"}))
def test_every_class_is_also_the_error_that_people_catch(name: str) -> None:
    kind = getattr(errors, name)
    plain = [base for base in kind.__mro__ if base.__name__ in vars(builtins)]
    assert plain[0] not in (Exception, BaseException, object)


def test_the_tree_at_the_top_of_the_module_is_the_tree() -> None:
    drawn = (errors.__doc__ or "").splitlines()
    for name in CLASSES:
        assert any(name in line.split("(")[0].split() or f"── {name}" in line for line in drawn), name
