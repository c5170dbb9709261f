"""Parsing and printing of selectors, and errors for invalid ones."""

from __future__ import annotations

import inspect
import re
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from selector_strategies import GLOBS, TEXTS, glob
from torchparams import limits
from torchparams._selector.fields import FIELDS, UNITS
from torchparams._selector.globs import Glob
from torchparams._selector.parser import WORDS, parse
from torchparams._selector.tree import (
    Complement,
    Compound,
    Condition,
    Intersection,
    Node,
    Regex,
    Union,
    Word,
    complement,
    intersection,
    union,
)
from torchparams.dtypes import ALL, DType
from torchparams.errors import SelectorError, SelectorSyntaxError

A, B, C = (Compound(Glob(((name,),))) for name in "abc")


# --- structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a", A),
        ("  a\n", A),
        ("a|b", Union((A, B))),
        ("a | b | c", Union((A, B, C))),
        ("a | (b | c)", Union((A, B, C))),
        ("a & b | c", Union((Intersection((A, B)), C))),
        ("a & (b | c)", Intersection((A, Union((B, C))))),
        ("~a & b", Intersection((Complement(A), B))),
        ("~(a & b)", Complement(Intersection((A, B)))),
        ("~~a", Complement(Complement(A))),
        ("~ ~ ( a )", Complement(Complement(A))),
        ("((a))", A),
        ("/a.*/", Compound(Regex("a.*"))),
        ("/a\\/b/", Compound(Regex("a\\/b"))),
        ("/a|b/ | c", Union((Compound(Regex("a|b")), C))),
        ("a:bias:norm", Compound(Glob((("a",),)), (Word("bias"), Word("norm")))),
        (":bias[ndim<2]", Compound(None, (Word("bias"), Condition("ndim", "<", 2, "2")))),
        ("[ ndim  >= 2 ]", Compound(None, (Condition("ndim", ">=", 2, "2"),))),
        ("/x/[dtype=BF16]", Compound(Regex("x"), (Condition("dtype", "=", DType.of("bfloat16"), ""),))),
    ],
)
def test_a_text_is_parsed_by_the_grammar(text: str, tree: Node) -> None:
    assert parse(text) == tree


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a|b&c", "a | b & c"),
        ("(a|b)&c", "(a | b) & c"),
        ("(a&b)|c", "a & b | c"),
        ("(a&b)&c", "a & b & c"),
        ("~(a)", "~a"),
        ("~(a|b)", "~(a | b)"),
        ("~(a&b)", "~(a & b)"),
        ("~(~a)", "~~a"),
        ("(~a)&b", "~a & b"),
        ("[ndim < 2]:bias", "[ndim<2]:bias"),
        ("[numel>=1.5M]", "[numel>=1.5M]"),
        ("[dtype=torch.float16]", "[dtype=torch.float16]"),
        ("[shape=(64, 3,7,7)]", "[shape=64x3x7x7]"),
        ("[name='a b'.**]", '[name="a b".**]'),
        ("[module = *Norm]", "[module=*Norm]"),
    ],
)
def test_a_tree_prints_with_the_fewest_parentheses(text: str, printed: str) -> None:
    assert str(parse(text)) == printed
    assert parse(printed) == parse(text)


def test_two_spellings_of_a_value_are_equal() -> None:
    assert parse("[numel>=1.5K]") == parse("[numel >= 1500]")
    assert parse("[dtype=bf16]") == parse("[dtype=torch.bfloat16]")
    assert hash(parse("[nbytes=1KiB]")) == hash(parse("[nbytes=1024]"))
    assert parse("[numel>=1500]") != parse("[numel>1500]")


