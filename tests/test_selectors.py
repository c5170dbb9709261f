"""Selector objects: created from text, functions and names, combined, applied, explained."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchparams as tp
from fake_infos import live, stored, transformer
from torchparams._selector.parser import parse
from torchparams.errors import NoMatch, SelectorError, SelectorSyntaxError, UnknownName
from torchparams.selectors import Explanation, Selector, quote

if TYPE_CHECKING:
    from torchparams.info import ParameterInfo

MODEL = transformer()
NAMES = [info.name for info in MODEL]


def is_small(info: ParameterInfo) -> bool:
    return info.numel < 10


# --- made of --------------------------------------------------------------------------------------


def test_a_selector_is_made_of_text() -> None:
    assert Selector("head.**").names(MODEL) == {"head.weight", "head.bias"}


def test_a_selector_is_made_of_a_selector() -> None:
    selector = Selector("head.**")
    assert Selector.of(selector) is selector
    assert Selector(selector) == selector


def test_a_selector_is_made_of_a_function_of_the_record() -> None:
    assert Selector(is_small).names(MODEL, strict=True) == {"head.bias"}
    assert str(Selector(is_small)) == "<function is_small>"
    assert Selector(is_small) == Selector(is_small)
    assert Selector(lambda info: [info.kind]).names(MODEL) == set(NAMES)  # any true value will do


@pytest.mark.parametrize(
    "names",
    [
        ["head.weight", "head.bias"],
        {"head.weight", "head.bias"},
        ("head.bias", "head.weight", "head.bias"),
        {"head.weight": None, "head.bias": None},
        MappingProxyType({"head.weight": 1, "head.bias": 2}),
        (name for name in ("head.weight", "head.bias")),
    ],
)
def test_a_selector_is_made_of_names(names: object) -> None:
    assert Selector(names).names(MODEL, strict=True) == {"head.weight", "head.bias"}


def test_names_are_exact_and_no_globs() -> None:
    infos = [live("*"), live("a"), live("a b.c")]
    assert Selector(["*"]).names(infos) == {"*"}
    assert Selector(["a b.c"]).names(infos) == {"a b.c"}
    assert str(Selector(["*", "a b.c"])) == '"*" | "a b".c'
    assert Selector(str(Selector(["*", "a b.c"]))).names(infos) == {"*", "a b.c"}


def test_names_are_found_under_any_spelling() -> None:
    infos = [live("fc.w", raw="module.fc.w"), live("embed.w", aliases=("head.w",))]
    assert Selector(["module.fc.w", "head.w"]).names(infos, strict=True) == {"fc.w", "embed.w"}


def test_missing_names_are_left_out_without_strictness() -> None:
    assert Selector(["head.bias", "nope"]).names(MODEL) == {"head.bias"}


def test_a_mapping_that_can_be_called_is_names_and_no_function() -> None:
    class Table(dict[str, int]):
        def __call__(self) -> None:
            raise AssertionError("called")

    assert Selector(Table({"head.bias": 1})).names(MODEL) == {"head.bias"}


def test_a_model_is_no_selector() -> None:
    class Net:
        def named_parameters(self) -> None: ...

        def __call__(self, x: object) -> None: ...

    with pytest.raises(SelectorError, match=re.escape("A Net is a model, not a selector (text, names or a function")):
        Selector(Net())


def test_tensors_in_a_list_are_no_names() -> None:
    with pytest.raises(SelectorError, match="must contain names, modules or parameters, not a float"):
        Selector([1.5, "a"])


@pytest.mark.parametrize("what", [None, 3, b"head.**", object(), int, list])
def test_anything_else_is_no_selector(what: object) -> None:
    with pytest.raises(SelectorError, match=r"is not a selector\. A selector is text such as '\*\*\.bias', a list"):
        Selector(what)


def test_an_error_of_the_users_function_stays_theirs_and_says_where_it_was() -> None:
    with pytest.raises(TypeError, match="NoneType") as caught:
        Selector(lambda info: info.shape > 1).names([live("a.lazy", None)])
    assert caught.value.__notes__[0].endswith("for the parameter 'a.lazy'")


# --- a value --------------------------------------------------------------------------------------


def test_everything() -> None:
    assert Selector.everything().names(MODEL) == set(NAMES)
    assert Selector.everything().names([]) == frozenset()
    assert Selector.everything().names([live("")]) == {""}


def test_equality_hash_and_text() -> None:
    first, second = Selector("**.bias|[ndim < 2]"), Selector("**.bias") | Selector("[ndim<2]")
    assert first == second
    assert hash(first) == hash(second)
    assert str(first) == "**.bias | [ndim<2]"
    assert repr(first) == "Selector('**.bias | [ndim<2]')"
    assert eval(repr(first)) == first
    assert first != Selector("[ndim<2] | **.bias")
    assert first != "**.bias | [ndim<2]"
    assert len({first, second, Selector(["a"]), Selector({"a"})}) == 2


def test_a_selector_is_copied_and_pickled() -> None:
    selector = Selector("**.{q,k}_proj.{0..3}:bias | ~(/a.*/[dtype=bf16] & [shape=2x*])")
    for copied in (copy.deepcopy(selector), pickle.loads(pickle.dumps(selector))):
        assert copied == selector
        assert str(copied) == str(selector)


def test_operators_build_the_text() -> None:
    a, b, c = Selector("a"), Selector("b"), Selector("c")
    assert str(a | b | c) == "a | b | c"
    assert str(a & (b | c)) == "a & (b | c)"
    assert str(~(a | b)) == "~(a | b)"
    assert str(a - b) == "a & ~b"
    assert str(a - (b | c)) == "a & ~(b | c)"
    assert str(a | "b & c") == "a | b & c"
    assert str("b" | a) == "b | a"
    assert str("b" & a) == "b & a"
    assert str("b" - a) == "b & ~a"
    assert str(Selector(["x", "y"]) & a) == "(x | y) & a"
    assert str(~Selector(["x", "y"])) == "~(x | y)"
    assert str(~Selector(["x"])) == "~x"


def test_operators_take_selectors_and_text_alone() -> None:
    with pytest.raises(TypeError):
        Selector("a") | ["a"]
    with pytest.raises(SelectorSyntaxError):
        Selector("a") | "b c"


def test_a_long_union_built_in_a_loop_is_flat() -> None:
    selector = both = Selector("x")
    for n in range(500):
        selector |= f"l.{n}"
        both -= f"l.{n}"
    assert len(selector.branches) == 501
    assert Selector(str(selector)) == selector
    assert Selector(str(both)) == both


def test_branches() -> None:
    assert [str(branch) for branch in Selector("a | b & c | (d | ~e)").branches] == ["a", "b & c", "d", "~e"]
    assert Selector("a & (b | c)").branches == (Selector("a & (b | c)"),)


def test_quote_is_the_selector_of_one_name() -> None:
    for name in ("fc.weight", "my layer.w", "", "a..b", "/x/", "**", ":bias"):
        assert Selector(quote(name)).names([live(name), live("fc.bias")], strict=True) == {name}


# --- laws -----------------------------------------------------------------------------------------

TERMS = st.sampled_from(
    [
        *("**", "**.bias", "head.**", "encoder.layer.{0..1}.**", "encoder.**.norm.*", "lm_head.weight", "nothing"),
        *("/.*weight/", "[ndim=2]", "[numel>100]", "[shape=16x*]", ":bias", ":norm", ":frozen", "~:matrix", ":tied"),
    ]
)


@settings(deadline=None)
@given(TERMS, TERMS, TERMS)
def test_the_operators_are_those_of_sets(x: str, y: str, z: str) -> None:
    everything = frozenset(NAMES)
    a, b, c = Selector(x), Selector(y), Selector(z)
    set_a, set_b, set_c = (selector.names(MODEL) for selector in (a, b, c))
    assert (a | b).names(MODEL) == set_a | set_b == Selector(f"({x}) | ({y})").names(MODEL)
    assert (a & b).names(MODEL) == set_a & set_b == Selector(f"({x}) & ({y})").names(MODEL)
    assert (a - b).names(MODEL) == set_a - set_b
    assert (~a).names(MODEL) == everything - set_a == Selector(f"~({x})").names(MODEL)
    assert ((a | b) & ~c).names(MODEL) == (set_a | set_b) - set_c
    assert (~(a & b) | c).names(MODEL) == everything - (set_a & set_b) | set_c


@settings(deadline=None)
@given(TERMS, TERMS)
def test_a_selection_of_part_of_a_table_is_part_of_the_selection(x: str, y: str) -> None:
    """What hits a parameter does not hang on the other parameters."""
    selector = Selector(x) & ~Selector(y)
    for part in (MODEL[::2], MODEL[5:20]):
        assert selector.names(part) == selector.names(MODEL) & {info.name for info in part}


@settings(deadline=None)
@given(st.lists(TERMS, min_size=1, max_size=4))
def test_strict_is_that_every_branch_hits(terms: list[str]) -> None:
    selector = Selector(" | ".join(terms))
    hits = [Selector(term).names(MODEL) for term in terms]
    if all(hits):
        assert selector.names(MODEL, strict=True) == frozenset().union(*hits)
    else:
        missed = next(term for term, hit in zip(terms, hits, strict=True) if not hit)
        with pytest.raises(NoMatch, match=re.escape(f"`{missed}` matches nothing")):
            selector.names(MODEL, strict=True)


def test_strictness_is_off_only_when_that_is_said() -> None:
    assert Selector("nope").names(MODEL, strict=False) == frozenset()
    assert Selector("nope | head.bias").names(MODEL) == {"head.bias"}
    with pytest.raises(NoMatch):
        Selector("nope | head.bias").names(MODEL, strict=True)


def test_records_may_come_from_any_iterable() -> None:
    assert Selector("head.**").names(iter(MODEL), strict=True) == {"head.weight", "head.bias"}


# --- explain --------------------------------------------------------------------------------------


def test_an_explanation_counts_each_term_and_lists_what_hit_what() -> None:
    explanation = Selector("**.norm.bias | head.** & ~[ndim=1]").explain(MODEL)
    assert str(explanation) == "\n".join(
        [
            "**.norm.bias | head.** & ~[ndim=1]",
            "term                                tensors  parameters  hits",
            "**.norm.bias | head.** & ~[ndim=1]        4          80  encoder.layer.0.norm.bias, "
            "encoder.layer.1.norm.bias, encoder.layer.2.norm.bias and 1 more",
            "  **.norm.bias                            3          48  encoder.layer.0.norm.bias, "
            "encoder.layer.1.norm.bias, encoder.layer.2.norm.bias",
            "  head.** & ~[ndim=1]                     1          32  head.weight",
            "    head.**                               2          34  head.weight, head.bias",
            "    ~[ndim=1]                            12      3.97 K  embeddings.word.weight, "
            "encoder.layer.0.attn.q_proj.weight, encoder.layer.0.attn.k_proj.weight and 9 more",
            "      [ndim=1]                           16         242  encoder.layer.0.attn.q_proj.bias, "
            "encoder.layer.0.attn.k_proj.bias, encoder.layer.0.attn.v_proj.bias and 13 more",
            "",
            "parameter                  hit by",
            "encoder.layer.0.norm.bias  **.norm.bias",
            "encoder.layer.1.norm.bias  **.norm.bias",
            "encoder.layer.2.norm.bias  **.norm.bias",
            "head.weight                head.**  ~[ndim=1]",
            "4 of 28 tensors",
        ]
    )
    assert repr(explanation) == str(explanation)


def test_an_explanation_names_the_terms_that_a_parameter_is_hit_by() -> None:
    """A term of an intersection counts only where all of the intersection hits."""
    explanation = Selector("head.** & **.weight | **.bias & (head.** | decode_head.**) | ~encoder.**").explain(MODEL)
    assert explanation.by == {
        "embeddings.word.weight": ("~encoder.**",),
        "head.weight": ("head.**", "**.weight", "~encoder.**"),
        "head.bias": ("**.bias", "head.**", "~encoder.**"),
        "decode_head.weight": ("~encoder.**",),
    }


def test_an_explanation_of_one_term_is_short() -> None:
    assert str(Selector("head.**").explain(MODEL)) == "\n".join(
        [
            "head.**",
            "term     tensors  parameters  hits",
            "head.**        2          34  head.weight, head.bias",
            "2 of 28 tensors",
        ]
    )


def test_an_explanation_says_why_a_term_hits_nothing() -> None:
    shown = str(Selector("bias | [dtype=bf16] | head.** | ~** & nope").explain(MODEL))
    assert "nothing: did you mean `**.bias`?" in shown
    assert "nothing: `dtype` of the 28 parameters is float32" in shown
    assert "nothing: a part of it matches nothing" in shown
    assert "nothing: `**` matches all 28 parameters" in shown


def test_an_explanation_as_json() -> None:
    explanation = Selector("head.* | nope").explain(MODEL)
    assert json.loads(json.dumps(explanation.to_json())) == {
        "selector": "head.* | nope",
        "tensors": 28,
        "names": ["head.weight", "head.bias"],
        "by": {"head.weight": ["head.*"], "head.bias": ["head.*"]},
        "terms": [
            {
                "term": "head.* | nope",
                "depth": 0,
                "tensors": 2,
                "numel": 34,
                "names": ["head.weight", "head.bias"],
                "note": None,
            },
            {
                "term": "head.*",
                "depth": 1,
                "tensors": 2,
                "numel": 34,
                "names": ["head.weight", "head.bias"],
                "note": None,
            },
            {
                "term": "nope",
                "depth": 1,
                "tensors": 0,
                "numel": 0,
                "names": [],
                "note": "no name has the component 'nope'; the names start with encoder, head, embeddings, decode_head",
            },
        ],
    }


def test_the_terms_of_an_explanation_are_selections() -> None:
    selector = Selector("**.bias & (head.** | encoder.**) | decode_head.weight")
    for term in selector.explain(MODEL).terms:
        assert set(term.names) == Selector(term.text).names(MODEL)
        assert list(term.names) == [name for name in NAMES if name in term.names]
    assert set(selector.explain(MODEL).names) == selector.names(MODEL)


def test_an_explanation_of_many_parameters_is_cut_in_the_middle() -> None:
    explanation = Selector("**.bias | **.weight").explain(transformer(40))
    text = str(explanation)
    assert "… 284 more parameters …" in text
    assert len(text.splitlines()) < 60
    assert len(str(explanation.tree(limit=None)).splitlines()) > 320


def test_an_explanation_of_an_empty_table() -> None:
    assert str(Selector("a | b").explain([])).endswith("0 of 0 tensors")


def test_an_explanation_of_a_function_and_of_names() -> None:
    selector = Selector(is_small) | Selector(["head.weight", "nope"])
    shown = str(selector.explain(MODEL))
    assert "<function is_small> | head.weight | nope" in shown
    assert "head.bias" in shown


def test_an_explanation_in_a_notebook() -> None:
    html = Selector("head.** | [name='<a>']").explain(MODEL)._repr_html_()
    assert "<table>" in html
    assert "&lt;a&gt;" in html
    assert "<a>" not in html


def test_an_explanation_asks_no_more_of_a_file_than_it_records() -> None:
    with pytest.raises(SelectorError, match=r"m\.pt: `:norm` cannot be evaluated"):
        Selector("**.bias | :norm").explain([stored("a.bias")], where="m.pt")


@settings(deadline=None)
@given(st.lists(TERMS, min_size=1, max_size=5).map(" | ~".join))
def test_an_explanation_never_fails(text: str) -> None:
    explanation = Selector(text).explain(MODEL)
    assert isinstance(explanation, Explanation)
    assert str(explanation)
    assert json.dumps(explanation.to_json())


# --- cost -----------------------------------------------------------------------------------------


def test_selecting_imports_neither_torch_nor_numpy_nor_rich() -> None:
    program = (
        "import sys, torchparams.selectors as s\n"
        "s.Selector('**.bias | :norm & [dtype=bf16] | /x.*/').explain([])\n"
        "print(sorted({'torch', 'numpy', 'rich', 'ml_dtypes'}.intersection(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_selector_is_parsed_once() -> None:
    before = parse.cache_info().misses
    for _ in range(5):
        Selector("a.text.that.no.other.test.has.**")
    assert parse.cache_info().misses == before + 1


def test_names_of_a_list_are_looked_up_and_not_searched() -> None:
    infos = [stored(f"layers.{n}.weight") for n in range(20_000)]
    wanted = [info.name for info in infos[::2]]
    assert Selector(wanted).names(infos, strict=True) == set(wanted)
    union = Selector(" | ".join(wanted[:2_000]))
    assert union.names(infos, strict=True) == set(wanted[:2_000])


LAYERS = {**{f"h.{i}.{name}.weight": np.zeros(2) for i in range(12) for name in ("a", "b")}, "head.weight": np.zeros(2)}


def test_layers_count_from_the_end() -> None:
    params = tp.of(LAYERS)
    assert params.select("h.{-1}.**").names == ["h.11.a.weight", "h.11.b.weight"]
    assert params.select("h.{-2..-1}.a.*").names == ["h.10.a.weight", "h.11.a.weight"]
    assert params.select("h.{10..-1}.a.*").names == ["h.10.a.weight", "h.11.a.weight"]
    assert params.select("[name=h.{0,-1}.a.*]").names == ["h.0.a.weight", "h.11.a.weight"]
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(3)))
    last = tp.of(model).select("{-1}.**")
    assert last.names == ["2.weight", "2.bias"]
    assert "1.weight" not in last and "2.weight" in last
    with pytest.raises(UnknownName):
        last["1.weight"]
    assert tp.freeze(model, "{-2..-1}.bias").names == ("1.bias", "2.bias")


def test_layers_by_their_number() -> None:
    params = tp.of(LAYERS)
    assert params.select("[layer>=11]").names == ["h.11.a.weight", "h.11.b.weight"]
    assert len(params.select("[layer!=0]")) == 23
    assert params.select("~[layer>=0]").names == ["head.weight"]
    with pytest.raises(NoMatch, match="The first numbers in the names of the 25 parameters range from 0 to 11"):
        params.select("[layer>11]")
    with pytest.raises(NoMatch, match="no name of them has a number"):
        params.select("head.*[layer=1]")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("not **.bias", "~**.bias"),
        ("**.weight and not :bias", "**.weight & ~:bias"),
        ("(a.** OR b.**) and c", "(a.** | b.**) & c"),
        ("not(**.bias)", "~**.bias"),
    ],
)
def test_words_for_the_operators_are_respelled(text: str, meant: str) -> None:
    with pytest.raises(SelectorSyntaxError, match=re.escape(f"Did you mean `{meant}`?")):
        tp.Selector(text)


def test_names_may_be_the_words() -> None:
    assert tp.of({"not": np.zeros(1), "and.w": np.zeros(1)}).select("not | and.*").names == ["not", "and.w"]


def test_a_star_that_hits_few_is_remarked_on() -> None:
    line = "`*.weight` matches 1 of the 25 parameters that `**.weight` matches"
    chosen = tp.of(LAYERS).select("*.weight")
    assert chosen.narrow == line
    assert line in str(chosen) and line in str(tp.stats(chosen)) and line in str(tp.ls(LAYERS, "*.weight", tree=True))
    for text in ("h.*.a.weight", "**.weight", "head.*", "~*.weight"):
        assert tp.of(LAYERS).select(text).narrow is None
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(1, 1)) for _ in range(4)), torch.nn.Linear(1, 1))
    assert "`*.weight` matches 1 of the 5 parameters that `**.weight` matches" in str(tp.freeze(model, "*.weight"))
