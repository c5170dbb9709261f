"""The fast matcher agrees with the definition, and never takes exponential time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings

from selector_strategies import GLOBS, NAMES, glob
from torchparams._selector.glob_match import matches
from torchparams._selector.glob_regex import matcher, to_regex

if TYPE_CHECKING:
    from torchparams._selector.globs import Glob


@settings(deadline=None)
@given(GLOBS, NAMES)
@example(glob("*{0..11}a*1"), "10a1")
@example(glob("*{a,ab}*b"), "aab")
@example(glob("{0..11}1"), "111")
@example(glob("**.a.**.a.b"), "a.a.b")
def test_the_fast_matcher_agrees_with_the_definition(pattern: Glob, name: str) -> None:
    assert bool(matcher(pattern)(name)) == matches(pattern, name)


@settings(deadline=None)
@given(GLOBS)
def test_a_glob_matches_the_names_that_are_read_off_it(pattern: Glob) -> None:
    # A name of the glob's own characters comes closer to matching than a random one does.
    for name in (re.sub(r"[^ab01.]", "", str(pattern)), re.sub(r"\*+", "a", str(pattern)), str(pattern)):
        assert bool(matcher(pattern)(name)) == matches(pattern, name)


# Each of these would take longer than anyone waits if a wildcard were tried at every place for every other.
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("**.**.**.**.x", "a." * 20_000 + "a"),
        ("**.a.**.a.**.a.**.a.**.a.**.b", "a." * 20_000 + "a"),
        ("**.a.a.a.a.b", "a." * 20_000 + "a"),
        ("*.*.**.*.*.**.*.*.b", "a." * 20_000 + "a"),
        ("*a*a*a*a*a*a*a*a*b", "a" * 20_000),
        ("?*?*?*?*?*?*b", "a" * 20_000),
        ("*{a,aa}*{a,aa}*{a,aa}*{a,aa}*b", "a" * 2_000),
        ("{a,aa}" * 30 + "b", "a" * 45),
        ("*{0..11}*{0..11}*{0..11}*b", "1" * 2_000),
        ("{0..1000000000}" * 12 + "b", "1" * 60),
        ("{,a}" * 64 + "b", "a" * 64),
    ],
)
def test_no_glob_is_exponential(text: str, name: str) -> None:
    match = matcher(glob(text))
    assert not match(name)
    assert not match(name + "c")


def test_a_huge_range_is_a_short_expression() -> None:
    assert len(to_regex(glob("{0..999999999999999999}"))) < 1_000
    assert matcher(glob("{123456789..987654321}"))("555555555")
    assert not matcher(glob("{123456789..987654321}"))("123456788")


def test_every_number_of_a_range_and_no_other() -> None:
    for first, last in ((0, 0), (0, 9), (3, 12), (9, 10), (17, 123), (99, 101), (100, 1000), (78, 78)):
        match = matcher(glob(f"l.{{{first}..{last}}}.w"))
        assert [n for n in range(1100) if match(f"l.{n}.w")] == list(range(first, last + 1))


def test_a_compiled_glob_is_kept() -> None:
    assert matcher(glob("**.kept")) is matcher(glob("**.kept"))