def test_a_parsed_text_is_kept() -> None:
    assert parse("some.text") is parse("some.text")


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[numel=0]", 0),
        ("[numel=1_000]", 1000),
        ("[numel=3K]", 3_000),
        ("[numel=3M]", 3_000_000),
        ("[numel=3G]", 3_000_000_000),
        ("[numel=0.5T]", 500_000_000_000),
        ("[nbytes=1KiB]", 1024),
        ("[nbytes=1.5 MiB]", 3 << 19),
        ("[nbytes=2GiB]", 2 << 30),
        ("[nbytes=1TiB]", 1 << 40),
        ("[numel=99999999999999999999999999999999999999]", 99999999999999999999999999999999999999),
        ("[shape=64x3x7x7]", (64, 3, 7, 7)),
        ("[shape=64×3]", (64, 3)),
        ("[shape=(64, 3, 7, 7)]", (64, 3, 7, 7)),
        ("[shape=[64, 3, 7, 7]]", (64, 3, 7, 7)),
        ("[shape=(64,)]", (64,)),
        ("[shape=64]", (64,)),
        ("[shape=*]", (None,)),
        ("[shape!=*x3]", (None, 3)),
        ("[shape=()]", ()),
        ("[shape=[]]", ()),
        ("[shape=lazy]", None),
        ("[device=cuda:0]", "cuda:0"),
        ("[kind='buffer']", "buffer"),
        ('[dtype="F32"]', "float32"),
        ("[name=**.bias]", glob("**.bias")),
        ("[module!=*Norm]", glob("*Norm")),
    ],
)
def test_a_value_is_read(text: str, value: object) -> None:
    node = parse(text)
    assert isinstance(node, Compound)
    (condition,) = node.conditions
    assert isinstance(condition, Condition)
    assert condition.value == value
    assert parse(str(node)) == node


def test_every_spelling_of_every_dtype_is_a_value() -> None:
    for dtype in ALL:
        for spelling in {str(dtype), dtype.code or str(dtype), f"torch.{dtype}"}:
            assert parse(f"[dtype={spelling}]") == parse(f"[dtype={dtype}]")


# --- round trip ----------------------------------------------------------------------------------

