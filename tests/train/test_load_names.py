"""Loading by name: matching, reports of the others, and coverage options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import torchparams as tp
from torchparams import errors
from torchparams.errors import MismatchError, OptionError
from torchparams.train import _fit, _matching
from torchparams.train import coverage as coverage_module
from torchparams.train.load import coverage, load

if TYPE_CHECKING:
    from pathlib import Path


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def ones(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(value) for name, value in model.state_dict().items()}


def all_ones(model: nn.Module) -> bool:
    return all(bool((value == 1).all()) for value in model.state_dict().values())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def test_all_four_kinds() -> None:
    state = ones(net())
    state["2.bias"] = torch.zeros(3)
    state["1.gamma"] = state.pop("1.weight")
    state["extra.thing"] = torch.zeros(7)
    found = coverage(net(), state)
    assert list(found.loaded) == ["0.weight", "0.bias", "1.bias", "2.weight"]
    assert list(found.missing) == ["1.weight"]
    assert list(found.unexpected) == ["1.gamma", "extra.thing"]
    assert list(found.mismatched) == ["2.bias"]
    assert found.missing["1.weight"].nearest == "1.gamma"
    assert found.unexpected["1.gamma"].nearest == "1.weight"
    assert found.mismatched["2.bias"].note == "shape [3], not [2]"
    assert not found.complete
    assert str(found) == (
        "dict → Sequential\n"
        "what        name         from  note\n"
        "missing     1.weight           perhaps 1.gamma\n"
        "unexpected  1.gamma            perhaps 1.weight\n"
        "unexpected  extra.thing\n"
        "mismatched  2.bias             shape [3], not [2]\n"
        "4 loaded · 1 missing · 2 unexpected · 1 mismatched"
    )
    assert repr(found) == str(found)
    assert "<table>" in found._repr_html_()


def test_gamma_and_beta_are_loaded_as_weight_and_bias() -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(3), "b": nn.LayerNorm(3)})
    state = {
        f"bert.{n}.{k}": torch.full((3,), float(i))
        for i, (n, k) in enumerate((n, k) for n in "ab" for k in ("beta", "gamma"))
    }
    with pytest.raises(MismatchError, match='Pass rename="auto"'):
        load(model, state)
    load(model, state, rename="auto")
    assert {name: int(p[0]) for name, p in model.named_parameters()} == {
        "a.weight": 1,
        "a.bias": 0,
        "b.weight": 3,
        "b.bias": 2,
    }
    found = coverage(nn.LayerNorm(3), {"beta": torch.zeros(3)}, rename="auto")
    assert (found.renamed, list(found.missing), found.missing["weight"].nearest) == ({"beta": "bias"}, ["weight"], None)
    assert coverage(nn.LayerNorm(3, bias=False), {"beta": torch.zeros(3)}).missing["weight"].nearest is None


def test_the_json_of_a_coverage() -> None:
    found = coverage(nn.Linear(1, 1), {"weight": torch.zeros(1, 1, dtype=torch.float64), "beta": torch.zeros(1)})
    none: dict[str, Any] = {"nearest": None, "also": [], "lost": None}
    assert json.loads(json.dumps(found.to_json())) == {
        "model": "Linear",
        "source": "dict",
        "complete": False,
        "loaded": [
            {"name": "weight", "source": "weight", "note": "float64 → float32", **none},
        ],
        "missing": [{"name": "bias", "source": None, "note": None, **none, "nearest": "beta"}],
        "unexpected": [{"name": "beta", "source": "beta", "note": None, **none, "nearest": "bias"}],
        "mismatched": [],
        "left_out": [],
        "rename": None,
        "notes": [],
    }


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"2.bias": None},
            "missing",
            "dict → Sequential: 1 missing: '2.bias'. 5 tensors fit, and nothing was changed. "
            "strict=False loads what fits.",
        ),
        (
            {"3.bias": torch.zeros(9)},
            "unexpected",
            "dict → Sequential: 1 unexpected: '3.bias'. 6 tensors fit, and nothing was changed. "
            "strict=False loads what fits.",
        ),
        (
            {"2.bias": torch.zeros(9)},
            "mismatched",
            "dict → Sequential: 1 mismatched: '2.bias' (shape [9], not [2]). 5 tensors fit, and nothing was changed. "
            "strict=False loads what fits.",
        ),
    ],
)
def test_strict_over_each_kind(change: dict[str, Any], kind: str, message: str) -> None:
    model = net()
    state = {name: value for name, value in {**ones(model), **change}.items() if value is not None}
    for strict in (True, kind, (kind,)):
        with pytest.raises(MismatchError) as caught:
            load(model, state, strict=strict)
        assert str(caught.value) == message
    assert not all_ones(model)
    others = [other for other in ("missing", "unexpected", "mismatched") if other != kind]
    found = load(model, state, strict=others)
    assert len(found.loaded) == 6 - (kind != "unexpected")
    load(net(), state, strict=False)


def test_a_strictness_that_is_none() -> None:
    with pytest.raises(OptionError) as caught:
        load(net(), ones(net()), strict=("missed",))
    assert str(caught.value) == (
        "strict='missed' is not a kind of mismatch. The kinds are missing, unexpected, mismatched. "
        "Pass several as strict=('missing', 'unexpected')."
    )


def test_loading_nothing_is_never_meant() -> None:
    with pytest.raises(MismatchError) as caught:
        load(nn.Linear(1, 2), {"w": torch.zeros(7)}, strict=False)
    assert str(caught.value) == (
        "dict → Linear: None of its tensors fit the model. It holds w; the model weight, bias."
    )


def test_many_names_are_counted_in_the_error() -> None:
    model = nn.ParameterDict({f"p{i}": torch.zeros(2) for i in range(5)})
    with pytest.raises(MismatchError, match=r"5 missing: 'p0', 'p1', 'p2' and 2 more; 1 unexpected: 'x'\. 0 tensors"):
        load(model, {"x": torch.zeros(7, 7)})


# --- names in the checkpoint -----------------------------------------------------------------------


def test_a_checkpoint_with_the_model_inside(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    torch.save({"model": ones(net()), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3}, path)
    with pytest.raises(MismatchError) as caught:
        load(net(), path)
    assert str(caught.value).endswith(f"0 tensors fit, and nothing was changed. Load '{path}#model'.")
    model = net()
    load(model, f"{path}#model")
    assert all_ones(model)
    with pytest.raises(MismatchError) as caught:
        load(net(), torch.load(path))
    assert str(caught.value).endswith("nothing was changed. Pass the mapping under 'model'.")
    torch.save({"outer": {"model": ones(net())}}, path)
    with pytest.raises(MismatchError) as caught:
        load(net(), f"{path}#outer")
    assert str(caught.value).endswith(f"nothing was changed. Load '{path}#outer.model'.")


def test_names_with_the_prefix_of_a_wrapper(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in ones(net()).items()}
    save_file(state, tmp_path / "m.safetensors")
    model = net()
    with pytest.raises(MismatchError) as caught:
        load(model, tmp_path / "m.safetensors")
    assert str(caught.value).endswith("""nothing was changed. Pass rename="auto": strip 'module.' from 6 of 6 names.""")
    assert not all_ones(model)
    found = load(model, tmp_path / "m.safetensors", rename="auto")
    assert all_ones(model)
    assert found.rename == "strip 'module.' from 6 of 6 names"
    assert found.renamed["module.0.weight"] == "0.weight"
    assert "renamed: strip 'module.' from 6 of 6 names" in str(found)
    load(net(), tmp_path / "m.safetensors", rename=r"^module\.=")
    load(net(), tmp_path / "m.safetensors", rename=lambda name: name.removeprefix("module."))


def test_a_wrapped_model_takes_either_name(tmp_path: Path) -> None:
    wrapped = nn.DataParallel(net())
    torch.save(ones(wrapped), tmp_path / "wrapped.pt")
    torch.save(ones(net()), tmp_path / "plain.pt")
    for name in ("wrapped", "plain"):
        model = nn.DataParallel(net())
        found = load(model, tmp_path / f"{name}.pt")
        assert all_ones(model)
        assert list(found.loaded)[:2] == ["0.weight", "0.bias"]
    compiled = torch.compile(net())
    load(compiled, {f"_orig_mod.{name}": value for name, value in ones(net()).items()})
    assert all_ones(compiled)  # type: ignore[arg-type]  # it is a module
    tied = nn.DataParallel(Tied())
    load(tied, {"module.head.weight": torch.ones(3, 2)})
    assert all_ones(tied)


def test_automatic_renames_pair_what_is_left_by_shape() -> None:
    state = ones(net())
    state["1.gamma"] = state.pop("1.weight")
    model = net()
    found = load(model, state, rename="auto")
    assert all_ones(model)
    assert found.renamed == {"1.gamma": "1.weight"}
    assert found.rename == "1 pair by shape and position: 1.gamma → 1.weight"


def test_automatic_renames_that_could_be_two_are_not_made() -> None:
    model = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(MismatchError, match="2 missing: 'a'"):
        load(model, {"x": torch.zeros(2), "y": torch.zeros(2)}, rename="auto")


def test_a_rename_that_makes_two_names_one() -> None:
    with pytest.raises(MismatchError) as caught:
        load(nn.ParameterDict({"a": torch.zeros(2)}), {"a": torch.zeros(2), "x.a": torch.zeros(2)}, rename=r"^x\.=")
    assert str(caught.value) == "dict: 'a' and 'x.a' would both be named 'a'"


def test_a_buffer_that_is_not_saved_is_unexpected() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("scale", torch.ones(1), persistent=False)
    found = coverage(model, {"weight": torch.zeros(1, 1), "bias": torch.zeros(1), "scale": torch.zeros(1)})
    assert found.unexpected["scale"].note == "a buffer of the model that is not saved"
    other = nn.Linear(1, 1)
    other.register_buffer("scale", torch.ones(1), persistent=False)
    assert load(model, other).complete


# --- selections ------------------------------------------------------------------------------------


def test_a_selector_fills_only_what_it_hits() -> None:
    model = net()
    before = model.get_parameter("2.weight").clone()
    state = {**ones(model), "2.bias": torch.zeros(99), "head.weight": torch.zeros(1)}
    found = load(model, state, "0.** | 1.**")
    assert list(found.loaded) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert found.left_out == ("2.weight", "2.bias", "head.weight")
    assert found.complete
    assert torch.equal(model.get_parameter("2.weight"), before)
    assert "4 loaded · 0 missing · 0 unexpected · 0 mismatched · 3 left out" in str(found)
    with pytest.raises(MismatchError, match=r"1 missing: '1\.bias'"):
        load(model, {name: value for name, value in state.items() if name != "1.bias"}, "0.** | 1.**")


def test_tables_on_both_sides() -> None:
    model = net()
    found = load(tp.of(model).select("**.bias"), tp.of(ones(model)).select("**.bias"))
    assert list(found.loaded) == ["0.bias", "1.bias", "2.bias"]
    assert model.get_parameter("0.bias").tolist() == [1] * 4


def test_a_table_without_buffers_lacks_them() -> None:
    model = nn.BatchNorm1d(2)
    with pytest.raises(MismatchError) as caught:
        load(model, tp.of(nn.BatchNorm1d(2)))
    assert str(caught.value) == (
        "BatchNorm1d → BatchNorm1d: 2 missing: 'running_mean', 'running_var'. "
        "2 tensors fit, and nothing was changed. Pass the model itself, not a table without its buffers."
    )


# --- ties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]])
def test_one_name_of_a_tied_tensor_is_enough_and_both_may_be_there(names: list[str], tmp_path: Path) -> None:
    save_file({name: torch.ones(3, 2) for name in names}, tmp_path / "m.safetensors")
    model = Tied()
    weight = model.embed.weight
    found = load(model, tmp_path / "m.safetensors")
    assert found.complete
    assert model.head.weight is model.embed.weight is weight
    assert all_ones(model)
    assert found.loaded["embed.weight"].also == tuple(names[1:])


def test_two_values_for_a_tied_tensor_are_a_conflict(tmp_path: Path) -> None:
    other = torch.ones(3, 2)
    other[2, 1] = 2
    save_file({"embed.weight": torch.ones(3, 2), "head.weight": other}, tmp_path / "m.safetensors")
    with pytest.raises(MismatchError) as caught:
        load(Tied(), tmp_path / "m.safetensors")
    assert "1 mismatched: 'embed.weight' (tied in the model, but head.weight holds different values)" in str(
        caught.value
    )
    found = coverage(Tied(), {"embed.weight": torch.ones(3, 2), "head.weight": torch.ones(3, 2).double()})
    assert found.mismatched["embed.weight"].note == "tied in the model, but head.weight holds different values"


def test_nan_is_equal_to_itself_in_tied_tensors() -> None:
    nan = torch.full((3, 2), torch.nan)
    assert coverage(Tied(), {"embed.weight": nan, "head.weight": nan.clone()}).complete


def test_a_tensor_tied_in_the_checkpoint_fills_two_parameters(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "m.pt")
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(3, 2))
    found = load(model, tmp_path / "m.pt")
    assert list(found.loaded) == ["embed.weight", "head.weight"]
    assert torch.equal(model.head.weight, model.embed.weight)
    assert model.head.weight is not model.embed.weight


# --- what is beside tensors ------------------------------------------------------------------------


class Stateful(nn.Linear):
    called = False

    def get_extra_state(self) -> Any:
        return torch.ones(3)

    def set_extra_state(self, state: Any) -> None:
        self.called = True


class Hooked(nn.Linear):
    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        raise AssertionError("it was run")


def test_extra_state_is_named_and_not_set() -> None:
    model = nn.ModuleDict({"a": Stateful(1, 1), "b": nn.Linear(1, 1)})
    found = load(model, model.state_dict())
    assert found.complete
    assert found.notes == ("not loaded: the extra state of 1 module (a); pass it to set_extra_state",)
    assert not model["a"].called
    found = coverage(nn.ModuleDict({"b": nn.Linear(1, 1)}), model.state_dict())
    assert list(found.unexpected) == ["a.weight", "a.bias", "a._extra_state"]


def test_code_that_modules_hook_into_loading_is_named_and_not_run() -> None:
    model = nn.Sequential(Hooked(1, 1), nn.Linear(1, 1), nn.BatchNorm1d(1))
    model[1].register_load_state_dict_pre_hook(print)  # type: ignore[no-untyped-call]  # torch's own omission
    found = load(model, ones(model))
    assert found.notes == ("not run: the code that 2 modules (0, 1) hooks into load_state_dict",)
    assert all_ones(model)


# --- laws ------------------------------------------------------------------------------------------


NAMES = st.lists(st.sampled_from(["a", "b", "a.b", "c.weight", "c.bias", "d", "e"]), unique=True)


@settings(max_examples=40, deadline=None)
@given(NAMES, NAMES, st.booleans())
def test_every_name_is_in_exactly_one_place(wanted: list[str], given_names: list[str], automatic: bool) -> None:
    model = nn.Module()
    for name in wanted:
        *path, last = name.replace("a.b", "ab").split(".")
        here = model
        for part in path:
            if part not in here._modules:
                here.add_module(part, nn.Module())
            here = here.get_submodule(part)
        here.register_parameter(last, nn.Parameter(torch.zeros(len(name) % 3)))
    state = {name.replace("a.b", "ab"): torch.ones(len(name) % 3) for name in given_names}
    found = coverage(model, state, rename="auto" if automatic else None)
    names = {name for name, _ in model.named_parameters()}
    ours = [*found.loaded, *found.missing, *found.mismatched]
    assert sorted(ours) == sorted(names)
    theirs = [item.source for kind in (found.loaded, found.unexpected, found.mismatched) for item in kind.values()]
    assert sorted(map(str, theirs)) == sorted(state)
    if not automatic:
        assert set(found.loaded) == names & set(state)


def test_work_grows_with_the_count_of_names_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"problem": 0, "nearest": 0}

    def counted(name: str, function: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(_matching, "problem", counted("problem", _fit.problem))
    monkeypatch.setattr(coverage_module, "nearest", counted("nearest", errors.nearest))
    for count in (500, 1000):
        calls.update(problem=0, nearest=0)
        model = nn.ParameterDict({f"p{i}": torch.zeros(1) for i in range(count)})
        coverage(model, {f"p{i}": torch.zeros(1) for i in range(count)})
        assert calls == {"problem": 0, "nearest": 0}  # plain tensors that fit need no further look
        coverage(model, {f"p{i}": torch.zeros(1, dtype=torch.float64) for i in range(count)})
        assert calls == {"problem": count, "nearest": 0}
        calls.update(problem=0)
        coverage(model, {f"q{i}": torch.zeros(2) for i in range(count)})
        assert calls["problem"] == 0
        assert calls["nearest"] <= 32
