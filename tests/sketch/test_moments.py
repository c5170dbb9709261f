"""Sums of many tensors in memory: the kernel against its definition, and both against numpy and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchparams.dtypes import DType
from torchparams.sketch import _moments, moments
from torchparams.sketch.moments import EXPONENTS, KINDS, PIECE, Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]


def dtype_of(kind: str) -> Any:
    return ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)


def _cast(values: Array, kind: str) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(dtype_of(kind))


def tensors(kind: str, numels: Sequence[int], seed: int = 0) -> list[Array]:
    """Values of all sizes, with zeros, subnormal values, infinities and NaN among them."""
    random = np.random.default_rng(seed)
    found = []
    for numel in numels:
        values = random.standard_normal(numel) * 10.0 ** random.integers(-12, 9, numel)
        values[random.random(numel) < 0.1] = 0
        values[random.random(numel) < 0.05] = -0.0
        if seed % 2:
            values[random.random(numel) < 0.1] = random.choice([np.nan, np.inf, -np.inf])
        limit = 60_000 if kind == "float16" else np.inf
        found.append(np.clip(values, -limit, limit).astype(dtype_of(kind)) if not seed % 2 else _cast(values, kind))
    return found


def layout(kind: str, arrays: Sequence[Array]) -> tuple[Layout, list[int]]:
    return Layout(DType.of(kind), [array.size for array in arrays]), [array.ctypes.data for array in arrays]


@pytest.fixture(params=["c", "numpy"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(moments, "uses_c", lambda: False)
    else:
        assert moments.uses_c()  # where the suite runs, there is a compiler
    return str(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.usefixtures("kernels")
def test_every_number_is_that_of_numpy(kind: str, seed: int) -> None:
    arrays = tensors(kind, [0, 1, 15, 16, 17, 2047, 2048, 2049, PIECE + 3], seed)
    found, at = layout(kind, arrays)
    got = found.measure(at, exponents=True)
    for i, array in enumerate(arrays):
        wide = array.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        assert got.counts[i] == array.size
        assert got.zeros[i] == (wide == 0).sum()
        assert got.nonfinite[i] == array.size - len(finite)
        assert got.most[i] == np.abs(finite).max(initial=0)
        np.testing.assert_allclose(got.sums[i], finite.sum(), rtol=1e-9, atol=1e-12 * np.abs(finite).sum())
        np.testing.assert_allclose(got.squares[i], np.square(finite).sum(), rtol=1e-12)
        assert got.exponents is not None
        assert got.exponents[i].sum() == array.size
        for e in range(1, EXPONENTS - 1):
            low, high = 2.0 ** (e - 127), 2.0 ** (e - 126) if e < EXPONENTS - 2 else np.inf
            assert got.exponents[i][e] == ((np.abs(finite) >= low) & (np.abs(finite) < high)).sum()
    assert found.nonfinite(at).tolist() == got.nonfinite.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("kernels")
def test_distance(kind: str) -> None:
    numels = [0, 1, 100, PIECE + 1]
    a, b = tensors(kind, numels, 0), tensors(kind, numels, 2)
    found, at = layout(kind, a)
    _, to = layout(kind, b)
    got = found.distance(at, to)
    for i in range(len(numels)):
        apart = a[i].astype(np.float64) - b[i].astype(np.float64)
        np.testing.assert_allclose(got[i, 0], np.square(apart).sum(), rtol=1e-12)
        np.testing.assert_allclose(got[i, 1], np.square(b[i].astype(np.float64)).sum(), rtol=1e-12)
    assert found.distance(at, at)[:, 0].tolist() == [0.0] * len(numels)
    b[2][50] = np.nan
    assert np.isnan(found.distance(at, to)[2]).all()


@given(
    st.sampled_from(KINDS), st.lists(st.integers(0, 5000), max_size=8), st.integers(0, 50), st.booleans(), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_the_kernel_is_its_definition(kind: str, numels: list[int], seed: int, exponents: bool, best: bool) -> None:
    if not moments.BUILT:
        return
    arrays = tensors(kind, numels, seed)
    found, at = layout(kind, arrays)
    places, counts = found._places(at), found._counts
    rows = len(places)
    ours = [np.empty((rows, 3)), np.empty((rows, 2), np.int64), np.empty((rows, EXPONENTS), np.int64)]
    theirs = [np.empty_like(each) for each in ours]
    _moments.use(int(best))
    try:
        _moments.measure(found.kind, places, counts, ours[0], ours[1], ours[2] if exponents else None)
    finally:
        _moments.use(1)
    moments.numpy_measure(found.kind, places, counts, theirs[0], theirs[1], theirs[2])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-9, atol=1e-300 + 1e-9 * np.abs(theirs[0]).max(initial=0))
    assert (ours[0][:, 2] == theirs[0][:, 2]).all()
    assert (ours[1] == theirs[1]).all()
    if exponents:
        assert (ours[2] == theirs[2]).all()


def test_work_is_shared_and_every_element_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "processors", lambda: 3)
    arrays = tensors("float32", [10, 12 * PIECE + 5, 70_000, 1, 0, 200_000])
    found, at = layout("float32", arrays)
    assert len(found._parts) == 3
    got = found.measure(at)
    assert got.counts.tolist() == [array.size for array in arrays]
    assert got.zeros.tolist() == [int((array == 0).sum()) for array in arrays]


def test_a_few_numbers_start_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("started a thread")

    monkeypatch.setattr(moments, "results_of", refuse)
    found, at = layout("float32", tensors("float32", [256] * 100))
    assert len(found.measure(at).sums) == 100
