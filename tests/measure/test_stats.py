"""Statistics: every number against numpy and torch, groups against their members, and unreadable tensors."""

from __future__ import annotations

import json
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from torch_files import saved, written
from torchparams.engines import ThreadEngine
from torchparams.errors import NoMatch, SelectorError, TorchParamsError, TruncatedFile, UnknownName
from torchparams.measure.stats import QUANTILES, numbers_in
from torchparams.measure.tensor_stats import BINS
from torchparams.testing import NUMPY_DTYPES, safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path

    from torchparams.measure.tensor_stats import TensorStats

Array = np.ndarray[Any, Any]


def row_of(values: Any, **options: Any) -> TensorStats:
    return tp.stats({"w": values}, **options)["w"]


def wide(array: Array) -> Array:
    """The values as float64, of a complex element both parts."""
    if array.dtype.kind == "c":
        array = array.reshape(-1).view(f"f{array.itemsize // 2}")
    with np.errstate(invalid="ignore"):  # signalling NaN
        return array.astype(np.float64).reshape(-1)


# --- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_every_type_against_numpy(dtype: str) -> None:
    array = sample(dtype, (7, 9))
    row, all_values = row_of(array), wide(array)
    values = all_values[np.isfinite(all_values)]
    assert (row.name, row.tensors, row.shape, row.dtype, row.numel) == ("w", 1, (7, 9), dtype, 63)
    assert row.values == len(all_values)
    assert row.zeros == np.count_nonzero(all_values == 0)
    assert row.nan == np.count_nonzero(np.isnan(all_values))
    assert (row.posinf, row.neginf) == (np.sum(all_values == math.inf), np.sum(all_values == -math.inf))
    with np.errstate(over="ignore"):
        assert row.mean == pytest.approx(values.mean(), rel=1e-12, abs=abs(values).max() * 1e-15)
        scaled = values / (abs(values).max() or 1)  # their squares would be beyond float64
        assert row.std == pytest.approx(scaled.std(ddof=1) * abs(values).max(), rel=1e-9)
        assert row.l1 == pytest.approx(abs(values).sum(), rel=1e-12)
        assert row.l2 == pytest.approx(np.linalg.norm(scaled) * abs(values).max(), rel=1e-9)
    assert row.linf == pytest.approx(abs(values).max(), rel=1e-15)
    assert row.min == pytest.approx(np.nanmin(all_values), rel=1e-15)
    assert row.max == pytest.approx(np.nanmax(all_values), rel=1e-15)
    assert sum(row.histogram) == len(values)
    assert [q for q, _ in row.quantiles] == list(QUANTILES)
    least = 2.0**-133 if dtype in ("float32", "complex64") else 2.0**-1029
    for q, value in row.quantiles:
        expected = float(np.quantile(values, q))
        around = np.sort(values)[[math.floor(q * (len(values) - 1)), math.ceil(q * (len(values) - 1))]]
        assert value == pytest.approx(expected, rel=1e-12, abs=1e-300 if row.exact else abs(around).max() / 256 + least)
    assert row.exact == (np.dtype(array.dtype).itemsize <= 2)
    if row.exact:
        assert row.distinct == len(np.unique(values)) + sum(n > 0 for n in (row.nan, row.posinf, row.neginf))
    json.dumps(row.to_json(), allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_against_torch(dtype: torch.dtype) -> None:
    tensor = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    row, exact = row_of(tensor), tensor.double()
    assert row.mean == pytest.approx(exact.mean().item())
    assert row.std == pytest.approx(exact.std().item())
    assert row.l2 == pytest.approx(exact.norm().item())
    assert row.min == exact.min().item()
    assert row.max == exact.max().item()
    for q, value in row.quantiles:
        assert value == pytest.approx(torch.quantile(exact, q).item(), rel=2**-8)


def test_entropy_is_that_of_the_patterns() -> None:
    assert row_of(np.array([0, 1, 2, 3] * 4, np.int8)).entropy == 2.0
    assert row_of(np.zeros(5, np.float32)).entropy == 0.0


def test_what_does_not_count() -> None:
    row = row_of(np.array([np.nan, 1, 2, np.inf, -np.inf], np.float32))
    assert (row.nan, row.posinf, row.neginf, row.nonfinite) == (1, 1, 1, 3)
    assert (row.mean, row.min, row.max, row.linf) == (1.5, -math.inf, math.inf, 2.0)
    nothing = row_of(np.array([np.nan], np.float32))
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.low)
    assert nothing.histogram == (0,) * BINS


