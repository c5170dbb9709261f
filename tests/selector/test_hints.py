"""Messages for selectors that match nothing: which part, why, and suggestions."""

from __future__ import annotations

import re

import numpy as np
import pytest

import torchparams as tp
from fake_infos import live, stored, transformer
from torchparams._selector.candidates import Candidates
from torchparams._selector.hints import refuse_empty
from torchparams._selector.parser import parse
from torchparams.errors import NoMatch, SelectorError
from torchparams.selectors import Selector

MODEL = transformer(12)


def refusal(text: str) -> str:
    """What the strict selection says."""
    with pytest.raises(NoMatch) as caught:
        refuse_empty(Candidates(MODEL, "BertModel"), parse(text))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # a module's name, the end of names, the middle of names
        (
            "encoder.layer.0",
            "BertModel: `encoder.layer.0` matches nothing. It names a module, with 8 parameters below it. "
            "Did you mean `encoder.layer.0.**`?",
        ),
        (
            "encoder.layer.{0..3}",
            "BertModel: `encoder.layer.{0..3}` matches nothing. It names a module, with 32 parameters below it. "
            "Did you mean `encoder.layer.{0..3}.**`?",
        ),
        (
            "bias",
            "BertModel: `bias` matches nothing. A glob matches whole names; this is only the end of 49 parameters. "
            "Did you mean `**.bias`?",
        ),
        (
            "attn",
            "BertModel: `attn` matches nothing. A glob matches whole names; this is only a part of 72 "
            "parameters. Did you "
            "mean `**.attn.**`?",
        ),
        (
            "layer.0.**",
            "BertModel: `layer.0.**` matches nothing. A glob matches whole names; this is only the end of 8 "
            "parameters. "
            "Did you mean `**.layer.0.**`?",
        ),
        (
            "encoder.*.weight",
            "BertModel: `encoder.*.weight` matches nothing. `*` is exactly one component; with `**`, 48 "
            "parameters would match. Did you mean `encoder.**.weight`?",
        ),
        # misspelt
        (
            "encoder.layr.*.norm.weight",
            "BertModel: `encoder.layr.*.norm.weight` matches nothing. No name has the component 'layr'. "
            "Did you mean `encoder.layer.*.norm.weight` (12 parameters)?",
        ),
        (
            "Head.**",
            "BertModel: `Head.**` matches nothing. No name has the component 'Head'. "
            "Did you mean `head.**` (2 parameters)?",
        ),
        (
            "encodr.layer.0",
            "BertModel: `encodr.layer.0` matches nothing. No name has the component 'encodr'. "
            "Did you mean `encoder.layer.0.**` (8 parameters)?",
        ),
        (
            "module.encoder.**",
            "BertModel: `module.encoder.**` matches nothing. No name has the component 'module'. "
            "Did you mean `encoder.**` (96 parameters)?",
        ),
        # nothing like it
        (
            "foo.**",
            "BertModel: `foo.**` matches nothing. No name has the component 'foo'; the names start with encoder, head, "
            "embeddings, decode_head.",
        ),
        ("encoder.head", "BertModel: `encoder.head` matches nothing. The nearest names are 'decode_head.weight'."),
        (
            "^encoder",
            "The wildcards of a glob are * ** ? {}. Write a regular expression between slashes: /.*bias/.",
        ),
        # a branch, wherever it stands
        (
            "head.** | **.biass",
            "BertModel: `**.biass` matches nothing, in `head.** | **.biass`. No name has the component 'biass'. "
            "Did you mean `**.bias` (49 parameters)?",
        ),
        (
            "**.weight & (encoder.** | (nope | head.**))",
            "BertModel: `nope` matches nothing, in `**.weight & (encoder.** | nope | head.**)`. "
            "No name has the component 'nope'",
        ),
        ("**.weight & ~(head.** | nope)", "`nope` matches nothing, in `**.weight & ~(head.** | nope)`."),
        # intersections and complements
        (
            "**.weight & **.bias",
            "BertModel: `**.weight & **.bias` matches nothing. `**.weight` matches 51 and `**.bias` matches "
            "49, but no parameter matches both.",
        ),
        (
            "head.** & **.weight & [ndim=1]",
            "`head.** & **.weight & [ndim=1]` matches nothing. `head.** & **.weight` matches 1 and `[ndim=1]` matches "
            "61, but no parameter matches both.",
        ),
        ("head & **.weight", "BertModel: `head` matches nothing, in `head & **.weight`. It names a module"),
        ("**.weight & head", "BertModel: `head` matches nothing, in `**.weight & head`. It names a module"),
        (
            "head.** | **.weight & **.bias",
            "`**.weight & **.bias` matches nothing, in `head.** | **.weight & **.bias`. `**.weight` matches 51",
        ),
        ("~bias", "BertModel: `bias` matches nothing, in `~bias`. A glob matches whole names"),
        ("~**", "BertModel: `~**` matches nothing. `**` matches all 100 parameters."),
        (
            "**.weight & ~(** | head.**)",
            "`~(** | head.**)` matches nothing, in `**.weight & ~(** | head.**)`. `** | head",
        ),
        # conditions
        (
            "encoder.layer.0.**[ndim=7]",
            "BertModel: `encoder.layer.0.**[ndim=7]` matches nothing. `encoder.layer.0.**` alone matches 8; "
            "`ndim` of them is 1, 2.",
        ),
        (
            "**[ndim=1][dtype=bf16]",
            "`**[ndim=1][dtype=bf16]` matches nothing. `**[ndim=1]` alone matches 61; `dtype` of them is float32.",
        ),
        ("[dtype=bf16]", "BertModel: `[dtype=bf16]` matches nothing. `dtype` of the 100 parameters is float32."),
        ("[numel>1G]", "`[numel>1G]` matches nothing. `numel` of the 100 parameters ranges from 2 to 1,600."),
        ("[nbytes<1]", "`nbytes` of the 100 parameters ranges from 8 to 6,400."),
        ("[shape=7]", "Shapes of the 100 parameters are [16], [16, 16], [2, 16], [100, 16] and 1 other."),
        ("[device=cuda]", "`device` of the 100 parameters is cpu."),
        ("[kind=buffer]", "`kind` of the 100 parameters is parameter."),
        (
            "[module=LayerNrm]",
            "The owner classes of the 100 parameters are Linear, LayerNorm, Embedding. Did you mean "
            "`[module=LayerNorm]`?",
        ),
        (
            "[name=bias]",
            "`[name=bias]` matches nothing. A glob matches whole names; this is only the end of 49 parameters.",
        ),
        ("head.**[name=encoder.**]", "`head.**` alone matches 2; no name of them matches."),
        ("[name!=**]", "`[name!=**]` matches nothing. No name of the 100 parameters matches."),
        (
            ":buffer",
            "BertModel: `:buffer` matches nothing. `:buffer` means: a buffer of a module; this holds for none "
            "of the 100 parameters. The buffers of a live model are listed by torchparams.of(model, buffers=True).",
        ),
        (
            "head.**:frozen",
            "`head.**` alone matches 2; `:frozen` means: requires_grad is False, buffers left out; this holds "
            "for none of",
        ),
        # regular expressions
        (
            "/weight/",
            "BertModel: `/weight/` matches nothing. A regular expression matches the whole name; 51 names "
            "contain a match. Did you mean `/.*weight.*/`?",
        ),
        ("/weight|bias/", "100 names contain a match. Did you mean `/.*(?:weight|bias).*/`?"),
        ("/(?i)WEIGHT/", "51 names contain a match. Begin and end it with .*."),
        ("/nope/", "`/nope/` matches nothing. The names start with encoder, head, embeddings, decode_head."),
    ],
)
def test_a_part_that_hits_nothing_is_named_with_what_was_meant(text: str, message: str) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize("text", ["encoder.layer.0", "bias", "attn", "encoder.*.weight", "encodr.layer.0", "/weight/"])
def test_what_was_meant_hits_something(text: str) -> None:
    meant = re.search(r"Did you mean `(.*?)`", refusal(text))
    assert meant is not None
    assert Selector(meant[1]).names(MODEL, strict=True)


