"""Globs: matching, parsing and printing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selector_strategies import GLOBS, NAMES, glob
from torchparams._selector.glob_match import matches
from torchparams._selector.glob_reader import read_glob
from torchparams._selector.globs import ANY_DEPTH, Alternatives, Glob, Range, Wild, quote
from torchparams.errors import SelectorSyntaxError


@pytest.mark.parametrize(
    ("text", "hit", "missed"),
    [
        ("bias", ["bias"], ["fc.bias", "bias.x", "xbias", "Bias", ""]),
        ("**.bias", ["bias", "fc.bias", "a.b.c.bias"], ["in_proj_bias", "bias.x", "fc.xbias"]),
        ("encoder.**", ["encoder", "encoder.w", "encoder.a.b"], ["encoder2.w", "my.encoder.w", "encoderx"]),
        ("**", ["", "a", "a.b.c", "a..b"], []),
        ("a.**.b", ["a.b", "a.x.b", "a.x.y.b"], ["a", "b", "a.b.c", "x.a.b", "ab"]),
        ("**.a.**", ["a", "x.a", "a.x", "x.y.a.z"], ["b", "xa", "x.ab.y"]),
        ("**.a.**.b.**", ["a.b", "x.a.y.b.z", "a.a.b.b"], ["b.a", "a", "b", "ab"]),
        ("*", ["a", "", "weight"], ["a.b", "a."]),
        ("*.weight", ["fc.weight", ".weight"], ["weight", "a.b.weight"]),
        ("a*c", ["ac", "abc", "abbc", "a*c"], ["a.c", "ab", "abcd"]),
        ("fc?.weight", ["fc1.weight", "fcx.weight"], ["fc.weight", "fc12.weight", "fc..weight"]),
        ("head.*", ["head.w", "head.bias"], ["decode_head.w", "head", "head.a.b"]),
        ("{q,k,v}_proj", ["q_proj", "k_proj"], ["o_proj", "q", "_proj", "qk_proj"]),
        ("weight{,_orig}", ["weight", "weight_orig"], ["weight_", "weight_orig_orig"]),
        ("{a,b{c,d{1..2,x}}}", ["a", "bc", "bd1", "bd2", "bdx"], ["b", "ac", "bd3", "bd"]),
        ("{w*,?b}", ["w", "weight", "ab"], ["b", "aab", "w.x"]),
        (
            "layer.{0..5}.w",
            ["layer.0.w", "layer.5.w"],
            ["layer.6.w", "layer.05.w", "layer.00.w", "layer.-1.w", "layer..w"],
        ),
        (
            "layer.{8..11}.w",
            ["layer.8.w", "layer.9.w", "layer.10.w", "layer.11.w"],
            ["layer.1.w", "layer.12.w", "layer.08.w"],
        ),
        ("layer{0..11}", ["layer0", "layer11"], ["layer12", "layer110", "layer01", "layer"]),
        ("{0..11}x", ["0x", "11x"], ["12x", "x", "111x"]),
        ("{0..11}1", ["01", "101", "111"], ["1", "121", "0011"]),
        ("{1..2}{1..2}", ["11", "12", "22"], ["1", "13", "111"]),
        ("l{00..11}", ["l00", "l07", "l11"], ["l7", "l12", "l007", "l0"]),
        ("{5..5}", ["5"], ["4", "55"]),
        ("{1..3,7,x}", ["1", "3", "7", "x"], ["4", "0"]),
        ("{0..1000000000000}", ["0", "999999999999", "1000000000000"], ["1000000000001", "00", "a"]),
        ("{0..5}", ["3"], ["٣", "3\n"]),  # a digit of another script is no number in a name
        ('"my layer".weight', ["my layer.weight"], ["my layer", "mylayer.weight"]),
        ("my\\ layer.weight", ["my layer.weight"], []),
        ('"a.b|c"', ["a.b|c"], ["a.b", "axb|c"]),
        ("'it[0]'", ["it[0]"], ["it0"]),
        ('"say \\"hi\\" \\\\"', ['say "hi" \\'], []),
        ('"*"', ["*"], ["a"]),
        ("\\*\\*", ["**"], ["a"]),
        ('a."".b', ["a..b"], ["a.b"]),
        ('""', [""], ["a", "."]),
        ("a/b.c", ["a/b.c"], ["a.b.c"]),
        ('"/a"/b', ["/a/b"], []),
        ("a-b_c@1%#$^+", ["a-b_c@1%#$^+"], []),
        ("größe.**", ["größe.w"], ["grosse.w"]),
        ("*\\\n*", ["\n", "a\nb"], ["ab"]),
        ("*", ["a\nb"], []),
    ],
)
def test_a_glob_matches_whole_names(text: str, hit: list[str], missed: list[str]) -> None:
    parsed = glob(text)
    assert [name for name in [*hit, *missed] if matches(parsed, name)] == hit


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a.**.*b?", "a.**.*b?"),
        ('"a.b".c', "a.b.c"),
        ('a"b c"d', '"ab cd"'),
        ("a\\ b", '"a b"'),
        ("{ a , b }", "{a,b}"),
        ("{{0..5},x}", "{0..5,x}"),
        ("{000..010}", "{000..010}"),
        ("{a,{b,c}}", "{a,{b,c}}"),
        ('{"a,b",c}', '{"a,b",c}'),
        ('*""*', "*"),
        ('"/x"', '"/x"'),
        ('"/x".*', '"/x".*'),
        ("a./x", "a./x"),
        ("'\"'", '"\\""'),
    ],
)
def test_a_glob_prints_to_text_that_means_the_same(text: str, printed: str) -> None:
    assert str(glob(text)) == printed
    assert glob(printed) == glob(text)


def test_a_glob_ends_where_no_glob_can_go_on() -> None:
    for after in "|&~()[]:, \n;!=<>`}":
        assert read_glob("x a.b" + after, 2) == (Glob((("a",), ("b",))), 5)


# --- naive oracle: try every way to match -------------------------------------------------------


def naive_part(pieces: tuple[object, ...], part: str) -> bool:
    if not pieces:
        return not part
    first, *others = pieces
    rest = tuple(others)
    if first is Wild.CHARACTERS:
        return any(naive_part(rest, part[at:]) for at in range(len(part) + 1))
    if first is Wild.CHARACTER:
        return bool(part) and naive_part(rest, part[1:])
    if isinstance(first, Alternatives):
        return any(naive_part((*item, *rest), part) for item in first.items)
    texts = [str(first)]
    if isinstance(first, Range):
        texts = [f"{n:0{first.width}}" for n in range(first.first, first.last + 1)]
    return any(part.startswith(text) and naive_part(rest, part[len(text) :]) for text in texts)


def naive(components: tuple[tuple[object, ...], ...], parts: list[str]) -> bool:
    if not components:
        return not parts
    first, *rest = components
    if first == ANY_DEPTH:
        return any(naive(tuple(rest), parts[at:]) for at in range(len(parts) + 1))
    return bool(parts) and naive_part(first, parts[0]) and naive(tuple(rest), parts[1:])


@settings(deadline=None)
@given(GLOBS, NAMES)
def test_the_definition_agrees_with_trying_everything(pattern: Glob, name: str) -> None:
    assert matches(pattern, name) == naive(pattern.components, name.split("."))


@settings(deadline=None)
@given(GLOBS)
def test_every_glob_prints_to_itself(pattern: Glob) -> None:
    assert glob(str(pattern)) == pattern


@given(st.text())
def test_a_quoted_name_matches_that_name_alone(name: str) -> None:
    pattern = glob(quote(name))
    assert pattern.literal == name
    assert matches(pattern, name)
    assert not matches(pattern, name + "x")


def test_a_plain_name_needs_no_quotes() -> None:
    assert quote("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj.weight"


def test_only_a_glob_without_wildcards_is_one_name() -> None:
    assert glob("a.b").literal == "a.b"
    assert glob("a.*").literal is None
    assert glob("**.b").literal is None
    assert glob("a.{0..1}").literal is None


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        (
            "a..b",
            3,
            "found '.'. Components are joined by single dots; an empty one is written \"\".",
        ),
        (".a", 1, "Expected a component of a name, found '.'."),
        (
            "encoder.",
            9,
            "Expected a component after the dot, found the end. `encoder.**` is everything below a module.",
        ),
        ("a.|b", 3, "Expected a component after the dot, found '|'. `a.**` is everything below a module."),
        (
            "foo**",
            4,
            "between dots, found other text beside it. Within a component, `*` is any characters.",
        ),
        ("**foo", 1, "Expected `**` to be a whole component"),
        ("***", 1, "Expected `**` to be a whole component"),
        ("a.**{b,c}", 3, "Expected `**` to be a whole component"),
        (
            "{a,**}",
            4,
            "`*` for any characters of one component, found `**`. `**` cannot be inside braces.",
        ),
        ("{5..0}", 2, "Expected a range that goes up, found `5..0`. Did you mean {0..5}?"),
        (
            "{00..5}",
            2,
            "found `00..5`. Use leading zeros in both bounds or in neither: {00..05} or {0..5}.",
        ),
        ("{5..}", 3, "Expected whole numbers on both sides of `..`, found `..`. A range is written {0..5}."),
        ("{a..c}", 3, "Expected whole numbers on both sides of `..`"),
        ("{-0..3}", 4, "Expected whole numbers on both sides of `..`"),
        ("{-1..-3}", 2, "Expected a range that goes up, found `-1..-3`. Did you mean {-3..-1}?"),
        ("layer{-1}", 10, "Expected a number that counts from the end to be a whole component"),
        ("{..3}", 2, "Expected whole numbers on both sides of `..`"),
        ("{0..5", 6, "Expected `,` or `}`, found the end. The brace at column 1 is not closed."),
        ("{0..5x}", 3, "Expected whole numbers on both sides of `..`"),
        ("{0..5 x}", 3, "Expected whole numbers on both sides of `..`"),
        ("{" + "1" * 19 + "..2}", 2, "Expected a number of at most 18 digits, found one of 19"),
        ("{" + "1" * 9999 + "..2}", 2, "Expected a number of at most 18 digits, found one of 9999"),
        ("{a}", 3, "Expected `,` or `..` in the braces, found '}'. Alternatives are written {a,b}, a range {0..5}."),
        ("{}", 2, "Expected `,` or `..` in the braces, found '}'."),
        ("{a,b", 5, "Expected `,` or `}`, found the end. The brace at column 1 is not closed."),
        ("x{a,{b,c}", 10, "Expected `,` or `}`, found the end. The brace at column 2 is not closed."),
        ("{a,b|c}", 5, "Expected `,` or `}`, found '|'"),
        (
            "{a.b,c}",
            3,
            "without a dot: braces stand within one component, found a dot. A union is written `a.b.** | c.**`.",
        ),
        ('{"a.b",c}', 2, "Expected alternatives without a dot"),
        ('"abc', 5, 'Expected a closing ", found the end. The quote at column 1 is not closed.'),
        ("a.'abc\\", 8, "Expected a closing ', found the end. The quote at column 3 is not closed."),
        ("a\\", 3, "Expected a character after the backslash, found the end."),
        ("{" * 33 + "a", 33, "Expected braces nested at most 32 deep"),
    ],
)
def test_a_broken_glob_says_where_and_what_was_expected(text: str, column: int, message: str) -> None:
    with pytest.raises(SelectorSyntaxError, match=re.escape(message)) as caught:
        read_glob(text, 0)
    assert caught.value.column == column


def test_deep_braces_are_a_limit_and_no_recursion() -> None:
    text = "{a," * 32 + "b" + "}" * 32
    pattern = glob(text)
    assert str(pattern) == text
    assert matches(pattern, "b")
    assert not matches(pattern, "c")


def test_numbers_from_the_end_are_those_of_the_module() -> None:
    names = {"h": [0, 1, 2, 10], "d": [0, 4], "e": []}

    def hit(text: str, name: str) -> bool:
        return matches(glob(text), name, lambda module: names.get(module, []))

    assert hit("h.{-1}.w", "h.10.w") and not hit("h.{-1}.w", "h.2.w")
    assert hit("*.{-2..-1}.w", "d.0.w") and hit("*.{-2..-1}.w", "h.2.w") and not hit("*.{-2..-1}.w", "h.1.w")
    assert hit("h.{1..-2}.w", "h.1.w") and hit("h.{1..-2}.w", "h.2.w") and not hit("h.{1..-2}.w", "h.10.w")
    assert hit("h.{-9..-4}.w", "h.0.w") and not hit("h.{-9..-5}.w", "h.0.w")
    assert hit("h.{0,-1}.w", "h.0.w") and hit("h.{0,-1}.w", "h.10.w") and not hit("h.{0,-1}.w", "h.-1.w")
    assert hit("**.{-1}.**", "d.4.w") and not hit("e.{-1}.w", "e.1.w")
    assert hit('h.{0,"-1"}.w', "h.-1.w")


@pytest.mark.parametrize("text", ["h.{-1}", "h.{-2..-1}", "h.{3..-1}", "h.{0,-1,-4..-3}", 'h.{a,"-1"}'])
def test_numbers_from_the_end_print_as_they_are_written(text: str) -> None:
    assert str(glob(text)) == text
