"""Regular expressions in bounded time: the automaton agrees with `re`, and unbounded expressions raise."""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest

import torchparams as tp
from torchparams import limits
from torchparams._selector import bounded
from torchparams._selector.bounded import Bounded, TooSlow
from torchparams.errors import RenameError, SelectorError
from torchparams.renames import Renames

_ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-c_]", r"\d", r"\w", r"\W", r"\s", r"\S", r"\b", r"\B", "^", "$"]
_ATOMS += [r"\A", r"\Z", "_", "0", "\n", "é", r"[^\d.]"]
_QUANTIFIERS = ["*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{,2}", "{2,}"]


def some_pattern(numbers: random.Random, depth: int) -> str:
    kind = numbers.random()
    if depth <= 0 or kind < 0.35:
        return numbers.choice(_ATOMS)
    inner = some_pattern(numbers, depth - 1)
    if kind < 0.6:
        return inner + some_pattern(numbers, depth - 1)
    if kind < 0.75:
        return f"({inner}|{some_pattern(numbers, depth - 1)})"
    if kind < 0.82:
        return f"(?{numbers.choice('ms')}:{inner})"
    return f"(?:{inner}){numbers.choice(_QUANTIFIERS)}"


@pytest.mark.parametrize("seed", range(4))
def test_the_automaton_does_as_re(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REGEX_STEPS", 0)
    numbers = random.Random(seed)
    for _ in range(1500):
        text = some_pattern(numbers, 4)
        try:
            pattern = Bounded(text)
        except re.error:
            continue
        for _ in range(3):
            name = "".join(numbers.choice("ab._0 \né²") for _ in range(numbers.randrange(7)))
            assert pattern.matches(name) == bool(re.fullmatch(text, name)), (text, name)
            assert pattern.occurs(name) == bool(re.search(text, name)), (text, name)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        (r"(a+)+$", "a" * 5000 + "b", False),
        (r"(a+)+$", "a" * 5000, True),
        (r"(a|a)*b", "a" * 5000, False),
        (r"(.*)*(.*)*(.*)*x", "a" * 2000, False),
        (r"(x+x+)+y", "x" * 5000 + "y", True),
        (r".*.*.*.*.*.*b", "a" * 1000, False),
        (r"(?a:(\w*)*)!", "é" * 1000, False),
        (r"(?s:(.+)+)x", "\n" * 1000 + "x", True),
        (r"(?m:(^a$\n?)+)", "a\n" * 500, True),
    ],
)
def test_patterns_on_which_re_hangs(pattern: str, name: str, matches: bool) -> None:
    assert Bounded(pattern).matches(name) is matches
    assert Bounded(pattern).which([name, name]) == ([0, 1] if matches else [])


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.bias",
        r"(?!.*lora).*\.weight",
        r"model\.layers\.\d+\..*\.(q|k|v)_proj\.weight",
        r"(?i).*NORM.*",
        r"(.*)\.(.*)\.(.*)\.(.*)\.weight",
        r"((?!norm).)*weight",
        r"(\w)\w*\.\1.*",
    ],
)
def test_ordinary_patterns_are_left_to_re(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(bounded, "_Automaton", refuse)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(40)]
    found = [i for i, name in enumerate(names) if re.fullmatch(pattern, name)]
    assert Bounded(pattern).which(names) == found


def test_what_has_no_bound_is_refused() -> None:
    name = "a" * 60
    for pattern in (r"(?=(a+)+$).*b", r"(?i)(a+)+b", r"(a+)+\1b", r"((a{1,99}){1,99}){1,99}b"):
        with pytest.raises(TooSlow, match="could take too long on a name of 60 characters"):
            Bounded(pattern).matches(name)
        assert Bounded(pattern).matches("b") == bool(re.fullmatch(pattern, "b"))


def test_the_states_of_an_automaton_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "_CACHE", 3)
    monkeypatch.setattr(limits, "REGEX_STEPS", 0)
    pattern = Bounded(r"(a|b)*a(a|b){5}")
    numbers = random.Random(0)
    for _ in range(50):
        name = "".join(numbers.choice("ab") for _ in range(20))
        assert pattern.matches(name) == (name[-6] == "a")


NAMES = {"a" * 60 + "b": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}


def test_a_selector_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tp.of(NAMES)
    assert params.select("/(a+)+b/").names == ["a" * 60 + "b"]
    with pytest.raises(SelectorError) as caught:
        params.select("/(?=(a+)+$).*/")
    assert str(caught.value) == (
        "dict: `/(?=(a+)+$).*/` could take too long on a name of 61 characters. "
        "Avoid repeating a part that contains repeats or alternatives."
    )
    monkeypatch.setattr(limits, "REGEX_SECONDS", 0)
    with pytest.raises(SelectorError) as caught:
        tp.of(NAMES).select("/.*b/")
    assert str(caught.value) == (
        "dict: `/.*b/` took more than 0 seconds. Avoid repeating a part that contains repeats or alternatives."
    )


def test_a_rename_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RenameError) as caught:
        Renames.of("(a+)+$=").apply(NAMES)
    assert str(caught.value) == (
        "The pattern '(a+)+$' of a rename could take too long on a name of 61 characters. "
        "Avoid repeating a part that contains repeats or alternatives."
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    renames = Renames.of(r"^(.*)\.(.*)\.(.*)\.(.*)\.(.*)\.weight$=\5.\1")
    assert renames.apply([name]) == {name: "q_proj.model"}
    monkeypatch.setattr(limits, "REGEX_SECONDS", 0)
    with pytest.raises(RenameError, match="The pattern 'b' of a rename took more than 0 seconds"):
        Renames.of("b=c").apply(NAMES)


def test_parsing_gives_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bounded(r"[a-z]+\.weight")