@pytest.mark.parametrize(
    "text",
    [
        "**",
        "**.bias | head.**",
        "**.weight & ~head.** & ~(encoder.layer.0.** | **.norm.*)",
        "~:bias",
        "lm_head.weight",
        "encoder.** & (**.norm.** | head.** | decode_head.**)",
        "~~head.*",
    ],
)
def test_a_selector_of_which_every_part_hits_is_not_refused(text: str) -> None:
    refuse_empty(Candidates(MODEL), parse(text))


def test_a_branch_is_judged_by_the_whole_table() -> None:
    """`head.**` hits nothing below encoder, and is no mistake for that."""
    refuse_empty(Candidates(MODEL), parse("encoder.** & (**.norm.** | head.**)"))


def test_nothing_is_in_an_empty_table() -> None:
    for text in ("**", "a | b", "~a"):
        with pytest.raises(NoMatch, match=r"^empty.pt: `.*` matches nothing\. There are no parameters\.$"):
            Selector(text).names([], strict=True, where="empty.pt")


def test_a_missing_name_of_a_list_is_named() -> None:
    with pytest.raises(
        NoMatch, match=re.escape("m: No parameter is named 'head.wieght'. The nearest names are 'head.weight'")
    ):
        Selector(["head.wieght", "head.bias"]).names(MODEL, strict=True, where="m")
    with pytest.raises(
        NoMatch, match=re.escape("is named 'a.b' (and 2 others of the 4 names are missing). The names start with")
    ):
        Selector(["x", "y", "a.b", "head.bias"]).names(MODEL, strict=True)


