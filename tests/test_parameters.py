from __future__ import annotations

import copy
import html.parser
import importlib
import re
import threading
from collections.abc import ItemsView, Mapping, MutableMapping, ValuesView
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchparams as tp
from torchparams.dtypes import DType
from torchparams.errors import NoMatch, ReadOnlyTable, SelectorError, UnknownName, UnsupportedSource
from torchparams.info import ParameterInfo
from torchparams.reading import Reading
from torchparams.render import rows as table_module
from torchparams.render.rows import ALIASES_SHOWN, ROWS_SHOWN, sort_infos, total_of
from torchparams.render.tree import Row
from torchparams.sources.base import Source
from torchparams.sources.live.tensors import LiveReading
from torchparams.testing import MemorySource
from torchparams.train.penalty import Penalty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    Array = np.ndarray[Any, Any]


def arrays() -> dict[str, Array]:
    return {
        "encoder.0.weight": np.ones((4, 3), np.float32),
        "encoder.0.bias": np.zeros(4, np.float32),
        "encoder.1.weight": np.ones((4, 4), np.float16),
        "head.weight": np.ones((2, 4), np.float32),
        "head.bias": np.zeros(2, np.float32),
    }


def net() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture(params=["memory", "module"])
def params(request: pytest.FixtureRequest) -> tp.Parameters:
    return tp.of(MemorySource(arrays()) if request.param == "memory" else net())


class Unreadable(MemorySource):
    """Fails when a value is asked for."""

    def numpy(self, name: str) -> Array:
        raise AssertionError(f"{name} was read")

    tensor = value = numpy  # type: ignore[assignment]  # none of them may be called


# --- a mapping --------------------------------------------------------------------------------


def test_it_is_a_mapping(params: tp.Parameters) -> None:
    assert isinstance(params, Mapping)
    names = list(params)
    assert names == params.names == list(params.keys()) == [name for name, _ in params.items()]
    assert len(params) == len(params.items()) == len(params.values()) == len(names)
    assert list(params.keys() & {names[0], "zzz"}) == [names[0]]
    assert params.get("zzz") is None
    assert params.get("zzz", 7) == 7
    assert bool(params)
    assert not tp.of(nn.ReLU())
    for name, value in params.items():
        assert torch.equal(params[name], value)
    assert [v.shape for v in params.values()] == [params.info(name).shape for name in params]
    assert dict(params).keys() == params.keys()
    assert isinstance(params.items(), ItemsView)
    assert isinstance(params.values(), ValuesView)
    assert list(reversed(list(params))) == names[::-1]


def test_values_are_the_live_tensors_themselves() -> None:
    model = net()
    params = tp.of(model)
    assert all(params[name] is p for name, p in model.named_parameters())
    assert all(value is p for value, p in zip(params.values(), model.parameters(), strict=True))
    assert model[0].weight in params.values()
    assert model[0].weight.detach() not in params.values()
    assert params.items() >= {("0.weight", model[0].weight)}


def test_membership_of_anything(params: tp.Parameters) -> None:
    for thing in (None, 3, ("0", "weight"), b"0.weight", torch.zeros(2), object(), "", "zzz"):
        assert thing not in params
        assert thing not in params.select("**")


def test_an_unknown_name(params: tp.Parameters) -> None:
    wrong = params.names[0].replace("weight", "wieght")
    for read in (params.__getitem__, params.info, params.numpy):
        with pytest.raises(UnknownName) as caught:
            read(wrong)
        assert str(caught.value).startswith(
            f"{params.source.label}: No parameter is named {wrong!r}. Did you mean {params.names[0]!r}"
        )
        assert isinstance(caught.value, KeyError)
    with pytest.raises(TypeError, match=r"^a parameter name must be a str, not int: 0$"):
        params[0]  # type: ignore[index]  # this is what is tested
    with pytest.raises(TypeError, match=r"^a parameter name must be a str, not Tensor: "):
        params.info(torch.zeros(1))  # type: ignore[arg-type]  # likewise


def test_numbers(params: tp.Parameters) -> None:
    assert params.numel == sum(info.numel for info in params.infos.values())
    assert params.nbytes == sum(info.nbytes for info in params.infos.values())
    assert tp.of(MemorySource(arrays())).nbytes == 4 * 4 * 3 + 4 * 4 + 2 * 16 + 4 * 8 + 4 * 2


def test_assignment(params: tp.Parameters) -> None:
    for use in (params.__setitem__, lambda name, _: params.__delitem__(name)):
        with pytest.raises(ReadOnlyTable):
            use("head.bias", np.zeros(2))
    with pytest.raises(AttributeError):
        params.anything = 1  # type: ignore[attr-defined]  # this is what is tested
    assert not isinstance(params, MutableMapping)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        (MemorySource(arrays()), "Change the underlying mapping"),
        (
            net(),
            "To change values: with torch.no_grad(): model.head.bias.copy_(…); to replace the parameter: "
            "model.head.bias = torch.nn.Parameter(…)",
        ),
    ],
)
def test_assignment_says_what_to_do(source: object, hint: str) -> None:
    params: Any = tp.of(source)
    with pytest.raises(TypeError) as caught:
        params["head.bias"] = 0
    label = params.source.label
    assert str(caught.value) == f"{label}: 'head.bias' cannot be set through a table of parameters. {hint}."


def test_assignment_to_a_file(tmp_path: Any) -> None:
    from safetensors.numpy import save_file

    path = str(tmp_path / "a.safetensors")
    save_file(arrays(), path)
    params: Any = tp.of(path)
    with pytest.raises(TypeError) as caught:
        params["head.bias"] = 0
    assert str(caught.value) == (
        f"{path}: 'head.bias' cannot be set through a table of parameters. Write a new file with torchparams.convert."
    )


