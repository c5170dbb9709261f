"""Singular values, norms and ranks, against numpy's decomposition and the published definitions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchparams as tp
from command import command
from torchparams.engines.threads import ThreadEngine
from torchparams.errors import NoMatch, SelectorError, UnknownName
from torchparams.measure import lanczos, singular

if TYPE_CHECKING:
    from pathlib import Path

    from torchparams.measure.spectra_tree import Spectrum

Array = np.ndarray[Any, Any]


def matrix(rows: int, columns: int, seed: int = 0, decay: float = 0.0) -> Array:
    values = np.random.default_rng(seed).standard_normal((rows, columns))
    return values * np.arange(1, columns + 1) ** -decay


def svd(values: Array) -> Array:
    return np.linalg.svd(values.astype(np.float64), compute_uv=False)


def values_of(row: Spectrum) -> Array:
    assert row.singular_values is not None
    return np.array(row.singular_values)


SHAPES = [(1, 1), (1, 7), (7, 1), (64, 64), (60, 200), (200, 60), (600, 150), (150, 600)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_singular_values_are_those_of_numpy(shape: tuple[int, int], dtype: Any) -> None:
    values = matrix(*shape).astype(dtype)
    (row,) = tp.spectra({"w": values})
    np.testing.assert_allclose(values_of(row), svd(values), rtol=1e-6)
    assert row.shape == shape


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 100), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_figures_are_their_definitions(rows: int, columns: int, seed: int, decay: float) -> None:
    values = matrix(rows, columns, seed, decay)
    found = svd(values)
    (row,) = tp.spectra({"w": values})
    shares = found / found.sum()
    assert row.spectral_norm == pytest.approx(np.linalg.norm(values, 2), rel=1e-6)
    assert row.nuclear_norm == pytest.approx(np.linalg.norm(values, "nuc"), rel=1e-6)
    assert row.stable_rank == pytest.approx(np.linalg.norm(values) ** 2 / np.linalg.norm(values, 2) ** 2, rel=1e-6)
    assert row.effective_rank == pytest.approx(math.exp(-np.sum(shares * np.log(shares))), rel=1e-6)
    assert row.edge == pytest.approx(math.sqrt(np.mean(values**2)) * (math.sqrt(rows) + math.sqrt(columns)))
    assert row.spikes == (found > row.edge).sum()
    if found[-1] > 2e-5 * found[0]:
        assert row.condition == pytest.approx(np.linalg.cond(values), rel=1e-3)
        assert not row.is_bound


def test_condition_of_a_matrix_of_low_rank_is_a_lower_bound() -> None:
    values = matrix(50, 3) @ matrix(3, 40, 1)
    (row,) = tp.spectra({"w": values})
    assert (row.rank, row.is_bound) == (3, True)
    assert row.condition == pytest.approx(1e5)
    assert "> 1e5" in str(tp.spectra({"w": values}))


def test_rank_of_a_difference_is_that_of_its_adapter() -> None:
    base = matrix(60, 80).astype(np.float32)
    tuned = base + (matrix(60, 4, 1) @ matrix(4, 80, 2)).astype(np.float32)
    (row,) = tp.spectra(tp.merge([{"w": tuned}, {"w": base}], weights=[1, -1], dtype="f32"))
    values = np.array(row.singular_values)
    assert (values > 1e-4 * values[0]).sum() == 4


def test_zeros_have_no_rank() -> None:
    (row,) = tp.spectra({"w": np.zeros((3, 4), np.float32)})
    assert (row.spectral_norm, row.nuclear_norm, row.stable_rank, row.effective_rank, row.rank) == (0, 0, 0, 0, 0)
    assert row.condition == math.inf
    assert tp.spectra({"w": np.zeros((3, 4))}).to_json()["rows"][0]["condition"] == "inf"


def plain_tail(values: Array) -> tuple[float, float]:
    """Clauset's fit in the plainest form."""
    best = (math.inf, 0.0)
    data = np.sort(values)
    for i in range(len(data) - 1):
        tail = data[i:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        distance = np.abs(1 - (tail / tail[0]) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
        best = min(best, (distance, alpha))
    return best[1], best[0]


def test_tail_is_the_fit_of_clauset_shalizi_and_newman() -> None:
    values = np.random.default_rng(0).pareto(1.5, 400) + 1
    alpha, distance = singular.tail(np.sort(values))
    assert (alpha, distance) == pytest.approx(plain_tail(values))
    # What powerlaw 2.0 gives for the eigenvalues of this matrix: alpha 3.93587530596 at a distance of 0.13915751350.
    (row,) = tp.spectra({"w": np.random.default_rng(0).standard_normal((300, 500))})
    assert (row.tail_exponent, row.tail_distance) == pytest.approx((3.93587530596, 0.13915751350))


def test_few_singular_values_have_no_tail() -> None:
    (row,) = tp.spectra({"w": matrix(49, 80)})
    assert (row.tail_exponent, row.tail_distance) == (None, None)


def test_a_random_matrix_stays_below_the_edge_and_a_spike_stands_above_it() -> None:
    noise = matrix(200, 300)
    (row,) = tp.spectra({"w": noise})
    assert row.spectral_norm == pytest.approx(row.edge, rel=0.05)
    spiked = noise + 4 * np.outer(matrix(200, 1, 1), matrix(1, 300, 2))
    assert tp.spectra({"w": spiked})["w"].spikes == 1


def test_kernels_are_flattened_and_vectors_left_out() -> None:
    conv = nn.Conv2d(3, 8, 5)
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.Linear(8, 4))
    found = tp.spectra(model)
    assert [(row.name, row.shape) for row in found] == [("0.weight", (8, 75)), ("2.weight", (4, 8))]
    weight = conv.weight.detach().numpy().reshape(8, 75)
    np.testing.assert_allclose(values_of(found["0.weight"]), svd(weight), rtol=1e-6)
    assert found.others == 4
    assert "2 matrices · 4 vectors and scalars left out" in str(found)


@pytest.mark.parametrize("shape", [(3, 10, 20), (2, 2, 20, 10), (1, 5, 5)])
def test_stacks_have_a_row_a_matrix(shape: tuple[int, ...]) -> None:
    values = matrix(math.prod(shape[:-1]), shape[-1]).reshape(shape).astype(np.float32)
    found = tp.spectra({"experts": values, "w": values[(0,) * (len(shape) - 2)]}, stacked="experts")
    flat = values.reshape(-1, *shape[-2:])
    assert [row.name for row in found] == [f"experts[{i}]" for i in range(len(flat))] + ["w"]
    for i, each in enumerate(flat):
        np.testing.assert_allclose(values_of(found[f"experts[{i}]"]), svd(each), rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_estimates_are_within_their_errors(shape: tuple[int, int], decay: float) -> None:
    values = matrix(*shape, decay=decay)
    exact, estimated = tp.spectra({"w": values})["w"], tp.spectra({"w": values}, exact=10)["w"]
    assert exact.errors == {} and estimated.singular_values is None
    for key, error in estimated.errors.items():
        slack = 1e-9 * getattr(exact, key)
        times = 1 if key in ("spectral_norm", "stable_rank") else 5  # bounds, and standard errors
        assert abs(getattr(estimated, key) - getattr(exact, key)) <= times * error + slack, key
    assert estimated.spectral_norm == pytest.approx(exact.spectral_norm, rel=1e-4)
    assert (estimated.condition, estimated.tail_exponent, estimated.rank, estimated.spikes) == (None,) * 4
    assert estimated.edge == pytest.approx(exact.edge)


def test_passes_of_an_estimate_are_bounded() -> None:
    values = matrix(300, 400)
    passes = 0

    def multiply(vectors: Array) -> tuple[Array, float]:
        nonlocal passes
        passes += 1
        return values.T @ (values @ vectors), float((values**2).sum())

    lanczos.estimate(multiply, values.shape)
    assert passes <= lanczos.STEPS


def test_memory_of_an_estimate_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    made = singular.Rows.__init__

    def init(self: singular.Rows, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        made(self, shape, dtype)
        held.append(self._tile.size)

    monkeypatch.setattr(singular.Rows, "__init__", init)
    tp.spectra({"w": np.zeros((200_000, 20), np.float32)}, exact=5)
    assert held and max(held) <= singular.TILE


def test_what_has_no_spectrum_is_named() -> None:
    found = tp.spectra(
        {
            "codes": np.ones((2, 2), np.int8),
            "complex": np.ones((2, 2), np.complex64),
            "infinite": np.array([[1, np.inf]], np.float32),
            "nan": np.full((2, 2), np.nan),
            "huge": np.full((2, 2), 1e200),
            "empty": np.zeros((0, 3), np.float32),
            "meta": torch.empty(2, 2, device="meta"),
            "fine": np.ones((2, 2), np.float32),
        }
    )
    assert [row.name for row in found] == ["fine"]
    reasons = {each.name: each.reason for each in found.unread}
    assert set(reasons) == {"codes", "complex", "infinite", "nan", "huge", "empty", "meta"}
    assert reasons["codes"] == "has the dtype int8: only floating-point tensors have a spectrum"
    assert reasons["nan"] == reasons["infinite"] == reasons["huge"]
    assert "not measured: 7 tensors" in str(found)
    assert [each.name for each in tp.spectra({"nan": np.full((9, 9), np.nan)}, exact=3).unread] == ["nan"]


def test_codes_beside_an_unknown_scale_are_refused() -> None:
    codes = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    weights = {"w": codes, "w_scale": np.ones((3, 3), np.float32)}
    for selector in (None, "w"):
        assert "w" in {each.name for each in tp.spectra(weights, selector).unread}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads: int) -> None:
    weights = {f"w{i}": matrix(100, 120, i).astype(np.float32) for i in range(5)}
    assert tp.spectra(weights, engine=ThreadEngine(threads)).rows == tp.spectra(weights).rows


def test_order_and_look_up() -> None:
    found = tp.spectra({"a": np.eye(3), "b": 2 * np.eye(2), "big": matrix(60, 60)}, sort="-spectral_norm")
    assert [row.name for row in found] == ["big", "b", "a"]
    assert [row.name for row in found.sorted("-tail_exponent")] == ["big", "b", "a"]  # those without one come last
    assert found["a"].spectral_norm == 1
    with pytest.raises(UnknownName):
        found["c"]
    with pytest.raises(SelectorError):
        tp.spectra({"a": np.eye(3)}, sort="size")
    with pytest.raises(NoMatch):
        tp.spectra({"a": np.eye(3)}, "c")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "m.safetensors"
    save_file({"fc.weight": matrix(60, 80).astype(np.float32), "fc.bias": np.ones(60, np.float32)}, file)
    shown = command(capsys, "spectra", file)
    assert (shown.status, shown.err) == (0, "")
    assert "fc.weight  60×80" in shown.out
    form = command(capsys, "spectra", file, "--json").json
    assert form["rows"][0]["singular_values"] == list(tp.spectra(file)["fc.weight"].singular_values or ())
    assert form["others"] == 1
    assert command(capsys, "spectra", file, "-s", "nothing").status == 2
