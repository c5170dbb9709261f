"""Statistics of groups, and how statistics are printed."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchparams as tp
from torchparams.errors import NoMatch, SelectorError
from torchparams.measure.stats_tree import number
from torchparams.render.tree import to_text
from torchparams.testing import MemorySource, sample

if TYPE_CHECKING:
    from torchparams.measure.tensor_stats import TensorStats

Array = np.ndarray[Any, Any]


def row_of(values: Any) -> TensorStats:
    return tp.stats({"w": values})["w"]


def wide(array: Array) -> Array:
    """The values as float64."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return array.astype(np.float64).reshape(-1)


# --- groups --------------------------------------------------------------------------------------


def test_groups_by_a_word() -> None:
    weights = {
        "embed": np.ones(2, np.float32),
        "layers.0.fc.weight": np.ones(3, np.float32),
        "layers.0.norm.weight": np.ones(4, np.float16),
        "layers.1.fc.weight": np.zeros(5, np.float32),
        "head.weight": np.ones(6, np.float32),
    }

    def groups(by: str) -> list[tuple[str, int, int]]:
        return [(row.name, row.tensors, row.numel) for row in tp.stats(weights, by=by)]

    assert groups("layer") == [("(top level)", 1, 2), ("layers.0", 2, 7), ("layers.1", 1, 5), ("head", 1, 6)]
    assert groups("module") == [
        ("(top level)", 1, 2), ("layers.0.fc", 1, 3), ("layers.0.norm", 1, 4), ("layers.1.fc", 1, 5), ("head", 1, 6),
    ]  # fmt: skip
    assert groups("dtype") == [("float32", 4, 16), ("float16", 1, 4)]


def test_groups_by_selectors_and_the_rest() -> None:
    weights = {"a.weight": np.ones(2), "a.bias": np.zeros(3), "b.weight": np.ones(4), "scale": np.ones(5)}
    found = tp.stats(weights, by=["a.**", "**.weight"])
    assert found.by == ("a.**", "**.weight")
    assert [(row.name, row.tensors, row.numel) for row in found] == [
        ("a.**", 2, 5),
        ("**.weight", 2, 6),
        ("(rest)", 1, 5),
    ]
    assert [row.name for row in tp.stats(weights, by="**")] == ["**"]
    with pytest.raises(NoMatch):
        tp.stats(weights, by=["**.gamma"])
    assert [row.numel for row in tp.stats(weights, by=["**.gamma"], strict=False)] == [0, 14]
    with pytest.raises(SelectorError) as caught:
        tp.stats(weights, by=["layer", "a.**"])
    assert str(caught.value) == (
        "'layer' is a grouping word, and cannot be in a list. For a tensor of that name, write the selector /layer/."
    )


def test_a_group_of_one_type_is_exact() -> None:
    rng = np.random.default_rng(0)
    parts = {f"{i}.w": rng.standard_normal(50).astype(ml_dtypes.bfloat16) for i in range(5)}
    (group,) = tp.stats(parts, by=["**"]).rows
    whole = row_of(np.concatenate(list(parts.values())))
    for field in ("numel", "mean", "std", "min", "max", "l1", "l2", "quantiles", "histogram", "entropy", "distinct"):
        assert getattr(group, field) == getattr(whole, field), field
    assert group.exact
    assert group.dtype == "bfloat16"