# --- never stale ------------------------------------------------------------------------------


def test_a_live_table_is_never_stale() -> None:
    model = net()
    params = tp.of(model)
    weights = params.select("**.weight")
    rest = params - weights
    union = weights | rest
    model.append(nn.Linear(2, 2))
    assert params.names[-2:] == ["3.weight", "3.bias"]
    assert weights.names == ["0.weight", "1.weight", "2.weight", "3.weight"]
    assert rest.names == ["0.bias", "1.bias", "2.bias", "3.bias"]
    assert union.names == params.names
    del model[1]
    assert weights.names == ["0.weight", "1.weight", "2.weight"]
    model[0] = nn.Conv1d(3, 4, 5)
    assert weights["0.weight"] is model[0].weight
    assert weights.info("0.weight").shape == (4, 3, 5)
    assert weights.info("0.weight").module == "torch.nn.modules.conv.Conv1d"
    model[0].bias = None
    assert "0.bias" not in rest
    assert "0.bias" not in params
    assert len(params) == 5
    assert "[4, 3, 5]" in repr(params)


def test_flags_and_types_are_never_stale() -> None:
    model = net()
    trainable = tp.of(model).select(":trainable")
    half = tp.of(model).select("[dtype=bf16]", strict=False)
    tied = tp.of(model).select(":tied", strict=False)
    assert len(trainable) == 6
    assert len(half) == len(tied) == 0
    model[0].requires_grad_(False)
    assert trainable.names == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert "0.weight" not in trainable
    model[2].bfloat16()
    assert half.names == ["2.weight", "2.bias"]
    assert list(half()) == list(model[2].parameters())
    model.append(model[1])
    assert tied.names == ["1.weight", "1.bias"]
    assert "3.weight" in tied
    assert tied["3.weight"] is model[1].weight
    assert tied.info("3.weight").name == "1.weight"


def test_a_view_is_never_stale() -> None:
    model = net()
    params = tp.of(model)
    names, items, values = params.keys(), params.items(), params.values()
    model.append(nn.Linear(2, 2))
    assert len(names) == len(items) == len(values) == 8
    assert list(names) == [name for name, _ in items] == params.names
    assert sum(value.numel() for value in values) == params.numel


def test_a_listing_is_of_its_time() -> None:
    model = net()
    infos = tp.of(model).infos
    model[0].requires_grad_(False)
    assert infos["0.weight"].requires_grad
    assert not tp.of(model).infos["0.weight"].requires_grad


def test_a_selection_is_not_chosen_anew_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tp.of(MemorySource(arrays())).select("**.weight")
    chosen: list[int] = []
    names = tp.Selector.names

    def counted(self: tp.Selector, *args: Any, **kwargs: Any) -> Any:
        chosen.append(1)
        return names(self, *args, **kwargs)

    monkeypatch.setattr(tp.Selector, "names", counted)
    for name in params:
        assert name in params
        params[name]
    repr(params)
    assert len(chosen) == 1


# --- selections -------------------------------------------------------------------------------


def test_selecting(params: tp.Parameters) -> None:
    weights = params.select("**.weight")
    assert weights.names == [name for name in params if name.endswith("weight")]
    assert weights.source is params.source
    assert weights.selector == tp.Selector("**.weight")
    assert params.selector is None
    assert weights.numel < params.numel
    first = weights.names[0]
    assert weights.select(first).names == [first]
    assert weights.select([first]).names == [first]
    assert weights.filter(lambda info: info.name == first).names == [first]
    assert weights.filter(lambda info: False).names == []
    assert list(weights()) is not None
    assert [name for name, _ in weights.items()] == [name for name, _ in weights.named_parameters()] == weights.names
    assert [v.shape for v in weights.values()] == [v.shape for v in weights()]


def test_a_selection_holds_no_more_than_it_says(params: tp.Parameters) -> None:
    weights = params.select("**.weight")
    bias = next(name for name in params if name.endswith("bias"))
    assert bias not in weights
    for read in (weights.__getitem__, weights.info, weights.numpy):
        with pytest.raises(UnknownName) as caught:
            read(bias)
        assert (
            str(caught.value) == f"{params.source.label}: {bias!r} is not in this selection. The selector is **.weight."
        )
    with pytest.raises(NoMatch):
        weights.select("**.bias")
    assert weights.select("**.bias", strict=False).names == []


def test_strictness(params: tp.Parameters) -> None:
    with pytest.raises(NoMatch, match="wieght"):
        params.select("**.weight | **.wieght")
    assert len(params.select("**.weight | **.wieght", strict=False)) == len(params.select("**.weight"))


def test_explaining(params: tp.Parameters) -> None:
    text = str(params.explain("**.bias | **.weight"))
    assert "**.bias" in text
    weights = params.select("**.weight")
    assert "nothing" in str(weights.explain("**.bias"))


def test_errors_of_selectors_say_of_which_source() -> None:
    params = tp.of(MemorySource(arrays()))
    label = re.escape(params.source.label)
    with pytest.raises(SelectorError, match=f"^{label}: `:trainable` cannot be evaluated"):
        params.explain(":trainable")
    with pytest.raises(SelectorError, match=f"^{label}: `:trainable` cannot be evaluated"):
        _ = params.select(":trainable", strict=False).names


def test_the_order_is_the_sources() -> None:
    params = tp.of(MemorySource(arrays()))
    backwards = params.select("head.* | encoder.**")
    assert backwards.names == params.names
    assert (params.select("head.*") | params.select("encoder.0.*")).names == [
        "encoder.0.weight", "encoder.0.bias", "head.weight", "head.bias",
    ]  # fmt: skip


