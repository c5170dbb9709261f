"""The shape of a distribution, against its definition over the values themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from torchparams.dtypes import DType
from torchparams.sketch import Sketch
from torchparams.sketch.shape import kurtosis, octaves

HALF = arrays.arrays(np.float16, st.integers(0, 200), elements=st.floats(width=16, allow_nan=True, allow_infinity=True))
WIDE = arrays.arrays(np.float32, st.integers(0, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def by_definition(values: np.ndarray[Any, Any]) -> float:
    values = values[np.isfinite(values)].astype(np.longdouble)
    centred = values - values.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2 - 3)


@settings(deadline=None)
@given(HALF)
def test_kurtosis_of_an_exact_type(values: np.ndarray[Any, Any]) -> None:
    sketch = Sketch.of(values)
    finite = values[np.isfinite(values)]
    if len(np.unique(finite)) < 2:
        assert np.isnan(kurtosis(sketch))
    else:
        assert kurtosis(sketch) == pytest.approx(by_definition(values), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int32", "int8"])
def test_kurtosis_of_heavy_tails(dtype: str) -> None:
    values = (np.random.default_rng(0).standard_t(5, 100_000) * 10).astype(DType.of(dtype).numpy)
    expected = by_definition(values.astype(np.float64))
    assert expected > 1
    assert kurtosis(Sketch.of(values)) == pytest.approx(expected, rel=0.02)


@settings(deadline=None)
@given(HALF | WIDE)
def test_octaves_count_every_value_but_zero(values: np.ndarray[Any, Any]) -> None:
    found = octaves(Sketch.of(values))
    finite = values[np.isfinite(values) & (abs(values.astype(np.float64)) >= 2.0**-133)].astype(np.float64)
    for i, (negative, positive) in enumerate(zip(found.negative, found.positive, strict=True)):
        low, high = 2.0 ** (found.first + i), 2.0 ** (found.first + i + 1)
        assert positive == ((finite >= low) & (finite < high)).sum()
        assert negative == ((-finite >= low) & (-finite < high)).sum()
    assert found.negative.sum() + found.positive.sum() == len(finite)
    if len(found.negative):  # no empty interval at either end
        assert found.negative[0] + found.positive[0]
        assert found.negative[-1] + found.positive[-1]
