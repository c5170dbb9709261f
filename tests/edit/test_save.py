"""save, deltas, and applying deltas."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import torchparams as tp
from bit_patterns import NUMERIC
from torchparams.dtypes import DType
from torchparams.edit.save import KEY
from torchparams.errors import MismatchError, NoMatch, PlanError
from torchparams.testing import sample

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Array = np.ndarray[Any, Any]


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def message(error: type[Exception], run: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        run()
    return str(caught.value)


def test_a_network_is_saved_and_replaced(tmp_path: Path) -> None:
    model = network()
    path = tmp_path / "last.safetensors"
    for _ in range(2):
        with torch.no_grad():
            model.get_parameter("0.weight").add_(1)
        written = tp.save(model, path)
        loaded = load_file(path)
        assert set(loaded) == set(model.state_dict())
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert (written.tensors, written.path) == (len(loaded), str(path))
    assert "It exists already" in message(PlanError, lambda: tp.save(model, path, overwrite=False))


def test_only_what_is_trainable(tmp_path: Path) -> None:
    model = network()
    model[0].requires_grad_(False)
    tp.save(model, tmp_path / "x.safetensors", only="trainable")
    assert list(load_file(tmp_path / "x.safetensors")) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    tp.save(model, tmp_path / "x.pt", "2.**", only="trainable", dtype="bf16")
    assert list(torch.load(tmp_path / "x.pt", weights_only=True)) == ["2.weight", "2.bias"]
    model.requires_grad_(False)
    with pytest.raises(NoMatch):
        tp.save(model, tmp_path / "y.safetensors", only="trainable")
    assert message(PlanError, lambda: tp.save(model, tmp_path / "y.safetensors", only="frozen")) == (
        "`only` must be 'trainable' or None, not 'frozen'"
    )


def test_a_delta_holds_what_differs_and_is_put_back_bit_for_bit(tmp_path: Path) -> None:
    model = network()
    base, delta, again = (tmp_path / f"{name}.safetensors" for name in ("base", "delta", "again"))
    tp.save(model, base)
    with torch.no_grad():
        model.get_parameter("2.bias")[0].add_(1)
        model.get_buffer("1.running_mean").add_(1)
    model.add_module("new", torch.nn.Linear(1, 1))
    written = tp.save(model, delta, base=base)
    assert list(load_file(delta)) == ["1.running_mean", "2.bias", "new.weight", "new.bias"]
    assert written.notes == ("a delta: 2 tensors differ, 2 are new, 0 are gone",)
    told = json.loads(tp.of(delta).metadata[KEY])
    assert told == {"version": 1, "base": tp.digest(base).digest, "removed": []}
    plan = tp.apply_delta(base, delta, again)
    assert plan.notes == ("4 tensors from the delta, 7 tensors from the base",)
    plan.run()
    assert tp.digest(again).digest == tp.digest(model).digest
    other = network()
    other.add_module("new", torch.nn.Linear(1, 1))
    other.load_state_dict(load_file(again))
    assert KEY not in tp.of(again).metadata


NAMES = "abcde"


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_delta(tmp_path: Path, data: st.DataObject) -> None:
    def tensors() -> dict[str, Array]:
        chosen = data.draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
        kinds = [name for name in NUMERIC if DType.of(name).code and DType.of(name).bits >= 8]
        return {
            name: sample(data.draw(st.sampled_from(kinds[:3])), data.draw(st.sampled_from([(2,), (0,), (2, 1)])),
                         seed=data.draw(st.integers(0, 1)))
            for name in chosen
        }  # fmt: skip

    base, tuned = tensors(), tensors()
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "delta", "again")]
    tp.save(base, paths[0])
    tp.save(tuned, paths[1])
    tp.save(paths[1], paths[2], base=paths[0])
    tp.apply_delta(paths[0], paths[2], paths[3], overwrite=True).run()
    assert tp.digest(paths[3]).digest == tp.digest(paths[1]).digest
    differing = {name for name, array in tuned.items() if name not in base or not same(array, base[name])}
    assert set(tp.of(paths[2]).names) == differing


def same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_bits_are_compared_not_values(tmp_path: Path) -> None:
    base = {"zero": np.array([0.0]), "nan": np.array([np.nan]), "packed": sample("float4_e2m1fn", (8,))}
    path = tmp_path / "base.safetensors"
    tp.save(base, path)
    plan = tp.delta({**base, "zero": np.array([-0.0])}, path, tmp_path / "d.safetensors")
    assert [output.name for output in plan.outputs] == ["zero"]
    plan = tp.delta(
        {**base, "nan": np.array([0xFFF8000000000001], np.uint64).view(np.float64)}, path, tmp_path / "d.safetensors"
    )
    assert [output.name for output in plan.outputs] == ["nan"]


def test_nothing_differs(tmp_path: Path) -> None:
    base, delta, again = (tmp_path / f"{name}.safetensors" for name in ("base", "delta", "again"))
    tp.save({"w": np.ones(2)}, base)
    tp.save(base, delta, base=base)
    assert tp.of(delta).names == []
    tp.apply_delta(base, delta, again).run()
    assert again.read_bytes() == base.read_bytes()


def test_what_is_gone_stays_gone_unless_it_was_not_looked_at(tmp_path: Path) -> None:
    base = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    tuned = {"a": np.zeros(2), "c": np.zeros(2)}
    path = tmp_path / "d.safetensors"
    tp.save(tuned, path, base=base)
    plan = tp.apply_delta(base, path, tmp_path / "x.safetensors")
    assert [output.name for output in plan.outputs] == ["a", "c"]
    tp.save(tuned, path, "a", base=base)
    plan = tp.apply_delta(base, path, tmp_path / "x.safetensors")
    assert [(o.name, o.expression.to_json()["source"]) for o in plan.outputs] == [
        ("a", str(path)), ("b", "dict"), ("c", "dict"),
    ]  # fmt: skip


def test_tied_names(tmp_path: Path) -> None:
    w = torch.ones(2)
    base = {"embed": w, "head": w, "x": torch.ones(1)}
    untied = {"embed": w, "head": torch.zeros(2), "x": torch.ones(1)}
    path = tmp_path / "d.safetensors"
    tp.save(untied, path, base=base)
    assert tp.of(path).names == ["head"]
    tp.apply_delta(base, path, tmp_path / "x.pt").run()
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {"embed": [1, 1], "head": [0, 0], "x": [1]}
    tp.save({**base, "x": torch.zeros(1)}, path, base=base)
    tp.apply_delta(base, path, tmp_path / "y.pt").run()
    loaded = torch.load(tmp_path / "y.pt", weights_only=True)
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()


def test_what_is_refused(tmp_path: Path) -> None:
    base, tuned = {"a": np.ones(2)}, {"a": np.zeros(2)}
    path, out = tmp_path / "d.safetensors", tmp_path / "x.safetensors"
    assert message(PlanError, lambda: tp.save(tuned, tmp_path / "d.pt", base=base)) == (
        f"{tmp_path}/d.pt: A delta is a safetensors file. End its name in .safetensors."
    )
    tp.save(tuned, path, base=base)
    expected, found = tp.digest(base).digest, tp.digest(tuned).digest
    assert message(MismatchError, lambda: tp.apply_delta(tuned, path, out)) == (
        f"{path}: The delta belongs to another base, with digest {expected[:15]}…. The digest of dict is "
        f"{found[:15]}…. "
        "Pass the base that the delta was made from."
    )
    assert len(tp.apply_delta(tuned, path, out, check=False).outputs) == 1
    tp.save(base, out)
    assert message(PlanError, lambda: tp.apply_delta(base, out, tmp_path / "y.safetensors")) == (
        f"{out}: It is not a delta. Write a delta with torchparams delta, or torchparams.save with a base."
    )
    for told in ("", "[]", '{"version": 2, "base": "", "removed": []}', '{"version": 1, "base": 3, "removed": []}'):
        tp.save(base, out, metadata={KEY: told})
        assert message(PlanError, lambda: tp.apply_delta(base, out, tmp_path / "y.safetensors")) == (
            f"{out}: The version of this delta is not supported. "
            "Write a delta with torchparams delta, or torchparams.save with a base."
        )