SELECTORS = ["**", "**.weight", "**.bias", "encoder.**", "head.*", "[ndim=2]", "[dtype=float16]", "nothing"]


@given(st.lists(st.sampled_from(SELECTORS), min_size=3, max_size=3))
def test_sets_of_names_combine_as_sets_do(texts: list[str]) -> None:
    params = tp.of(MemorySource(arrays()))
    everything = set(params)
    a, b, c = (params.select(text, strict=False) for text in texts)
    for ours, theirs in (
        (a | b, set(a) | set(b)),
        (a & b, set(a) & set(b)),
        (a - b, set(a) - set(b)),
        (~a, everything - set(a)),
        (a | b & c, set(a) | set(b) & set(c)),
        ((a | b) - c, (set(a) | set(b)) - set(c)),
        (~(a | b), everything - set(a) - set(b)),
        (params - a, everything - set(a)),
        (params & a, set(a)),
        (params | a, everything),
    ):
        assert set(ours) == theirs
        assert ours.names == [name for name in params if name in theirs]
        assert len(ours) == len(theirs)


def test_two_sources_do_not_combine() -> None:
    one, two = tp.of(MemorySource(arrays(), label="one")), tp.of(MemorySource(arrays(), label="two"))
    combinations: list[Callable[[], tp.Parameters]] = [lambda: one | two, lambda: one & two, lambda: one - two]
    for combine in combinations:
        with pytest.raises(SelectorError) as caught:
            combine()
        assert str(caught.value) == (
            "one and two: The selections belong to different sources. Combine selections of the same table, or "
            "compare sources with torchparams.diff."
        )
    others: list[Any] = [3, None, "**", {"a": 1}, ["head.bias"]]
    for other in others:
        with pytest.raises(TypeError, match="unsupported operand"):
            one | other
        with pytest.raises(TypeError, match="unsupported operand"):
            one - other


def test_tables_of_one_model_combine_whenever_they_were_made() -> None:
    model = net()
    assert (tp.of(model).select("0.*") | tp.of(model).select("2.*")).names == [
        "0.weight", "0.bias", "2.weight", "2.bias",
    ]  # fmt: skip
    with pytest.raises(SelectorError, match="different sources"):
        tp.of(model) | tp.of(model, buffers=True)
    with pytest.raises(SelectorError, match="different sources"):
        tp.of(model) | tp.of(net())


def test_equality_and_hash() -> None:
    model = net()
    params = tp.of(model)
    assert params == tp.of(model)
    assert hash(params) == hash(tp.of(model))
    assert params.select("**.bias") == tp.of(model).select("**.bias")
    assert hash(params.select("**.bias")) == hash(tp.of(model).select("**.bias"))
    assert params != params.select("**.bias")
    assert params.select("**.bias") != params.select("**.weight")
    assert params != tp.of(net())  # equal values are another question, which diff answers
    assert params != dict(params)
    assert len({params, tp.of(model), params.select("**.bias")}) == 2
    source = MemorySource(arrays())
    assert tp.of(source) == tp.of(source) != tp.of(MemorySource(arrays()))


# --- PyTorch's methods ------------------------------------------------------------------------


def test_calling_a_selection() -> None:
    model = net()
    biases = tp.of(model).select("**.bias")
    assert list(map(id, biases())) == [id(model[0].bias), id(model[1].bias), id(model[2].bias)]
    assert list(tp.of(model).select("0.*")(recurse=False)) == []
    assert [name for name, _ in biases.named_parameters(prefix="m")] == ["m.0.bias", "m.1.bias", "m.2.bias"]
    assert list(tp.of(model[0]).select("bias")(recurse=False)) == [model[0].bias]
    optimizer = torch.optim.SGD(biases(), lr=1.0)
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_aliases_on_request() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Sequential(layer))
    params = tp.of(model)
    assert [name for name, _ in params.named_parameters()] == ["0.weight", "0.bias"]
    assert [name for name, _ in params.select("0.bias").named_parameters(remove_duplicate=False)] == [
        "0.bias",
        "1.0.bias",
    ]
    by_alias = params.select("1.0.bias")
    assert by_alias.names == ["0.bias"]
    assert by_alias["1.0.bias"] is layer.bias


def test_the_iterator_is_lazy() -> None:
    source = MemorySource(arrays())
    read: list[str] = []
    source.value = lambda name: read.append(name) or name  # type: ignore[method-assign,func-returns-value]  # counts
    params = tp.of(source)
    assert next(params()) == params.names[0]
    assert read == params.names[:1]
    assert next(iter(params.items()))[0] == params.names[0]
    assert next(iter(params.select("head.*").values())) == "head.weight"
    assert read == [*params.names[:1] * 2, "head.weight"]


# --- print ------------------------------------------------------------------------------------


def test_columns() -> None:
    assert str(tp.of(MemorySource(arrays()))).splitlines() == [
        "memory (memory)",
        "name              shape   dtype    numel  size",
        "encoder.0.weight  [4, 3]  float32     12  48 B",
        "encoder.0.bias    [4]     float32      4  16 B",
        "encoder.1.weight  [4, 4]  float16     16  32 B",
        "head.weight       [2, 4]  float32      8  32 B",
        "head.bias         [2]     float32      2   8 B",
        "5 tensors · 42 parameters · 136 B",
    ]
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    assert str(tp.of(model)).splitlines() == [
        "Sequential (module)",
        "name                 shape   dtype    numel  size  trainable  module",
        "0.weight = 1.weight  [4, 3]  float32     12  48 B  yes        Linear",
        "0.bias               [4]     float32      4  16 B  no         Linear",
        "1.bias               [4]     float32      4  16 B  yes        Linear",
        "3 tensors · 20 parameters · 80 B · 80.0% trainable · 1 tied name",
    ]
    assert str(tp.of(nn.ReLU())).splitlines()[-1] == "0 tensors · 0 parameters · 0 B"