_ARRAYS = st.lists(
    st.tuples(
        st.sampled_from(["float16", "float32", "float64", "int8", "int64", "bfloat16", "bool"]),
        st.integers(0, 12),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=8,
)


@given(_ARRAYS)
@settings(max_examples=30, deadline=None)
def test_a_group_says_what_its_tensors_say_together(drawn: list[tuple[str, int, int]]) -> None:
    arrays = {f"g{group}.t{i}": sample(dtype, (count,)) for i, (dtype, count, group) in enumerate(drawn)}
    found = tp.stats(arrays, by="module")
    assert sum(row.tensors for row in found) == len(arrays)
    for row in found:
        values = np.concatenate([wide(array) for name, array in arrays.items() if name.startswith(row.name + ".")])
        finite = values[np.isfinite(values)]
        assert (row.numel, row.zeros) == (len(values), int(np.count_nonzero(values == 0)))
        assert (row.nan, row.posinf) == (int(np.isnan(values).sum()), int((values == math.inf).sum()))
        with np.errstate(over="ignore"):
            assert row.l1 == pytest.approx(abs(finite).sum(), rel=1e-12)
        assert sum(row.histogram) == len(finite)


def test_memory_is_that_of_groups_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.measure import grouping

    monkeypatch.setattr(grouping, "PENDING_CODES", 100)
    most = 0
    add_up = grouping.GroupSums._add_up

    def watched(self: Any) -> None:
        nonlocal most
        most = max(most, self._pending)
        add_up(self)
        assert max(map(len, self._parts.values())) <= 1

    monkeypatch.setattr(grouping.GroupSums, "_add_up", watched)
    arrays = {f"{i}.w": np.arange(i, i + 20, dtype=np.int16) % 60 for i in range(200)}
    (row,) = tp.stats(arrays, by=["**"]).rows
    assert row.numel == 4000
    assert 100 < most <= 160


def test_a_complete_group_is_let_go() -> None:
    from torchparams.measure.grouping import GroupSums
    from torchparams.measure.tensor_stats import derive
    from torchparams.sketch import Sketch

    source = MemorySource({"a.w": np.ones(2), "b.w": np.ones(3)})
    sums = GroupSums(
        {"a": ["a.w"], "b": ["b.w"]},
        source.infos(),
        lambda sketch, name, infos: derive(sketch, [], name=name, numel=len(infos)),
    )
    sums.add("b.w", Sketch.of(np.ones(3)))
    assert sums._parts == {"a": [], "b": []}
    assert [row.name for row in sums.rows] == ["b"]


# --- what is shown -------------------------------------------------------------------------------


def test_the_table() -> None:
    found = tp.stats(
        {
            "fc.weight": np.arange(-8, 8, dtype=np.float32).reshape(4, 4) / 8,
            "fc.bias": np.array([1e-9, 2e5, -3, 1e5], np.float32),
            "fc.mask": np.array([0, -np.inf], np.float16),
            "fc.count": np.array(7),
        }
    )
    assert str(found) == (
        "dict (mapping)\n"
        "name          mean     std   min    max  zeros  NaN/Inf  histogram\n"
        "fc.weight  -0.0625   0.595    -1  0.875   6.2%           █▄▄█▄▄▄▄█▄▄█\n"
        "fc.bias      7.5e4  9.57e4    -3    2e5                  █     ▄    ▄\n"
        "fc.mask          0       –  -inf      0    50%        1        █\n"
        "fc.count         7       –     7      7                        █\n"
        "4 tensors · 23 parameters · 92 B"
    )


def test_the_table_fits_a_terminal() -> None:
    names = {f"model.layers.{i}.self_attn.rotary.q_proj.weight": sample("float32", (5, 5)) for i in range(3)}
    lines = to_text(tp.stats(names).tree(), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[5] == "not shown in 80 columns: mean, histogram"


def test_a_long_table_leaves_out_the_middle() -> None:
    weights = {f"w{i}": np.full(2, i, np.float32) for i in range(100)}
    lines = str(tp.stats(weights, limit=4)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["w0", "w1", "…", "w98", "w99", "100"]
    assert lines[4] == "… 96 more rows …"
    assert len(str(tp.stats(weights)).splitlines()) == 44
    assert len(str(tp.stats(weights, limit=None)).splitlines()) == 103


def test_every_column() -> None:
    head = str(tp.stats({"w": np.ones((2, 2), np.float32)}, wide=True)).splitlines()[1].split()
    assert head == [
        "name", "shape", "dtype", "numel", "mean", "std", "min", "max", "1%", "25%", "50%", "75%", "99%", "zeros",
        "NaN", "+Inf", "-Inf", "L1", "L2", "L∞", "bits", "distinct", "histogram",
    ]  # fmt: skip


def test_lower_bounds_are_told_as_such() -> None:
    values = np.linspace(1, 1.001, 500)
    weights = {
        "wide": values.astype(np.float32),
        "narrow": values.astype(np.float16),
        "one": np.full(5, 0.1),
        "none": np.zeros(0),
    }
    lines = str(tp.stats(weights, wide=True)).splitlines()[2:6]
    assert [re.findall(r"≥ [0-9.]+", line) for line in lines] == [["≥ 0.00", "≥ 1"], [], [], []]


def test_a_name_cannot_drive_the_terminal() -> None:
    found = tp.stats({"a\x1b[31m\n": np.array([[np.nan, 1]]), "b\x1b": torch.empty(2, device="meta")})
    assert "\x1b" not in str(found)
    assert "<b" not in found._repr_html_()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.0, "0"), (1, "1"), (-12345, "-12345"), (1234567, "1.23e6"), (0.5, "0.5"), (0.02, "0.02"),
        (0.0213456, "0.0213"), (-0.00123456, "-0.00123"), (-0.000123456, "-1.23e-4"), (1e-10, "1e-10"),
        (1234.5, "1234"), (9999.5, "1e4"), (66_666.0, "6.67e4"), (1e300, "1e300"),
        (math.nan, "–"), (math.inf, "inf"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_json_is_stable() -> None:
    form = tp.stats({"w": np.array([[1.0, np.nan]], np.float16)}, by="module").to_json()
    assert list(form) == [
        *("source", "format", "selector", "by", "total", "rows", "flags", "unread", "left_out", "lost"),
    ]
    assert form["by"] == ["module"]
    assert form["total"] == {"tensors": 1, "numel": 2, "nbytes": 4}
    assert list(form["rows"][0]) == [
        "name", "tensors", "shape", "dtype", "numel", "values", "zeros", "nan", "posinf", "neginf", "min", "max",
        "mean", "std", "l1", "l2", "linf", "quantiles", "histogram", "entropy", "distinct", "saturated", "exact",
    ]  # fmt: skip
    assert form["rows"][0]["std"] == "nan"
    assert form["flags"] == [{"name": "w", "kind": "non-finite", "reason": "1 NaN among 2 values"}]
    json.dumps(form, allow_nan=False)


def test_rows_are_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.measure.tensor_stats import derive

    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return derive(*args, **options)

    monkeypatch.setattr("torchparams.measure.stats.derive", counted)
    str(tp.stats({f"{i}.w": np.ones(2) for i in range(50)}, by="layer"))
    assert calls == 100  # a row for each tensor, for the flags; and one for each group
