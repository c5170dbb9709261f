"""Many small tensors at once: each number equals that of the sketch of the tensor, bit for bit."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_patterns import EXACT, NUMERIC, WIDE, Array, arrays
from torchparams.dtypes import DType
from torchparams.engines import Job
from torchparams.expressions.base import Stored
from torchparams.measure.columns import Columns
from torchparams.measure.tensor_stats import TensorStats, derive
from torchparams.sketch import Sketch, batch, native
from torchparams.testing import MemorySource

pytestmark = pytest.mark.skipif(not batch.takes(DType.of("float32"), 1), reason="the kernel is not in use")

QUANTILES = (0.0, 0.01, 0.25, 1 / 3, 0.5, 0.9, 0.99, 1.0)
TYPES = [name for name in NUMERIC if batch.takes(DType.of(name), 1)]


def exactly(row: TensorStats) -> list[object]:
    """A row, with floats as their bits and types told apart."""

    def bits(value: Any) -> object:
        if isinstance(value, float):
            return "nan" if math.isnan(value) else struct.pack("<d", value)
        return tuple(map(bits, value)) if isinstance(value, tuple) else (type(value), value)

    return list(map(bits, row))


def check(arrays: list[Array], shift: int = 0) -> None:
    """The rows of arrays of one dtype that are measured at once, against those of their sketches."""
    dtype = DType.of(arrays[0].dtype)
    source = MemorySource({str(i): array for i, array in enumerate(arrays)})
    jobs = [Job(str(i), (Stored(source, str(i)),)) for i in range(len(arrays))]
    data, starts = b"x" * shift, []
    for array in arrays:
        starts.append(len(data))
        data += array.tobytes()
    numels = [array.size for array in arrays]
    rows = Columns(jobs, batch.measure(dtype, data, starts, numels, QUANTILES), QUANTILES).rows(range(len(arrays)))
    for row, array in zip(rows, arrays, strict=True):
        expected = derive(Sketch.of(array), QUANTILES, name=row.name, numel=array.size, shape=array.shape, dtype=dtype)
        assert exactly(row) == exactly(expected), array


@pytest.mark.parametrize("name", TYPES)
@given(data=st.data())
@settings(max_examples=40)
def test_rows_are_those_of_the_sketches(name: str, data: st.DataObject) -> None:
    check(data.draw(st.lists(arrays(name), min_size=1, max_size=4)), shift=data.draw(st.integers(0, 3)))


@pytest.mark.parametrize("name", TYPES)
def test_many_values_of_all_kinds(name: str) -> None:
    numbers = np.random.default_rng(0)
    dtype = DType.of(name)
    found = [np.frombuffer(numbers.bytes(dtype.itemsize * n), dtype.numpy) for n in (0, 1, 2, 3, 777)]
    with np.errstate(all="ignore"):
        if dtype.kind != "complex":
            found += [(numbers.standard_normal(1000) * scale).astype(dtype.numpy) for scale in (1e-3, 1.0, 100.0)]
            found.append(np.zeros(500, dtype.numpy))
            found.append(np.full(batch.MOST, 3).astype(dtype.numpy))
            found.append(np.where(numbers.random(300) < 0.5, 0, numbers.standard_normal(300)).astype(dtype.numpy))
    check(found)
    check(found[::-1], shift=1)


def test_the_ends_of_wide_types() -> None:
    tiny, huge = 5e-324, 1.7976931348623157e308
    check(
        [np.array(v) for v in ([tiny], [tiny, -tiny], [huge] * 3, [huge, -huge], [huge, tiny, -0.0], [-tiny, 0, 0, 0])]
    )
    check([np.array([huge, huge, np.inf, -np.inf, np.nan, 1.0]), np.array([np.nan]), np.array([-np.inf, -0.0])])
    for name in ("int64", "int32"):
        ends = np.iinfo(name)
        check([np.array(v, name) for v in ([ends.min], [ends.max], [ends.min] * 40 + [ends.max] * 40, [])])
    for name in ("uint64", "uint32"):
        check([np.array(v, name) for v in ([np.iinfo(name).max] * 1000, [0], [])])


def test_cancellation_is_exact() -> None:
    big = np.float32(2.0**127)
    check([np.array([big, 1e-45, -big, 1e-45], np.float32), np.array([1e8, 1, -1e8] * 99, np.float32)])
    check([np.array([2.0**1000, 1.0, -(2.0**1000)] * 50), np.array([1e16, 1.0, 1.0, -1e16])])
    check([np.full(1 << 12, 0.1, np.float32), np.full(1 << 12, 1e-42, np.float32)])


def test_what_is_taken() -> None:
    f32, complex64 = DType.of("float32"), DType.of("complex64")
    assert batch.takes(f32, batch.MOST)
    assert not batch.takes(f32, batch.MOST + 1)
    assert batch.takes(complex64, batch.MOST // 2)
    assert not batch.takes(complex64, batch.MOST // 2 + 1)
    for name in ("float4_e2m1fn", "float6_e2m3fn", "int4", "quint8"):
        assert not batch.takes(DType.of(name), 2)
    assert {*EXACT, *WIDE} >= set(TYPES) - {"complex64", "complex128", "complex32"}


def test_nothing_is_taken_where_the_definition_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WANTED", "numpy")
    assert not batch.takes(DType.of("float32"), 1)


def test_what_lies_outside_the_buffer_is_refused() -> None:
    f32 = DType.of("float32")
    data = bytes(16)
    assert batch.measure(f32, data, [8], [2], ()).integers[0, 0] == 2
    for start, numel in ((12, 2), (17, 0), (1 << 63, 1), (0, 5)):
        with pytest.raises(ValueError, match="ends behind the data"):
            batch.measure(f32, data, [start], [numel], ())
    with pytest.raises(ValueError, match="too many values"):
        batch.measure(f32, bytes(4 << 17), [0], [1 << 17], ())