REGEXES = st.sampled_from([r".*\.bias", "a|b", "[/]", r"\/", "(?i)A", r"x{2,}"]).filter(lambda p: p != "[/]")
SIZES = st.builds(lambda n, unit: (f"{n}{unit}", n * UNITS[unit]), st.integers(0, 10**9), st.sampled_from([*UNITS]))
CONDITIONS = st.one_of(
    st.builds(
        lambda field, op, size: Condition(field, op, size[1], size[0]),
        st.sampled_from(["numel", "nbytes"]),
        st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
        SIZES,
    ),
    st.builds(
        lambda field, op, n: Condition(field, op, n, str(n)),
        st.sampled_from(["ndim", "layer"]),
        st.sampled_from(["=", "!=", "<", ">"]),
        st.integers(0, 9),
    ),
    st.builds(lambda n: Condition("bpw", "<", float(n), n), st.sampled_from(["4", "4.5", "0.25"])),
    st.sampled_from(["nf4", "gptq-*"]).map(lambda encoding: Condition("encoding", "!=", encoding, encoding)),
    st.builds(
        lambda field, op, pattern: Condition(field, op, pattern, str(pattern)),
        st.sampled_from(["name", "module"]),
        st.sampled_from(["=", "!="]),
        GLOBS,
    ),
    st.sampled_from(ALL).map(lambda dtype: Condition("dtype", "=", dtype, str(dtype))),
    st.sampled_from(["cpu", "cuda", "cuda:1", "meta"]).map(lambda device: Condition("device", "!=", device, device)),
    st.lists(st.none() | st.integers(0, 99), min_size=1, max_size=4)
    .map(tuple)
    .map(lambda shape: Condition("shape", "=", shape, "x".join("*" if n is None else str(n) for n in shape))),
)
COMPOUNDS = st.builds(
    Compound,
    st.none() | GLOBS | REGEXES.map(Regex),
    st.lists(CONDITIONS | st.sampled_from([*WORDS]).map(Word), max_size=3).map(tuple),
).filter(lambda compound: compound.pattern is not None or bool(compound.conditions))
NODES: st.SearchStrategy[Node] = st.recursive(
    COMPOUNDS,
    lambda nodes: (
        st.lists(nodes, min_size=2, max_size=3).map(lambda terms: union(*terms))
        | st.lists(nodes, min_size=2, max_size=3).map(lambda terms: intersection(*terms))
        | nodes.map(complement)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(NODES)
def test_every_tree_prints_to_text_that_parses_to_it(node: Node) -> None:
    text = str(node)
    again = parse(text)
    assert again == node
    assert hash(again) == hash(node)
    assert str(again) == text


@settings(deadline=None)
@given(NODES)
def test_no_parenthesis_can_be_left_out(node: Node) -> None:
    text = str(node)
    for opening in (at for at, char in enumerate(text) if char == "("):
        without = text[:opening] + text[opening + 1 :]
        closing = 0
        for at in range(opening, len(without)):
            closing += {"(": 1, ")": -1}.get(without[at], 0)
            if closing < 0:
                without = without[:at] + without[at + 1 :]
                break
        try:
            assert parse(without) != node
        except SelectorSyntaxError:  # the parenthesis stood in a quoted text or a regular expression
            pass


# --- errors --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(TEXTS | st.text())
@example("/" + "(" * 5000 + "/")
@example("/a{99999999999999999999}/")
@example("/(?L)a/")
@example("/[[a]/")
@example("/(?P<x>a)(?P<x>b)/")
@example("/\ud800/")
@example("[shape=[" + "9" * 5000 + "]]")
@example("[numel=" + "9" * 5000 + "]")
@example("[dtype=\ud800]")
@example("{0..٣}")
@example("(" * 50_000)
@example("~" * 50_000 + "a")
@example("{" * 50_000)
@example("a|" * 20_000 + "a")
@example("\x00")
@example("[name=\\")
@example("[shape=[")
@example("[dtype=']")
@example(":")
@example("[")
@example("/\\")
def test_any_text_is_a_selector_or_a_syntax_error(text: str) -> None:
    try:
        node = parse(text)
    except SelectorSyntaxError as error:
        assert 1 <= error.column <= len(text) + 1
        assert f"column {error.column}: Expected " in str(error)
        assert error.__notes__
    else:
        assert parse(str(node)) == node


FIELDS_LISTED = "(name, shape, ndim, numel, nbytes, dtype, device, kind, module, layer, encoding, bpw)"
WORDS_LISTED = "(trainable, frozen, tied, buffer, bias, norm, embedding, matrix, meta, quantized, sharded)"


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "Selector '', column 1: Expected a selector, found nothing. Use `**` to select every parameter."),
        ("   ", 1, "Expected a selector, found nothing. Use `**` to select every parameter."),
        ("()", 2, "Expected a selector, found ')'. Use `**` to select every parameter."),
        ("(a | b", 7, "Expected `)`, found the end. The parenthesis at column 1 is not closed."),
        ("a & (b | (c)", 13, "Expected `)`, found the end. The parenthesis at column 5 is not closed."),
        ("a | b)", 6, "Expected `|`, `&` or the end, found ')'. There is no open parenthesis."),
        (")", 1, "Expected a selector, found ')'. There is no open parenthesis."),
        ("a]", 2, "Expected `|`, `&` or the end, found ']'. There is no open bracket."),
        ("a}", 2, "Expected `|`, `&` or the end, found '}'. There is no open brace."),
        ("(a b)", 4, "Expected `|`, `&` or `)`, found 'b'. Write the parts of a term without spaces"),
        ("a and b", 3, "Expected `|`, `&` or the end, found 'and'. Did you mean `a & b`?"),
        ("a OR b", 3, "found 'OR'. Did you mean `a | b`?"),
        ("a not b", 3, "found 'not'. A complement is written `~a`, a difference `a & ~b`."),
        ("not a", 5, "found 'a'. Did you mean `~a`?"),
        ("a, b", 2, "found ','. A union is written `a | b`."),
        ("a; b", 2, "found ';'. A union is written `a | b`."),
        ("a - b", 3, "found '-'. A difference is written `a & ~b`."),
        ("a + b", 3, "found '+'. A union is written `a | b`."),
        ("a~b", 2, "found '~'. A difference is written `a & ~b`."),
        ("!a", 1, "Expected a selector, found '!'. A complement is written `~a`"),
        ("a || b", 4, "Expected a selector, found '|'. Use a single `|` for the union: `a | b`."),
        ("a && b", 4, "Expected a selector, found '&'. Use a single `&` for the intersection: `a & b`."),
        ("a | | b", 5, "Expected a selector, found '|'. `|` needs a selector on both sides."),
        ("| a", 1, "Expected a selector, found '|'. `|` needs a selector on both sides."),
        ("a |", 4, "Expected a selector, found the end"),
        ("~", 2, "Expected a selector, found the end"),
        ("a b", 3, 'quote a name with a space: "my layer".weight.'),
        ("a :bias", 3, "found ':'. Write the parts of a term without spaces, as in **.weight:trainable"),
        ("a(b)", 2, "found '('. Join two terms by `|` or `&`."),
        ("(a|b):bias", 6, "Expected `|`, `&` or the end, found ':'. Join them with `&`: (…) & :bias."),
        ("dtype=bf16", 6, "found '='. Write a condition in brackets: [dtype=bf16]."),
        ("ndim>2", 5, "found '>'. Write a condition in brackets: [ndim>2]."),
        ("a`b", 2, "found '`'. Quote a name with this character: \"a`b\".weight."),
        ("\u200b", 1, "Expected a selector, found '\\u200b'"),
        # words
        (":frozn", 2, f"Expected a word {WORDS_LISTED}, found 'frozn'. Did you mean :frozen?"),
        (":Trainable", 2, "found 'Trainable'. Did you mean :trainable?"),
        (":not(a)", 2, "found 'not'. The complement is written `~`."),
        (":weight", 2, "found 'weight'. Write **.weight."),
        (":ndim", 2, "found 'ndim'. `ndim` is a field: write [ndim=…]."),
        (":requires_grad", 2, "found 'requires_grad'. Write :trainable or :frozen."),
        (":", 2, "Expected a word: trainable, frozen"),
        ("a::b", 3, "Expected a word: trainable, frozen"),
        ("module:attr", 8, f"Expected a word {WORDS_LISTED}, found 'attr'"),
        # conditions
        ("[ndm=2]", 2, f"Expected a field {FIELDS_LISTED}, found 'ndm'. Did you mean ndim?"),
        (
            "[size>1M]",
            2,
            "found 'size'. Use [numel>1M] for elements, [nbytes>1MiB] for bytes, [shape=64x3] for the shape.",
        ),
        ("[trainable]", 2, "found 'trainable'. `trainable` is a word: write :trainable."),
        ("[requires_grad=1]", 2, "found 'requires_grad'. Write :trainable or :frozen."),
        ("layer[0].w", 7, "found '0'. Write an index as a component, after a dot: layer.0."),
        ("[]", 2, "Expected a field: name, shape"),
        ("[ndim]", 6, "Expected one of = != < <= > >=, found ']'"),
        ("[ndim==2]", 6, "Expected one of = != < <= > >=, found `==`. Write a single `=`."),
        ("[ndim=>2]", 6, "found `=>`. Write >=."),
        ("[ndim<>2]", 6, "found `<>`. Write !=."),
        ("[name=~bias]", 6, "Expected one of = !=, found `=~`. Write a regular expression as a term: /.*bias/."),
        ("[name$=bias]", 6, "found `$=`. Name and module take wildcards: [name=**.bias]."),
        ("[name*=bias]", 6, "found `*=`. Name and module take wildcards: [module=*Norm]."),
        (
            "[name<b]",
            6,
            "Expected one of = !=, found `<`. `name` has no order; use it with ndim, numel, nbytes, bpw, layer.",
        ),
        ("[shape>=3]", 7, "found `>=`. `shape` has no order; use it with ndim, numel, nbytes, bpw, layer."),
        ("[name=/x/]", 7, "Expected a glob, found '/'. Write a regular expression as a term: /.*bias/."),
        ("[name=]", 7, "Expected a glob, found ']'. [name=**.bias]."),
        ("[module=a b]", 11, "Expected `]`, found 'b'"),
        ("[ndim=2", 8, "Expected `]`, found the end. The bracket at column 1 is not closed."),
        ("a[name=b", 9, "Expected `]`, found the end. The bracket at column 2 is not closed."),
        ("[shape=[2, 3]", 14, "Expected `]`, found the end. The bracket at column 1 is not closed."),
        ("[ndim=]", 7, "Expected a value for ndim, found ']'. [ndim>=2]."),
        ("[ndim=two]", 7, "Expected a whole number, found 'two'. [ndim>=2]."),
        ("[ndim=2K]", 7, "Expected a whole number, found '2K'. [ndim>=2]."),
        ("[ndim=-1]", 7, "Expected a whole number, found '-1'"),
        ("[numel>1.5]", 8, "Expected a size, found '1.5'. 1.5 is not a whole number of elements."),
        ("[nbytes>1.0001KiB]", 9, "Expected a size, found '1.0001KiB'. 1.0001KiB is not a whole number of bytes."),
        ("[numel>1MB]", 8, "Expected a size, found '1MB'. 1500000, 1500K, 1.5M (decimal), 2KiB, 1MiB, 3GiB (binary)."),
        ("[numel>1e6]", 8, "Expected a size, found '1e6'."),
        (
            "[shape=3x]",
            8,
            "Expected a shape, found '3x'. [shape=64x3x7x7], with * for any size; [shape=()] is a scalar's.",
        ),
        ("[shape=(3]", 8, "Expected a shape, found '(3'."),
        (
            "[dtype=float9]",
            8,
            "Expected a dtype, found 'float9'. Use a spelling of torch, numpy or safetensors, such as bfloat16",
        ),
        ("[kind=bufer]", 7, "Expected one of parameter, buffer, tensor, found 'bufer'. Did you mean buffer?"),
        ("[device=cuda:x]", 9, "Expected a device, found 'cuda:x'. Write cpu, cuda (any of them), cuda:0, meta"),
        ("[dtype='bf16]", 14, "Expected a closing ', found the end. The quote at column 8 is not closed."),
        # regular expressions
        ("//", 2, "Expected a regular expression, found '/'. Write \"\" for the empty name."),
        ("/abc", 5, "Expected a closing `/`, found the end. The regular expression at column 1 is not closed."),
        ("/abc\\/", 7, "Expected a closing `/`, found the end."),
        (
            "a | /x(b/",
            7,
            "Expected a regular expression, found '('. Python's re says: missing ), unterminated subpattern.",
        ),
        ("/a**/", 4, "Expected a regular expression, found '*'. Python's re says: multiple repeat."),
        ("/[a/", 2, "Expected a regular expression, found '['. Python's re says: unterminated character set."),
        ("/(?L)a/", 5, "Python's re says: bad inline flags"),
        ("/x/i", 4, "Expected `[`, `:`, `|`, `&` or the end, found 'i'. Write flags inside: /(?i)x/."),
        # globs, of which tests/selector/test_globs.py has more
        ("a | b..c", 7, "Expected a component of a name, found '.'."),
        ("~layer.{5..0}", 9, "Expected a range that goes up, found `5..0`. Did you mean {0..5}?"),
    ],
)
def test_a_syntax_error_points_and_says_what_was_expected(text: str, column: int, message: str) -> None:
    with pytest.raises(SelectorSyntaxError, match=re.escape(message)) as caught:
        parse(text)
    assert caught.value.column == column
    assert caught.value.text == text
    assert "\n" not in str(caught.value)