def test_empty_and_scalar() -> None:
    empty, scalar = row_of(np.zeros((0, 3), np.float32)), row_of(np.full((), 2, np.float32))
    assert (empty.numel, empty.l1, empty.zeros, empty.bars) == (0, 0.0, 0, " " * BINS)
    assert math.isnan(empty.min)
    assert (scalar.shape, scalar.mean, scalar.max) == ((), 2.0, 2.0)
    assert math.isnan(scalar.std)
    assert sum(scalar.histogram) == 1


def test_integers_stay_integers() -> None:
    row = row_of(np.array([-(2**63), 2**63 - 1], np.int64))
    assert (row.min, row.max, row.linf) == (-(2**63), 2**63 - 1, 2**63)
    assert isinstance(row.to_json()["min"], int)


def test_the_histogram_is_not_flattened_by_an_outlier() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[0] = 1e6
    spread = row_of(values[1:])
    assert (spread.low, spread.high) == pytest.approx((-3, 3), abs=0.1)
    assert max(spread.histogram) < 2500
    assert sum(spread.histogram) == 9999
    narrow = row_of(np.arange(12, dtype=np.int8))
    assert (narrow.low, narrow.high, narrow.histogram) == (0.0, 11.0, (1,) * 12)


def test_layouts_and_views_make_no_difference() -> None:
    array = sample("float32", (6, 8))
    tensor = torch.from_numpy(array.copy())
    rows = tp.stats({"a": array, "b": array.T, "c": array[::2], "d": tensor.t(), "e": tensor.expand(2, 6, 8)}).rows
    a, b, c, d, e = rows
    assert (a.mean, a.l1, a.quantiles) == (b.mean, b.l1, b.quantiles) == (d.mean, d.l1, d.quantiles)
    assert c.numel == 24
    assert (e.numel, e.l1) == (96, 2 * a.l1)


def test_the_share_of_zeros_is_of_values() -> None:
    found = tp.stats({"w": np.zeros(3, np.complex64)})
    assert (found["w"].numel, found["w"].values, found["w"].zeros) == (3, 6, 6)
    assert "100%" in str(found)


def test_a_number_of_threads_makes_no_difference() -> None:
    arrays = {f"w{i}": sample("float32", (300, 40)) for i in range(3)}
    one, two = (tp.stats(arrays, engine=ThreadEngine(n, block_bytes=4096, part_bytes=8192)) for n in (1, 2))
    assert one.rows == two.rows


# --- sources -----------------------------------------------------------------------------------


def test_a_file_and_a_model_and_a_mapping_say_the_same(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    state = model.state_dict()
    zipped = written(tmp_path, saved(state))
    numbers = {key: value.numpy() for key, value in state.items()}
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(numbers))
    expected = tp.stats(state).rows
    assert tp.stats(zipped).rows == expected
    assert tp.stats(str(tmp_path / "m.safetensors")).rows == expected
    assert {row.name: row for row in tp.stats(model, buffers=True)} == {row.name: row for row in expected}
    assert [row.name for row in tp.stats(model)] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_tied_tensors_count_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(4, 3)
            self.head = torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    found = tp.stats(Tied())
    assert [row.name for row in found] == ["embed.weight"]
    assert tp.stats(Tied(), by=["**"]).rows[0].numel == 12


def test_a_live_model_is_read_anew() -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1)
    assert tp.stats(model)["weight"].mean == 1
    with torch.no_grad():
        model.weight.fill_(2)
    assert tp.stats(model)["weight"].mean == 2


def test_the_state_of_an_optimizer() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    found = tp.stats(optimizer.state_dict(), "**.exp_avg")
    assert [row.name for row in found] == ["state.0.exp_avg", "state.1.exp_avg"]
    assert found["state.1.exp_avg"].mean == pytest.approx(0.1)


def test_what_cannot_be_read_is_listed_with_the_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch is about to drop them
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    meta = torch.nn.Linear(2, 2, device="meta").weight
    tensors = {"a": torch.ones(2), "meta": meta, "sparse": torch.eye(3).to_sparse(), "quantised": quantised}
    found = tp.stats({**tensors, "z": torch.ones(3)})
    assert [row.name for row in found] == ["a", "quantised", "z"]
    assert found["quantised"].mean == pytest.approx(1.0)
    assert [(each.name, each.reason) for each in found.unread] == [
        ("meta", "a tensor on the meta device has a shape but no values"),
        ("sparse", "a sparse tensor (torch.sparse_coo) cannot become an array; pass tensor.to_dense()"),
    ]
    assert "not read: 2 tensors\n  meta: a tensor on the meta device has a shape but no values\n" in str(found)
    assert found.to_json()["unread"][0]["name"] == "meta"