def test_a_list_of_no_names_selects_nothing_and_not_everything() -> None:
    assert Selector([]).names(MODEL) == frozenset()
    with pytest.raises(NoMatch, match=re.escape("The list of names is empty. Use `**` to select every parameter.")):
        Selector([]).names(MODEL, strict=True)


def test_a_function_that_accepts_nothing() -> None:
    with pytest.raises(
        NoMatch, match=r"`<function .*<lambda>>` matches nothing\. The function accepts none of the 100 parameters"
    ):
        Selector(lambda info: False).names(MODEL, strict=True)


def test_a_message_about_absurd_names_is_one_short_line() -> None:
    infos = [live("a\n\x1b[31m" + "x" * 5_000 + str(n)) for n in range(9)]
    for text in ("b", "y" * 9_000, '"a\n"', "[shape=1]", "**[name=q]", "/q/", "~**"):
        with pytest.raises(NoMatch) as caught:
            Selector(text).names(infos, strict=True)
        assert len(str(caught.value)) < 1_200
        assert str(caught.value).isprintable()


def test_the_error_says_both_what_it_is() -> None:
    with pytest.raises(LookupError):
        Selector("nope").names(MODEL, strict=True)
    with pytest.raises(SelectorError):
        Selector("nope").names(MODEL, strict=True)


def test_a_big_table_is_searched_in_linear_work() -> None:
    """The way to the message compares the misspelt name with a bounded number of others."""
    compared = 0

    class Counted(str):
        __slots__ = ()

        def split(self, *args: object) -> list[str]:
            nonlocal compared
            compared += 1
            return str(self).split(".")

    infos = [stored(Counted(f"model.layers.{n}.experts.{n}_{n % 7}.w{n}.weight")) for n in range(20_000)]
    for text in ("model.layers.7.experts.weigth", "model.layer.{0..9}", "**.wieght", "modle.**"):
        compared = 0
        with pytest.raises(NoMatch, match=r"Did you mean|nearest names"):
            Selector(text).names(infos, strict=True)
        assert compared <= 3 * len(infos)


def test_a_parametrised_tensor_is_said_to_be_computed() -> None:
    infos = [stored(f"{i}.{name}") for i in (0, 1) for name in ("weight", "bias")]
    infos[0] = stored("0.parametrizations.weight.original0")
    infos.append(stored("0.parametrizations.weight.original1"))
    said = re.escape(
        "It is computed from `0.parametrizations.weight.original0` and `0.parametrizations.weight.original1`. "
        "Select `0.parametrizations.weight.*`."
    )
    for selector in (Selector("0.weight"), Selector(["0.weight"])):
        with pytest.raises(NoMatch, match=said):
            selector.names(infos, strict=True)
    old = [stored("0.weight_g"), stored("0.weight_v"), stored("1.weight")]
    with pytest.raises(NoMatch, match=r"It is computed from `0\.weight_g` and `0\.weight_v`"):
        Selector("0.weight").names(old, strict=True)


@pytest.mark.parametrize(
    ("selector", "numbers"),
    [
        ("h.{4..9}.**", "In the place of `{4..9}`, the numbers are 0 to 3."),
        ("h.7.w", "In the place of `7`, the numbers are 0 to 3."),
        ("gaps.{2..3}.*", "In the place of `{2..3}`, the numbers are 1 to 9, with gaps."),
        ("one.1.w", "In the place of `1`, the only number is 0."),
    ],
)
def test_a_number_that_no_layer_has_is_answered_with_those_of_the_layers(selector: str, numbers: str) -> None:
    names = [*(f"h.{i}.w" for i in range(4)), "gaps.1.w", "gaps.9.w", "one.0.w"]
    params = tp.of({name: np.ones(2, np.float32) for name in names})
    with pytest.raises(NoMatch, match=re.escape(f"`{selector}` matches nothing. {numbers}")):
        params.select(selector)


def test_numbers_are_not_guessed_after_any_depth() -> None:
    with pytest.raises(NoMatch, match=r"matches nothing\. The names start with h"):
        tp.of({"h.0.w": np.ones(2, np.float32)}).select("**.{3..4}.w")