def test_a_note_draws_the_column() -> None:
    with pytest.raises(SelectorSyntaxError) as caught:
        parse("encoder.** | [dtype=float9]")
    assert caught.value.__notes__ == ["    encoder.** | [dtype=float9]\n                        ^"]


def test_a_note_shows_the_line_of_a_text_of_several() -> None:
    with pytest.raises(SelectorSyntaxError) as caught:
        parse("encoder.**\n  | :nrm\n  | b")
    assert caught.value.__notes__ == ["      | :nrm\n         ^"]


@pytest.mark.parametrize("unit", ["(", "~", "~("])
def test_nesting_is_a_limit(unit: str) -> None:
    most = limits.SELECTOR_NESTING // len(unit)
    deepest = unit * most + "a" + ")" * (most if "(" in unit else 0)
    assert parse(str(parse(deepest))) == parse(deepest)
    with pytest.raises(SelectorSyntaxError, match=r"Expected at most 32 levels of `\(` and `~`"):
        parse(unit * (most + 1) + "a" + ")" * (most + 1 if "(" in unit else 0))


def test_the_deepest_text_takes_a_bounded_stack() -> None:
    text = "a"
    for _ in range(limits.SELECTOR_NESTING):
        text = f"a | b & ({text})"
    frames = len(inspect.stack(0))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(frames + 500)
    try:
        node = parse(text)
        assert parse(str(node)) == node
        assert hash(node) == hash(parse(str(node)))
    finally:
        sys.setrecursionlimit(limit)


def test_trees_that_python_builds_have_the_limit_too() -> None:
    node: Node = A
    with pytest.raises(SelectorError, match="The selector is nested more than 64 deep"):
        for _ in range(200):
            node = complement(node)


def test_flat_trees_have_no_limit() -> None:
    assert len(parse(" | ".join(["a"] * 5_000)).terms) == 5_000  # type: ignore[union-attr]  # it is a union


def test_the_words_and_fields_are_those_of_the_documentation() -> None:
    from torchparams import selectors

    assert selectors.__doc__ is not None
    words = re.findall(r"^\| `:(\w+)` \|", selectors.__doc__, re.MULTILINE)
    assert sorted(words) == sorted(WORDS)
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", selectors.__doc__, re.MULTILINE)
    assert [field for row in rows for field in re.findall(r"\w+", row)] == list(FIELDS)
