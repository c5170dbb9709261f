"""Renames: every form, errors, and suggestions."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchparams as tp
from torchparams import renames
from torchparams.errors import MismatchError, NoMatch, RenameError, UnknownName
from torchparams.info import ParameterInfo
from torchparams.proposals import best_match, propose
from torchparams.renames import Renames

NAMES = ["model.fc.weight", "model.fc.bias", "epoch"]


def infos(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, ParameterInfo]:
    return tp.of({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}).infos


def same(*names: str, shape: tuple[int, ...] = (2,)) -> Mapping[str, ParameterInfo]:
    """Reading of one shape."""
    return infos(dict.fromkeys(names, shape))


def distinct(*names: str) -> Mapping[str, ParameterInfo]:
    """Reading of a shape each."""
    return infos({name: (i + 1,) for i, name in enumerate(names)})


# --- spellings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "after"),
    [
        (None, NAMES),
        ({}, NAMES),
        ({"epoch": "steps"}, ["model.fc.weight", "model.fc.bias", "steps"]),
        ({"model.fc.weight": "model.fc.bias", "model.fc.bias": "model.fc.weight"}, [NAMES[1], NAMES[0], NAMES[2]]),
        (r"^model\.=", ["fc.weight", "fc.bias", "epoch"]),
        (r"^(?=model)=my.", ["my.model.fc.weight", "my.model.fc.bias", "epoch"]),
        ([r"^model\.=", r"^fc\.=head."], ["head.weight", "head.bias", "epoch"]),
        ([(r"^model\.(\w+)", r"\1.\1")], ["fc.fc.weight", "fc.fc.bias", "epoch"]),
        ([(r"epoch", "a=b")], ["model.fc.weight", "model.fc.bias", "a=b"]),
        (str.upper, ["MODEL.FC.WEIGHT", "MODEL.FC.BIAS", "EPOCH"]),
        ([str.upper, {"EPOCH": "e"}], ["MODEL.FC.WEIGHT", "MODEL.FC.BIAS", "e"]),
        (Renames.strip_prefix("model."), ["fc.weight", "fc.bias", "epoch"]),
        (Renames.add_prefix("x."), ["x.model.fc.weight", "x.model.fc.bias", "x.epoch"]),
        ([Renames.strip_prefix("model."), "epoch=e"], ["fc.weight", "fc.bias", "e"]),
        (Renames.of("epoch=e"), ["model.fc.weight", "model.fc.bias", "e"]),
    ],
)
def test_spellings(spec: object, after: list[str]) -> None:
    made = Renames.of(spec).apply(NAMES)
    assert list(made) == NAMES
    assert list(made.values()) == after


@pytest.mark.parametrize(
    ("spec", "text", "as_json"),
    [
        (None, "no name changes", []),
        ({"a": "b"}, "'a' → 'b'", [{"names": {"a": "b"}}]),
        ({c: c * 2 for c in "abcde"}, "'a' → 'aa', 'b' → 'bb', 'c' → 'cc' and 2 more", None),
        ("a$=b", "'a$' → 'b'", [{"pattern": "a$", "replacement": "b"}]),
        (["a=b", ("c", "d")], "'a' → 'b', 'c' → 'd'", None),
        (Renames.strip_prefix("m."), "strip 'm.'", [{"strip": "m."}]),
        (Renames.add_prefix("m."), "add 'm.'", [{"add": "m."}]),
        (str.upper, "str.upper", [{"function": "str.upper"}]),
        (functools.partial(str.replace), "partial", None),
    ],
)
def test_a_rename_says_what_it_does(spec: object, text: str, as_json: list[Any] | None) -> None:
    made = Renames.of(spec)
    assert str(made) == text
    assert repr(made) == f"<Renames: {text}>"
    written = json.loads(json.dumps(made.to_json()))
    assert written["text"] == text
    assert as_json is None or written["rules"] == as_json
    assert bool(made) == (spec is not None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            3,
            "3 is not a rename. A rename is a mapping old → new, 'regex=replacement', a pair of these, a function of a "
            "name, or a list of them.",
        ),
        (
            "model.",
            "'model.' is not a rename. As text, a rename is 'regex=replacement'. To remove it, write 'model.='.",
        ),
        ("(=b", "'(' is not a regular expression: missing ), unterminated subpattern at position 0"),
        (r"a=\1", r"'\\1' cannot replace 'a': invalid group reference 1 at position 1"),
        ([("a", r"\g<x>")], r"'\\g<x>' cannot replace 'a': unknown group name 'x'"),
        ({1: "a"}, "A mapping for renaming must map names to names, but contains 1: 'a'"),
    ],
)
def test_what_is_no_rename(spec: object, message: str) -> None:
    with pytest.raises(RenameError) as caught:
        Renames.of(spec)
    assert str(caught.value) == message


@pytest.mark.parametrize("spec", [[None], [("a", "b", "c")], [("a", 1)], [["a", "b"]], b"a=b", dict, [3]])
def test_more_that_is_no_rename(spec: object) -> None:
    with pytest.raises(RenameError, match="is not a rename"):
        Renames.of(spec)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (r"\d=", NoMatch, r"a.pt: The rename pattern '\\d' matches no name"),
        (Renames.strip_prefix("net."), NoMatch, "a.pt: No name starts with the prefix 'net.' to strip"),
        ({"epohc": "e"}, UnknownName, "a.pt: No parameter is named 'epohc'. Did you mean 'epoch'?"),
        (
            r"weight$|bias$=x",
            MismatchError,
            "a.pt: 'model.fc.weight' and 'model.fc.bias' would both be named 'model.fc.x'",
        ),
        ({"epoch": "model.fc.bias"}, MismatchError, "a.pt: 'model.fc.bias' and 'epoch' would both be named "
         "'model.fc.bias'"),
        ("^epoch$=", RenameError, "a.pt: 'epoch' would have an empty name"),
        (len, RenameError, "a.pt: A rename function returned 15 for 'model.fc.weight', which is not a name"),
    ],
)  # fmt: skip
def test_what_cannot_be_applied(spec: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Renames.of(spec).apply(NAMES, where="a.pt")
    assert str(caught.value) == message


def test_not_strict() -> None:
    spec = [r"\d=", Renames.strip_prefix("net."), {"nothing": "e"}]
    assert Renames.of(spec).apply(NAMES, strict=False) == {name: name for name in NAMES}
    assert Renames.of(spec[:2]).apply([]) == {}


@given(st.lists(st.text("ab.", min_size=1), unique=True), st.text("ab"), st.text("ab"))
@settings(max_examples=50)
def test_no_name_is_lost(names: list[str], old: str, new: str) -> None:
    try:
        made = Renames.of((old, new) and [(old, new)]).apply(names, strict=False)
    except (MismatchError, RenameError):
        after = [name.replace(old, new) for name in names]
        assert len(set(after)) < len(names) or "" in after
    else:
        assert list(made) == names
        assert list(made.values()) == [name.replace(old, new) for name in names]
        assert len(set(made.values())) == len(names)


# --- proposals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("have", "want", "text"),
    [
        (["module.a.w", "module.b"], ["a.w", "b"], "strip 'module.' from 2 of 2 names"),
        (["a.w", "b"], ["module.a.w", "module.b"], "add 'module.' to 2 of 2 names"),
        (["_orig_mod.a._orig_mod.w", "_orig_mod.b"], ["a.w", "b"], "strip '_orig_mod.' from 2 of 2 names"),
        (["module._orig_mod.a", "b"], ["a", "b"], "strip 'module._orig_mod.' from 1 of 2 names"),
        (["module._orig_mod.a._orig_mod.w", "b"], ["a.w", "b"],
         "strip '_orig_mod.' and 'module.' from 1 of 2 names"),
        (["a.module.w", "a.b"], ["a.w", "a.b"], "strip 'module.' from 1 of 2 names"),
        (["module.a", "module.b"], ["_orig_mod.a", "_orig_mod.b"],
         "strip 'module.', add '_orig_mod.' from 2 of 2 names"),
        (["model.a.w", "model.b", "epoch"], ["a.w", "b"], "strip 'model.' from 2 of 3 names"),
        (["wte.w", "h.0.w", "lm_head.w"], ["transformer.wte.w", "transformer.h.0.w", "", "lm_head.w"],
         "add 'transformer.' to 2 of 3 names"),
        (["state.model.a.w", "state.model.b"], ["a.w", "b"], "strip 'state.model.' from 2 of 2 names"),
        (["module.backbone.a", "module.backbone.b"], ["a", "b"], "strip 'module.backbone.' from 2 of 2 names"),
        (["backbone.module.a", "backbone.module.b"], ["a", "b"], "strip 'backbone.module.' from 2 of 2 names"),
        (["x._orig_mod.a", "x._orig_mod.b"], ["y.a", "z"], None),
        (["model.x", "model.model.x"], ["x", "model.x"], "strip 'model.' from 2 of 2 names"),
        (["a.w", "b"], ["a.w", "b"], None),
        (["a.w", "b"], ["c", "d.e"], None),
        ([], ["a"], None),
        (["a"], [], None),
        # Both would be w: nothing is proposed.
        (["_orig_mod.w", "w"], ["q", "r"], None),
    ],
)  # fmt: skip
def test_proposals(have: list[str], want: list[str], text: str | None) -> None:
    ours = distinct(*have)
    # The same shapes, for the names of the same place.
    made = propose(ours, infos({name: (i + 1,) for i, name in enumerate(want) if name}))
    assert (None if made is None else str(made)) == text
    if made is not None:
        made.apply(ours)


def test_shapes_decide_what_meets() -> None:
    assert propose(same("model.a", "model.b"), same("a", "b", shape=(3,))) is None
    # The head was replaced: its name meets, and its shape is for others to complain about.
    have, want = infos({"model.a": (2,), "model.head": (3,)}), infos({"a": (2,), "head": (5,)})
    made = propose(have, want)
    assert made is not None
    assert made.apply(have) == {"model.a": "a", "model.head": "head"}


def test_a_proposal_never_takes_a_name_that_is_taken() -> None:
    have = infos({"model.a": (2,), "model.b": (2,), "a": (7,)})
    made = propose(have, infos({"a": (2,), "b": (2,)}))
    assert made is not None
    assert made.apply(have) == {"model.a": "model.a", "model.b": "b", "a": "a"}


@given(st.lists(st.text("ab.", min_size=1), unique=True, max_size=8), st.sampled_from(["a.", "b.a.", "module."]))
@settings(max_examples=50)
def test_a_proposal_is_better_than_none(names: list[str], prefix: str) -> None:
    have, want = same(*(prefix + name for name in names)), same(*names)
    made = propose(have, want)
    before = sum(name in want for name in have)
    if made is None:
        assert before == len(names) or not set(want) - set(have)
    else:
        after = made.apply(have)
        assert sum(name in want for name in after.values()) > before


class Counting(Mapping[str, ParameterInfo]):
    """Counts how often a record is asked for."""

    def __init__(self, of: Mapping[str, ParameterInfo]) -> None:
        self.of, self.asked = of, 0

    def __getitem__(self, name: str) -> ParameterInfo:
        self.asked += 1
        return self.of[name]

    def __iter__(self) -> Any:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)


def test_proposals_are_linear() -> None:
    n = 500
    have = Counting(same(*(f"model.{i}.w" for i in range(n))))
    want = Counting(same(*(f"net.{i}.w" for i in range(n))))
    assert propose(have, want) is None
    assert have.asked + want.asked < 30 * n
    have.asked = want.asked = 0
    assert len(best_match(have, want)) == n
    assert have.asked + want.asked <= 2 * n


# --- the best match ------------------------------------------------------------------------------


def pairs(have: Mapping[str, ParameterInfo], want: Mapping[str, ParameterInfo]) -> dict[str, str]:
    return {match.have: match.want for match in best_match(have, want)}


def test_series_meet_in_the_order_of_their_numbers() -> None:
    have = same("h.10.w", "h.2.w", "h.9.w", shape=(3, 3))
    want = same("layers.0.w", "layers.1.w", "layers.2.w", shape=(3, 3))
    assert pairs(have, want) == {"h.10.w": "layers.2.w", "h.2.w": "layers.0.w", "h.9.w": "layers.1.w"}
    assert list(pairs(have, want)) == list(have)
    assert best_match(have, want)[0].reason == (
        "their series are the only ones left of shape [3, 3] and ending in '#.w'"
    )


def test_endings_tell_series_of_one_shape_apart() -> None:
    have = same(*(f"h.{i}.{p}.weight" for i in range(2) for p in ("q", "k", "v")))
    want = same(*(f"layers.{i}.attn.{p}.weight" for i in range(2) for p in ("v", "q", "k")))
    assert pairs(have, want)["h.1.q.weight"] == "layers.1.attn.q.weight"
    assert len(pairs(have, want)) == 6


def test_what_could_mean_two_is_not_taken() -> None:
    have = same(*(f"h.{i}.{p}.weight" for i in range(2) for p in ("query", "key")))
    want = same(*(f"h.{i}.{p}.weight" for i in range(2) for p in ("q", "k")))
    assert pairs(have, want) == {}
    # A series of another length is another thing.
    assert pairs(same("h.0.w", "h.1.w"), same("l.0.w", "l.1.w", "l.2.w")) == {}
    assert pairs(same("bn.bias"), same("bn.running_mean")) == {}
    assert pairs(same("ln.gamma"), same("ln.weight")) == {"ln.gamma": "ln.weight"}
    assert pairs(same("a", shape=(2,)), same("a", shape=(3,))) == {}


def test_names_of_other_libraries_are_never_crossed() -> None:
    norms = [f"layer.{i}.{place}.LayerNorm" for i in range(3) for place in ("attention", "output")]
    for old, new in (("gamma", "weight"), ("beta", "bias"), ("scale", "weight"), ("offset", "bias"), ("shift", "bias")):
        have, want = same(*(f"bert.{norm}.{old}" for norm in norms)), same(*(f"{norm}.{new}" for norm in norms))
        assert pairs(have, want) == {f"bert.{norm}.{old}": f"{norm}.{new}" for norm in norms}
        wrong = {"weight": "bias", "bias": "weight"}[new]
        assert pairs(have, same(*(f"{norm}.{wrong}" for norm in norms))) == {}
        assert pairs(same(f"a.{old}"), same(f"b.{wrong}")) == {}
    both = ("gamma", "beta", "moving_mean", "moving_variance"), ("weight", "bias", "running_mean", "running_var")
    have, want = (same(*(f"{norm}.{name}" for norm in norms for name in names)) for names in both)
    assert pairs(have, want) == {
        f"{norm}.{old}": f"{norm}.{new}" for norm in norms for old, new in zip(*both, strict=True)
    }
    # Where one of the two is there, the other is not taken for it.
    assert pairs(same("LayerNorm.beta"), same("LayerNorm.weight")) == {}
    assert pairs(same("LayerNorm.gamma"), same("LayerNorm.weight", "LayerNorm.bias")) == {
        "LayerNorm.gamma": "LayerNorm.weight"
    }


def test_lazy_parameters_match_nothing() -> None:
    from torch import nn

    lazy = tp.of(nn.LazyLinear(3)).infos
    assert pairs(lazy, lazy) == {}


@given(st.lists(st.text("ab0.", min_size=1), unique=True, max_size=9), st.lists(st.text("ab0."), unique=True))
@settings(max_examples=50)
def test_matches_are_one_to_one(have: list[str], want: list[str]) -> None:
    ours, theirs = same(*have), same(*want)
    found = best_match(ours, theirs)
    assert len({match.want for match in found}) == len({match.have for match in found}) == len(found)
    assert all(match.have in ours and match.want in theirs for match in found)


def test_doctests() -> None:
    import doctest

    assert doctest.testmod(renames).failed == 0


def test_base_layers_of_peft_are_found() -> None:
    base = {f"layers.{i}.{part}.weight": np.zeros((4, 4)) for i in range(2) for part in "qk"}
    tuned = {f"base_model.model.{n}".replace("q.weight", "q.base_layer.weight"): v for n, v in base.items()}
    tuned["base_model.model.layers.0.q.lora_A.default.weight"] = np.zeros((2, 4))
    a, b = tp.of(tuned).infos, tp.of(base).infos
    there = propose(a, b)
    back = propose(b, a)
    assert there is not None and back is not None
    assert set(there.apply(a).values()) >= set(base)
    assert set(back.apply(b).values()) == set(list(tuned)[:4])
    assert str(propose(a, b)) == "strip 'base_layer.', strip 'base_model.model.' from 4 of 5 names"


def test_an_averaged_model_is_the_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    differing = tp.diff(model, averaged.state_dict(), rename="auto").differing
    assert [row.name for row in differing] == ["n_averaged"]
    assert str(propose(tp.of(averaged, buffers=True).infos, tp.of(model).infos)) == "strip 'module.' from 4 of 5 names"


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("rows", [1, 3])
def test_weight_norm_under_its_older_names(rows: int) -> None:
    older = torch.nn.Sequential(*(torch.nn.utils.weight_norm(torch.nn.Linear(n, rows)) for n in (1, rows)))
    newer = torch.nn.Sequential(
        *(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(n, rows)) for n in (1, rows))
    )
    assert tp.load(newer, older.state_dict(), rename="auto").complete
    x = torch.ones(2, 1)
    assert torch.equal(newer(x), older(x))
    a, b = tp.of(older.state_dict()).infos, tp.of(newer.state_dict()).infos
    assert str(propose(a, b)) == "respell parametrizations in 4 of 6 names"
    assert str(propose(b, a)) == "respell parametrizations in 4 of 6 names"


def test_a_square_kernel_is_no_weight_by_itself() -> None:
    flax = tp.of({"d.kernel": np.zeros((4, 4)), "d.bias": np.zeros(4), "e.kernel": np.zeros((2, 4))}).infos
    ours = tp.of({"fc.weight": np.zeros((4, 4)), "fc.bias": np.zeros(4), "out.weight": np.zeros((2, 4))}).infos
    assert [(m.have, m.want) for m in best_match(flax, ours)] == [("d.bias", "fc.bias"), ("e.kernel", "out.weight")]