def test_a_long_table_is_cut_in_the_middle() -> None:
    names = [f"layer.{i}" for i in range(1234)]
    params = tp.of(MemorySource({name: np.zeros(i % 3, np.float32) for i, name in enumerate(names)}))
    lines = str(params).splitlines()
    rows = [line.split()[0] for line in lines[2:-1]]
    half = ROWS_SHOWN // 2
    assert rows == [*names[:half], "…", *names[-half:]]
    assert lines[2 + half] == "… 1,194 more parameters …"
    assert lines[-1] == "1,234 tensors · 1.23 K parameters · 4.82 KiB"
    assert len(str(params.tree(limit=None)).splitlines()) == 1234 + 3
    assert str(params.tree(limit=3)).splitlines()[2:6] == [
        "layer.0     [0]    float32      0   0 B",
        "layer.1     [1]    float32      1   4 B",
        "… 1,231 more parameters …",
        "layer.1233  [0]    float32      0   0 B",
    ]
    exactly = tp.of(MemorySource({name: np.zeros(1) for name in names[:ROWS_SHOWN]}))
    assert "…" not in str(exactly)


@pytest.mark.parametrize("kind", ["module", "file"])
def test_a_misspelt_alias(kind: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "lm_head": nn.Linear(2, 3, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    torch.save(model.state_dict(), tmp_path / "m.pt")
    params = tp.of(model if kind == "module" else tmp_path / "m.pt")
    with pytest.raises(UnknownName, match=r"No parameter is named 'lm_head\.wieght'\. Did you mean 'lm_head\.weight'"):
        params["lm_head.wieght"]
    with pytest.raises(UnknownName, match=r"It is a module with 1 parameters\. The selector `lm_head\.\*\*`"):
        params.info("lm_head")
    with pytest.raises(NoMatch, match=r"No name has the component 'wieght'\. Did you mean `lm_head\.weight`"):
        params.select("lm_head.wieght")
    with pytest.raises(NoMatch, match=r"The nearest names are 'lm_head\.weight'"):
        params.select(["lm_head.wieght"])


def test_many_aliases_are_cut() -> None:
    layer = nn.Linear(1, 1, bias=False)
    model = nn.Sequential(*[layer] * 20)
    line = str(tp.of(model)).splitlines()[2]
    assert line.startswith("0.weight = 1.weight, 2.weight, 3.weight, … 16 more ")
    assert ALIASES_SHOWN == 3
    assert len(tp.of(model).info("0.weight").aliases) == 19


def test_sorting() -> None:
    params = tp.of(MemorySource(arrays()))
    infos = list(params.infos.values())
    assert [info.numel for info in sort_infos(infos, "numel")] == [2, 4, 8, 12, 16]
    assert [info.numel for info in sort_infos(infos, "-numel")] == [16, 12, 8, 4, 2]
    assert sort_infos(infos, None) == infos
    first = str(params.tree(sort="-numel")).splitlines()[2]
    assert first.startswith("encoder.1.weight")
    with pytest.raises(SelectorError) as caught:
        params.tree(sort="colour")
    assert str(caught.value) == (
        "No column 'colour' to sort by. Columns are name, numel, nbytes, size, dtype, shape, module, stored."
    )
    for key in ("name", "nbytes", "dtype", "shape", "module", "-name"):
        assert len(sort_infos(infos, key)) == 5


def test_totals() -> None:
    def info(**changes: Any) -> ParameterInfo:
        row: dict[str, Any] = {"requires_grad": None} | changes
        return ParameterInfo("a", (1,), DType.of("float32"), row.pop("numel"), 4, "cpu", "tensor", **row)

    assert total_of([info(numel=1)]) == "1 tensor · 1 parameter · 4 B"
    assert total_of([info(numel=7_241_000_000)]).split(" · ")[1] == "7.24 B parameters"
    assert total_of([info(numel=1, requires_grad=True), info(numel=3, requires_grad=False)]).endswith("25.0% trainable")
    assert total_of([info(numel=0, requires_grad=True)]).endswith("nothing trainable")
    assert total_of([info(numel=1, requires_grad=True), info(numel=3)]).endswith("100.0% trainable")
    assert total_of([info(numel=1, aliases=("b", "c"))]).endswith("2 tied names")


def test_printing_reads_no_value() -> None:
    params = tp.of(Unreadable(arrays()))
    assert "5 tensors" in repr(params)
    assert "5 tensors" in params._repr_html_()
    assert params.numel == 42
    assert "head.bias" in params
    assert len(params.select("**.weight")) == 3
    assert params.explain("**.weight") is not None


class Broken(Source):
    """A source that fails at everything but its name."""

    label, format, live = "broken", "memory", True

    def infos(self) -> Mapping[str, ParameterInfo]:
        raise RuntimeError("the disk <is> gone")

    def numpy(self, name: str) -> Array:
        raise RuntimeError("the disk <is> gone")


def test_a_repr_never_raises() -> None:
    params = tp.of(Broken())
    assert repr(params) == "<Parameters of broken: RuntimeError: the disk <is> gone>"
    assert params._repr_html_() == "<p>&lt;Parameters of broken: RuntimeError: the disk &lt;is&gt; gone&gt;</p>"
    assert repr(params.select("**", strict=False)) == repr(params)
    with pytest.raises(RuntimeError):
        len(params)
    # a selection that has come to ask what is not recorded
    assert repr(tp.of(MemorySource(arrays())).select(":trainable", strict=False)).startswith("<Parameters of memory: ")


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_escapes_names() -> None:
    name = '<script>alert("1")</script>&amp;\x1b[31m'
    shown = tp.of(MemorySource({name: np.zeros(2), "b": np.zeros(1)}, label="<b>file</b>"))._repr_html_()
    tags = Tags()
    tags.feed(shown)
    assert set(tags.seen) == {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert '<script>alert("1")</script>&amp;\\x1b[31m' in tags.text
    assert "<b>file</b> (memory)" in tags.text
    assert "\x1b" not in shown


def test_html_of_a_long_table() -> None:
    params = tp.of(MemorySource({f"layer.{i}": np.zeros(1) for i in range(500)}))
    tags = Tags()
    tags.feed(params._repr_html_())
    assert tags.seen.count("tr") == ROWS_SHOWN + 2
    assert "… 460 more parameters …" in tags.text


def test_names_cannot_drive_the_terminal() -> None:
    text = str(tp.of(MemorySource({"a\nb\x1b[2J\r": np.zeros(1)}, label="x\ny\x1b[2J")))
    assert "a\\nb\\x1b[2J\\r" in text
    assert text.startswith("x\\ny\\x1b[2J (memory)\n")
    assert not set(text) & {"\x1b", "\r"}


# --- costs, counted ---------------------------------------------------------------------------


class Many(MemorySource):
    """Tens of thousands of records of one array, and a count of the rows that are made of them."""

    def __init__(self, count: int) -> None:
        super().__init__({"a": np.zeros(3, np.float32)})
        one = self.infos()["a"]
        made = {f"layer.{i}.weight": ParameterInfo(f"layer.{i}.weight", *_fields(one)) for i in range(count)}
        self._infos = made  # type: ignore[assignment]  # only read from here on


def _fields(info: ParameterInfo) -> Iterator[Any]:
    return (getattr(info, name) for name in ("shape", "dtype", "numel", "nbytes", "device", "kind"))


@pytest.mark.parametrize("show", [repr, lambda params: params._repr_html_()])
def test_printing_makes_only_the_rows_that_it_shows(
    show: Callable[[tp.Parameters], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tp.of(Many(100_000))
    rows: list[int] = []
    make = Row

    def counted(*args: Any, **kwargs: Any) -> Any:
        rows.append(1)
        return make(*args, **kwargs)

    monkeypatch.setattr(table_module, "Row", counted)
    assert "100,000 tensors" in show(params)
    assert len(rows) == ROWS_SHOWN


class Once(MemorySource):
    """Counts how often it is listed and read."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        super().__init__(tensors)
        self.listed = 0
        self.read: list[str] = []

    def infos(self) -> Mapping[str, ParameterInfo]:
        self.listed += 1
        return super().infos()

    def numpy(self, name: str) -> Array:
        self.read.append(name)
        return super().numpy(name)

    def value(self, name: str) -> Array:
        return self.numpy(name)


def list_items(params: tp.Parameters) -> list[tuple[str, Any]]:
    return list(params.items())


def list_values(params: tp.Parameters) -> list[Any]:
    return list(params.values())


def test_a_loop_lists_once_and_reads_each_once() -> None:
    source = Once(arrays())
    for params in (tp.of(source), tp.of(source).select("head.*")):
        for use in (list_items, list_values):
            source.listed, source.read = 0, []
            use(params)
            assert source.read == params.names
    live = Once({f"layer.{i}": np.zeros(1) for i in range(200)})
    live.live = True
    chosen = tp.of(live).select("layer.1*")
    uses: list[Callable[[tp.Parameters], Any]] = [list_items, list_values, lambda p: list(p()), len, repr]
    for look in uses:
        live.listed = 0
        look(chosen)
        assert live.listed <= 4


class Listing(Once):
    """A live source that is listed by `items` too."""

    live = True

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        given = {name: self.value(name) for name in (self.keys() if names is None else names)}
        return iter(given.items())


def test_a_live_source_is_listed_once_for_a_view() -> None:
    # list() asks for the length too: of a view that is the length of its reading, of a table that of now
    source = Listing(arrays())
    params = tp.of(source)
    uses: list[Callable[[tp.Parameters], Any]] = [list_items, list_values, lambda p: list(p.keys()), list, sorted]
    for look in uses:
        source.listed = 0
        assert len(look(params)) == 5
        assert source.listed == (2 if look in (list, sorted) else 1)


class Visited(nn.Sequential):
    """Counts how often a module of this class is looked into."""

    visits = 0

    def __getattribute__(self, key: str) -> Any:
        if key == "_modules":
            Visited.visits += 1
        return super().__getattribute__(key)


def visited(count: int) -> Visited:
    return Visited(*(Visited(nn.Linear(1, 1)) for _ in range(count)))


def visits_of(use: Callable[[], object]) -> int:
    Visited.visits = 0
    use()
    return Visited.visits


LOOKS: list[Callable[[tp.Parameters, str], object]] = [
    lambda params, name: params[name],
    lambda params, name: params.numpy(name),
    lambda params, name: name in params,
]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    "selector",
    [None, "**.weight", "/.*weight/", "*.0.*", ":trainable", "**.weight:trainable[ndim=2][dtype=float32]", nn.Linear,
     "[name=*.0.weight] & :matrix", ["3.0.bias", "5.0.weight"], "*.0.weight | [numel<2]", "~:frozen"],
)  # fmt: skip
def test_one_name_is_found_by_walking_to_its_module(look: Callable[..., object], selector: object) -> None:
    importlib.import_module("torch.distributed.fsdp.fully_sharded_data_parallel")  # its modules are looked for

    model = visited(60)
    params = tp.of(model) if selector is None else tp.of(model).select(selector, strict=False)
    last = params.names[-1]
    assert visits_of(lambda: look(params, last)) <= 20
    assert visits_of(lambda: [look(params, name) for name in params]) <= 20 * (len(params) + 30)


@pytest.mark.parametrize("selector", ["~0.**", ":tied | **.weight:tied", ":bias", "[module=Linear] & ~3.**"])
def test_a_snapshot_is_the_linear_way_of_every_selection(selector: str) -> None:
    model = visited(60)
    chosen = tp.of(model).select(selector, strict=False)

    def loop() -> None:
        snapshot = chosen.snapshot()
        for name in snapshot:
            assert snapshot[name] is not None
            assert snapshot.info(name).name == name
            assert name in snapshot

    assert visits_of(loop) <= 20 * 60
    assert visits_of(lambda: [tensor.shape for _, tensor in chosen.items()]) <= 5 * 60


def tied_net() -> Any:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3), "norm": nn.LayerNorm(2)})
    model["head"].weight = model["embed"].weight
    model["again"] = nn.ModuleDict({"inner": model["norm"], "bias_of": nn.Linear(2, 2, bias=False)})
    model["again"].register_parameter("bias", model["again"]["bias_of"].weight)
    model["shift"] = nn.BatchNorm1d(2)
    model["shift"].register_buffer("held", model["head"].bias)
    model["head"].bias.requires_grad_(False)
    return model


ATOMS = [
    "**.weight", "**.bias", "head.*", "again.**", "embed.weight", "/h.*/", "module.**", "*.*.weight",
    ":tied", ":bias", ":norm", ":embedding", ":trainable", ":frozen", ":buffer", ":matrix", "[ndim=1]",
    "[module=Linear]",     "[module!=Linear]", "[name!=head.*]", "[name=**.inner.*]", "[kind=buffer]",
    "[shape=3x2]", "[dtype!=float32]",
    "**.weight[ndim=2]", "head.*:frozen",
]  # fmt: skip


@given(
    st.recursive(
        st.sampled_from(ATOMS).map(tp.Selector),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
            st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
            inner.map(lambda one: ~one),
        ),
        max_leaves=4,
    ),
    st.sampled_from(["module", "buffers", "wrapped", "mapping", "gradients"]),
)
def test_a_name_alone_says_what_all_names_say(selector: tp.Selector, kind: str) -> None:
    model = tied_net()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if kind == "mapping":
        table = tp.of({**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict()})
    elif kind == "gradients":
        table = tp.gradients(model)
    else:
        table = tp.of(nn.DataParallel(model) if kind == "wrapped" else model, buffers=kind != "module")
    try:
        chosen = table.select(selector, strict=False)
        names = set(chosen.names)
    except SelectorError:  # gradients of a model with no buffers, say
        return
    for info in table.infos.values():
        for spelled in (info.name, info.raw_name, *info.aliases):
            assert (spelled in chosen) == (info.name in names), (spelled, str(selector))
            if info.name in names:
                assert torch.equal(chosen[spelled], table[info.name])  # of a mapping, another object there
            else:
                with pytest.raises(UnknownName, match="not in this selection"):
                    chosen[spelled]
    assert "head" not in chosen
    assert "nowhere.weight" not in chosen


def test_a_selection_by_objects_is_decided_by_the_way_to_the_tensor() -> None:
    model = tied_net()
    for selector in (model["head"], model["norm"], nn.LayerNorm, nn.ModuleDict, model["head"].weight, [model["again"]]):
        chosen = tp.of(model).select(selector)
        names = set(chosen.names)
        for info in tp.of(model).infos.values():
            for spelled in (info.name, *info.aliases):
                assert (spelled in chosen) == (info.name in names)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, lambda model: nn.Sequential(model, model)])
@pytest.mark.parametrize("buffers", [False, True])
def test_the_length_is_counted_without_names(wrap: Callable[[Any], nn.Module], buffers: bool) -> None:
    params = tp.of(wrap(tied_net()), buffers=buffers)
    assert len(params) == len(params.names) == len(params.items()) == len(params.snapshot())
    model: Any = Visited(nn.Linear(1, 1), Visited())
    model[1].append(model)  # a module within itself
    model.register_parameter("none", None)
    assert len(tp.of(model)) == len(tp.of(model).names) == 2


# --- no hidden state ----------------------------------------------------------------------------


def test_a_table_keeps_nothing_of_what_it_read() -> None:
    model = net()
    params = tp.of(model).select("**.weight")
    before = {slot: getattr(params, slot) for slot in tp.Parameters.__slots__}
    waiting = iter(params)
    next(waiting)
    for use in (len, list, repr, list_items, list_values, lambda p: p["0.weight"], lambda p: p.info("0.weight")):
        use(params)
    after = {slot: getattr(params, slot) for slot in tp.Parameters.__slots__}
    assert all(after[slot] is before[slot] for slot in before)
    assert set(before) == {"_chosen", "_selector", "_source"}
    assert before["_chosen"] is None


def test_the_length_is_that_of_the_names_while_a_loop_is_suspended() -> None:
    model = net()
    params = tp.of(model)
    names, pairs = iter(params), iter(params.items())
    assert len(params) == 6
    assert next(names) == "0.weight"
    model.append(nn.Linear(2, 2))
    assert len(params) == len(params.names) == len(params.items()) == 8
    assert len(list(pairs)) == 6  # the listing that it began with
    assert len([*names]) == 5
    waiting = iter(params)
    model.append(nn.Linear(2, 2))
    assert len(params) == len(params.names) == 10
    assert len([*waiting]) == 8


def test_what_a_selection_holds_is_what_it_names_while_a_loop_is_suspended() -> None:
    model = net()
    trainable = tp.of(model).select(":trainable")
    loop = iter(trainable)
    assert next(loop) == "0.weight"
    model.requires_grad_(False)
    assert trainable.names == []
    assert "0.bias" not in trainable
    with pytest.raises(UnknownName, match="not in this selection"):
        trainable["0.bias"]
    assert len(list(loop)) == 5


def test_threads_do_not_share_a_reading() -> None:
    model = net()
    params = tp.of(model).select(":trainable")
    loop = iter(params)
    next(loop)
    seen: list[Any] = []

    def look() -> None:
        model.append(nn.Linear(2, 2))
        seen.extend([len(params), params.names, "3.weight" in params])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [8, params.names, True]
    assert len([*loop]) == 5


def test_a_view_holds_one_reading_made_at_its_first_use() -> None:
    model = net()
    for params in (tp.of(model), tp.of(model).select("**")):
        names, items, values = params.keys(), params.items(), params.values()
        model.append(nn.Linear(2, 2))
        held = params.names
        assert len(names) == len(items) == len(values) == len(held)
        model.append(nn.Linear(2, 2))
        model[0].weight = nn.Parameter(torch.zeros(1))
        assert list(names) == [name for name, _ in items] == held
        assert len(list(values)) == len(values) == len(held) == len(params) - 2
        assert model[0].weight not in values
        assert ("0.weight", model[0].weight) not in items
        assert ("0.weight", model[0].weight) in params.items()
        assert (held[-1], None) not in items
        assert f"{len(model) - 1}.weight" not in names
        again = params.keys()
        assert f"{len(model) - 1}.weight" in again


def test_a_selection_that_matches_nothing_later_is_empty() -> None:
    model = net()
    chosen = tp.of(model).select("2.*") | tp.of(model).select(model[2])
    assert chosen.names == ["2.weight", "2.bias"]
    del model[2]
    assert chosen.names == []
    assert len(chosen) == len(list(chosen.items())) == chosen.numel == 0
    assert "2.weight" not in chosen
    assert not chosen.snapshot()
    with pytest.raises(UnknownName):
        chosen["2.weight"]
    with pytest.raises(NoMatch):
        tp.of(model).select("2.*")


def test_records_in_a_loop_are_never_stale() -> None:
    model = net()
    params = tp.of(model)
    for name in params:
        assert params.info(name).requires_grad
        params[name].requires_grad_(False)
        assert not params.info(name).requires_grad
    for name in params:
        assert params.info("0.weight").shape == model[0].weight.shape
        model[0].weight = nn.Parameter(torch.zeros(len(name), 1))
        assert params.info("0.weight").shape == (len(name), 1)
    for _ in params:
        assert params.info("2.weight")
        del model[2]
        with pytest.raises(UnknownName):
            params.info("2.weight")
        break
    chosen = params.select("0.*")
    for _ in chosen:
        with pytest.raises(UnknownName, match="is not in this selection"):
            chosen.info("1.weight")


# --- snapshots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", [None, "**.weight", "~0.*", ":trainable"])
@pytest.mark.parametrize("kind", ["module", "buffers", "mapping", "gradients"])
def test_a_snapshot_is_the_table_as_it_was(kind: str, selector: str | None) -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    mapping = dict(model.named_parameters())
    live = {
        "module": tp.of(model), "buffers": tp.of(model, buffers=True), "mapping": tp.of(mapping),
        "gradients": tp.gradients(model),
    }[kind]  # fmt: skip
    live = live if selector is None else live.select(selector)
    infos, tensors, shown = dict(live.infos), dict(live.items()), str(live)
    numel, left_out = live.numel, live.left_out
    snapshot = live.snapshot()
    assert isinstance(snapshot, tp.Parameters)
    assert list(snapshot.infos.items()) == list(infos.items())

    model.append(nn.Linear(2, 2))
    model.requires_grad_(False)
    model[0].weight = nn.Parameter(torch.zeros(9))
    model[0].weight.grad = torch.zeros(9)
    mapping["0.weight"] = mapping.pop("2.weight")
    model[1].bias.data = torch.zeros(7)

    assert snapshot.names == list(snapshot) == list(infos)
    assert snapshot.infos == infos
    assert str(snapshot) == shown
    assert (len(snapshot), snapshot.numel, snapshot.left_out) == (len(infos), numel, left_out)
    assert all(snapshot[name] is tensor for name, tensor in tensors.items())
    assert all(tensor is tensors[name] for name, tensor in snapshot.items())
    assert [name for name, _ in snapshot.named_parameters()] == list(infos)
    assert "3.weight" not in snapshot
    weights = snapshot.select("**.weight")
    assert weights.names == [name for name in infos if name.endswith("weight")]
    assert (snapshot - weights).names == [name for name in infos if not name.endswith("weight")]
    assert snapshot.snapshot() is snapshot
    with pytest.raises(UnknownName, match="No parameter is named"):
        snapshot["3.weight"]
    with pytest.raises(ReadOnlyTable):
        snapshot["0.bias"] = 0


def test_the_values_of_a_snapshot_are_the_models() -> None:
    model = net()
    snapshot = tp.of(model).select("0.*").snapshot()
    with torch.no_grad():
        model[0].weight.fill_(3)
    assert snapshot["0.weight"] is model[0].weight
    assert (snapshot.numpy("0.weight") == 3).all()
    assert tp.digest(snapshot).digest == tp.digest(tp.of(model).select("0.*")).digest
    assert tp.stats(snapshot).rows[0].mean == 3
    assert tp.diff(snapshot, tp.of(model).select("0.*"), numeric=True).same
    array = snapshot.numpy("0.weight")
    model[0].weight.data.zero_()
    assert (array == 3).all()


def test_a_snapshot_knows_every_spelling() -> None:
    model = nn.DataParallel(tied_net())
    snapshot = tp.of(model).snapshot()
    assert snapshot["head.weight"] is snapshot["embed.weight"] is snapshot["module.embed.weight"]
    assert snapshot.info("head.weight").name == "embed.weight"
    assert "head.weight" in snapshot.select("embed.*")
    assert snapshot.select("head.weight").names == ["embed.weight"]
    assert [name for name, _ in snapshot.named_parameters(remove_duplicate=False)].count("head.weight") == 1


def test_a_snapshot_of_a_file_is_the_table_itself() -> None:
    params = tp.of(MemorySource(arrays()))
    assert params.snapshot() is params


def test_a_snapshot_keeps_what_is_said_beside_its_names() -> None:
    class Scaled(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"scale": 3}

    model = nn.Sequential(Scaled(2, 2), nn.ReLU())
    snapshot = tp.of(model).snapshot()
    model[0] = nn.Linear(2, 2)
    assert [found.name for found in snapshot.left_out] == ["0"]
    assert str(tp.of(nn.ReLU()).snapshot()) == str(tp.of(nn.ReLU()))
    assert tp.of({"w": np.zeros(2), "step": 3}).snapshot().metadata == {"step": 3}
    codes = {"fc.weight": np.zeros((2, 2), np.int8), "fc.scales": np.ones(2, np.float32)}
    taken = tp.of(codes).select("fc.weight").snapshot()
    assert tp.stats(taken).unread[0].name == "fc.weight"


def test_verbs_that_change_a_model_take_no_snapshot() -> None:
    snapshot = tp.of(net()).snapshot()
    uses: list[Callable[[], object]] = [lambda: tp.freeze(snapshot, "**"), lambda: tp.groups(snapshot, lr=1.0)]
    for use in uses:
        with pytest.raises(UnsupportedSource):
            use()


def test_a_snapshot_as_a_target_is_copied_where_a_model_would_be() -> None:
    model: Any = nn.Linear(2, 2)
    penalty = Penalty(model, toward=tp.of(model).snapshot())
    with torch.no_grad():
        model.weight.add_(1)
    assert penalty() > 0
    other: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = other[0].weight.detach().clone(), other[1].weight.detach().clone()
    tp.load(other, tp.of(other).snapshot(), rename={"0.weight": "1.weight", "1.weight": "0.weight",
                                                    "0.bias": "1.bias", "1.bias": "0.bias"})  # fmt: skip
    assert torch.equal(other[0].weight, second)
    assert torch.equal(other[1].weight, first)


# --- copies -----------------------------------------------------------------------------------


def test_copies() -> None:
    model = net()
    params = tp.of(model).select("0.*")
    assert copy.copy(params) == params
    waiting = iter(params)
    assert copy.copy(params).names == params.names == list(waiting)
    deep = copy.deepcopy(params)
    assert deep.names == params.names
    assert deep["0.weight"] is not params["0.weight"]


def test_making_a_table_of_a_table() -> None:
    params = tp.of(net())
    assert tp.of(params) is params
    assert tp.of(params.source) == params
    assert isinstance(tp.of(params.source), tp.Parameters)


# --- one reading ------------------------------------------------------------------------------


def test_a_reading_gives_every_selector_the_same_state() -> None:
    model = net()
    reading = tp.of(model).reading()
    assert tp.Selector("**.weight").names(reading, strict=True) == {
        name for name, _ in model.named_parameters() if name.endswith("weight")
    }
    model[0].requires_grad_(False)
    model.append(nn.Linear(2, 2))
    assert len(reading) == len(reading.names) == len(tp.Selector("**").names(reading)) == len(tp.of(model)) - 2
    assert list(reading) == reading.infos == [tp.of(model).info(name) for name in reading.names]


@pytest.mark.parametrize("source", ["module", "mapping"])
def test_every_field_of_a_reading_is_that_of_the_records(source: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.LazyLinear(2))
    model.append(model[0])
    params = tp.of(nn.DataParallel(model), buffers=True) if source == "module" else tp.of(model.state_dict())
    fields = tp.ParameterInfo._fields
    for chosen in (params, params.select("1.**" if source == "module" else "1.*")):
        reading, infos = chosen.reading(), chosen.infos
        assert reading.names == list(infos)
        for field in (*fields, "ndim"):
            assert list(reading.column(field)) == [getattr(info, field) for info in infos.values()], field
        assert list(reading.column("owner")) == [(info.module, info.bases) for info in infos.values()]
        assert list(reading.raws) == list(Reading(infos.values()).raws)
        assert list(reading.aliases) == list(Reading(infos.values()).aliases)
        assert reading.infos == list(infos.values())


def test_selecting_and_reading_what_was_selected_makes_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    monkeypatch.setattr(LiveReading, "infos", property(lambda self: pytest.fail("records were made")))
    params = tp.of(model)
    for text in ("0.*", "/.*bias/", ":norm", ":trainable", "[ndim=2]", "[module=Linear]", "~:bias & [numel<=6]"):
        chosen = params.select(text)
        assert [name for name, _ in chosen.items()] == list(chosen) == chosen.names
        assert all(any(tensor is p for p in model.parameters()) for tensor in chosen.values())


def test_a_selection_is_read_in_one_traversal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, readings = net(), []
    of = LiveReading.of
    monkeypatch.setattr(LiveReading, "of", lambda *args, **options: readings.append(1) or of(*args, **options))  # type: ignore[func-returns-value]  # counts
    chosen = tp.of(model).select("**.weight")
    assert len(readings) == 1
    for use in (lambda: chosen.names, lambda: list(chosen.items()), lambda: chosen.infos, lambda: list(chosen())):
        readings.clear()
        use()
        assert len(readings) == 1