def test_a_lazy_parameter_is_listed_too() -> None:
    found = tp.stats(torch.nn.LazyLinear(3))
    assert found.rows == ()
    assert [each.name for each in found.unread] == ["weight", "bias"]
    assert found.unread[0].reason == "'weight' is lazy: it has no shape or values yet"


def test_a_large_unread_tensor_costs_nothing() -> None:
    found = tp.stats({"huge": torch.empty(1 << 40, device="meta"), "w": torch.ones(2)}, by=["**"])
    assert found["**"].numel == 2


def test_groups_leave_out_what_cannot_be_read() -> None:
    found = tp.stats({"a.w": torch.ones(2), "a.m": torch.empty(3, device="meta"), "b.m": torch.empty(2, device="meta")},
                     by="module")  # fmt: skip
    assert [(row.name, row.tensors, row.numel) for row in found] == [("a", 1, 2), ("b", 0, 0)]


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({"w": np.ones(100, np.float32)}))
    params = tp.of(str(path))
    assert len(params) == 1
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TruncatedFile):
        tp.stats(params)


def test_an_empty_source() -> None:
    found = tp.stats({})
    assert (len(found), found.flags, str(found)) == (0, (), "dict (mapping)\n0 tensors · 0 parameters · 0 B")


def test_progress_reaches_the_end() -> None:
    told: list[tuple[int, int]] = []
    tp.stats({"w": np.ones(10, np.float32)}, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (40, 40)


# --- what is asked for ---------------------------------------------------------------------------


def test_a_selection() -> None:
    weights = {f"layers.{i}.{part}": np.full((2, 2), i, np.float32) for i in range(3) for part in ("weight", "bias")}
    found = tp.stats(weights, "**.bias")
    assert [row.name for row in found] == ["layers.0.bias", "layers.1.bias", "layers.2.bias"]
    assert found.selector == "**.bias"
    assert tp.stats(tp.of(weights).select("**.bias")).rows == found.rows
    with pytest.raises(NoMatch):
        tp.stats(weights, "**.bias | **.gamma")
    assert len(tp.stats(weights, "**.bias | **.gamma", strict=False)) == 3


def test_quantiles_that_are_asked_for_are_shown() -> None:
    values = np.arange(101, dtype=np.int8)
    found = tp.stats({"w": values}, quantiles=[0, 0.005, 0.5, 1])
    assert found["w"].quantiles == ((0.0, 0.0), (0.005, 0.5), (0.5, 50.0), (1.0, 100.0))
    assert str(found).splitlines()[1].split() == (
        ["name", "mean", "std", "min", "max", "0%", "0.5%", "50%", "100%", "zeros", "histogram"]
    )
    assert found.to_json()["rows"][0]["quantiles"] == {"0": 0.0, "0.005": 0.5, "0.5": 50.0, "1": 100.0}
    with pytest.raises(ValueError, match=r"^a quantile must be between 0 and 1, not 1\.5$"):
        tp.stats({"w": values}, quantiles=[1.5])


def test_quantiles_as_text() -> None:
    assert numbers_in("0,.5, 1e0") == [0.0, 0.5, 1.0]
    with pytest.raises(TorchParamsError) as caught:
        numbers_in("0.5,90")
    assert str(caught.value) == "Quantiles must be numbers between 0 and 1, not '90'. Write 0.01,0.5,0.99."


def test_order() -> None:
    found = tp.stats({"a": np.ones(1), "b": np.array([1.0, 2]), "c": np.array([1.0, 5])})
    assert [row.name for row in found.sorted("-std")] == ["c", "b", "a"]
    assert [row.name for row in found.sorted("std")] == ["b", "c", "a"]
    assert tp.stats({"b": np.ones(1), "a": np.ones(1)}, sort="name").rows[0].name == "a"
    with pytest.raises(SelectorError) as caught:
        found.sorted("-size")
    assert str(caught.value) == (
        "No column 'size' to sort by. Columns are name, numel, zeros, nonfinite, min, max, mean, std, l1, l2, linf, "
        "entropy, distinct."
    )


def test_a_row_by_name() -> None:
    found = tp.stats({"fc.weight": np.ones(3)})
    assert found["fc.weight"].numel == 3
    with pytest.raises(UnknownName) as caught:
        found["fc.wieght"]
    assert str(caught.value) == "dict: No parameter is named 'fc.wieght'. Did you mean 'fc.weight'?"
