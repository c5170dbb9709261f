"""The selector language in the page: the cases of the parser's own tests, and texts that hypothesis makes up.

Each text is a selector in both or in neither, prints alike, hits the same names, and is refused at the same column.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_infos import live, transformer
from in_browser import chromium, opened
from selector import test_globs, test_parser, test_table
from selector_strategies import GLOBS, TEXTS
from torchparams._selector.candidates import Candidates
from torchparams._selector.parser import parse
from torchparams.errors import SelectorError, SelectorSyntaxError
from torchparams.page import payload
from torchparams.page.result import page_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchparams.info import ParameterInfo

ANSWER = """text => {
    try { return { text: torchparams.canonical(text), names: torchparams.select(text) } }
    catch (error) { return { column: error.column, message: error.message, expected: error.expected } }
}"""


def cases(test: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """The cases that a test has as parameters."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    return [each if isinstance(each, tuple) else (each,) for each in mark.args[1]]


def infos() -> list[ParameterInfo]:
    """Parameters of every kind, and every name that a case of a glob hits or misses."""
    found = {info.name: info for info in [*test_table.ZOO, *transformer()]}
    for _, hit, missed in cases(test_globs.test_a_glob_matches_whole_names):
        for name in (*hit, *missed):
            found.setdefault(name, live(name))
    for name in ("a", "b", "ab", "a.b", "0.a", "1.b", "01.a", "a.10", "h.0.w", "h.1.w", "h.11.w", "h.3.mlp.0.b"):
        found.setdefault(name, live(name))
    found["wrapped.weight"] = live("wrapped.weight", raw="module.wrapped.weight")
    found["tied.weight"] = live("tied.weight", aliases=("other.tied", "b.tied"))
    return list(found.values())


INFOS = infos()


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """What the page says of a text."""
    path = tmp_path_factory.mktemp("selectors") / "r.html"
    path.write_bytes(page_of(form_of(INFOS)))
    with chromium() as browser, opened(browser, path) as found:
        page = found.ready()
        yield lambda text: page.evaluate(ANSWER, text)


def form_of(listed: list[ParameterInfo]) -> dict[str, Any]:
    """The data of a page of parameters without values."""
    from torchparams.page.measuring import Target
    from torchparams.parameters import of

    nothing = Target(of({}), {}, True, (0.5,))
    source = {"label": "selectors", "format": "test", "selector": None, "live": False, "detailed": True}
    counts = {"tensors": len(listed), "numel": 0, "nbytes": 0, "lost": 0}
    return {
        "version": payload.VERSION,
        "source": {**source, **counts, "metadata": [], "left_out": []},
        "dtypes": payload.dtypes(),
        "table": payload.listing(listed),
        "a": payload.statistics(nothing, [None] * len(listed)),
        "unread": {},
        "findings": [],
        "spectra": {},
        "pictures": {},
    }


@cache
def table() -> Candidates:
    return Candidates(INFOS)


def agrees(text: str, said: dict[str, Any]) -> None:
    """Hold what the page said against the language's own implementation."""
    try:
        node = parse(text)
        names = [INFOS[row].name for row in sorted(table().hits(node))]
    except SelectorSyntaxError as error:
        # Of regular expressions, only the refusal is shared: `re` has its own words and places.
        assert "column" in said, f"{text!r}: the page takes it, and Python says {error}"
        if error.expected != "a regular expression" and "regular expression" not in said["expected"]:
            assert said["column"] == error.column, f"{text!r}: {error}"
            assert said["expected"] == error.expected, text
        return
    except SelectorError:
        assert "column" in said, text
        return
    if "not supported in the page" in said.get("message", ""):
        assert "/" in text
        return
    assert said.get("text") == str(node), f"{text!r}: {said}"
    assert said["names"] == names, text


PARSED = [
    text
    for test in (
        test_parser.test_a_text_is_parsed_by_the_grammar,
        test_parser.test_a_tree_prints_with_the_fewest_parentheses,
        test_parser.test_a_value_is_read,
        test_parser.test_a_syntax_error_points_and_says_what_was_expected,
        test_globs.test_a_glob_matches_whole_names,
        test_table.test_a_condition,
    )
    for text, *_ in cases(test)
]


def test_there_are_cases() -> None:
    assert len(PARSED) > 200
    assert len(INFOS) > 100


@pytest.mark.parametrize("text", PARSED)
def test_a_case_of_the_parser(text: str, answer: Callable[[str], dict[str, Any]]) -> None:
    agrees(text, answer(text))


REGEXES = [
    *(r"/.*\.bias/", r"/a|b/", "/(?:a|b).*/", r"/(?P<x>a)b*/", r"/[a-c]{1,2}/", r"/[^.]+\.[^.]+/", r"/\w+\.\d+/"),
    *(r"/a{,2}/", r"/a{2,}/", "/a{x}/", "/.{3}/", r"/^a$/", r"/\Aa\Z/", r"/[\w.]*?weight/", r"/(a+)+b?/", r"/\x61/"),
    *("/(/", "/a**/", "/*a/", "/[b-a]/", "/a{2,1}/", "/[a/", r"/\q/", "/)/", "/(?P<x/", "/a{3}{2}/"),
]


@pytest.mark.parametrize("text", REGEXES)
def test_a_regular_expression(text: str, answer: Callable[[str], dict[str, Any]]) -> None:
    agrees(text, answer(text))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (r"/(?i)a/", "a flag"),
        (r"/(a)\1/", "a number behind a backslash"),
        (r"/(?=a).*/", "a look around"),
        (r"/(?<!a)b/", "a look around"),
        (r"/(?>a*)b/", "an atomic group"),
        (r"/a*+b/", "a possessive repeat"),
        (r"/\ba/", r"\b"),
        (r"/[a&&b]/", "a set operation"),
    ],
)
def test_what_the_page_does_not_take_is_named(text: str, what: str, answer: Callable[[str], dict[str, Any]]) -> None:
    assert answer(text)["message"] == f"{what} is not supported in the page"


def test_no_regular_expression_hangs(answer: Callable[[str], dict[str, Any]]) -> None:
    assert "names" in answer("/(a+)+(a+)+(a+)+$x/")
    assert "too large" in answer("/(((a{99}){99}){99})/")["message"]


@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(text=TEXTS | GLOBS.map(str) | st.text("ab01.*?{},|&~()[]:/\\\"'-<>=!x ", max_size=14))
def test_any_text_means_the_same(text: str, answer: Callable[[str], dict[str, Any]]) -> None:
    agrees(text, answer(text))
