"""Expressions against numpy: any shape, dtype and block, without reading more than needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_patterns import NUMERIC
from torchparams.dtypes import DType
from torchparams.errors import MismatchError, NotReadable, PlanError
from torchparams.expressions.base import Expression, Stored, Work
from torchparams.expressions.operations import Cast, Concat, Elementwise, Linear, Slice
from torchparams.expressions.work import ThreadWork, block_of, evaluate
from torchparams.sources.safetensors import SafetensorsSource
from torchparams.testing import MemorySource, safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path

    from torchparams.info import Location

Array = np.ndarray[Any, Any]
F32, BF16 = DType.of("float32"), DType.of("bfloat16")


def stored(array: Array) -> Stored:
    return Stored(MemorySource({"w": array}), "w")


def in_file(folder: Path, array: Array) -> Stored:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    path.write_bytes(safetensors_bytes({"before": sample("uint8", (3,)), "w": array}))
    return Stored(SafetensorsSource(str(path)), "w")


def in_blocks(x: Expression, sizes: list[int]) -> Array:
    """The elements, computed in runs of these sizes by turns."""
    with ThreadWork() as work:
        work.begin(x, 16)
        found: list[Array] = []
        start = 0
        while start < x.numel:
            stop = min(start + sizes[len(found) % len(sizes)], x.numel)
            found.append(x.compute(start, stop, work).copy())
            start = stop
    return (np.concatenate(found) if found else np.empty(0, x.dtype.numpy)).reshape(x.shape)


def same(ours: Array, theirs: Array) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.tobytes() == np.ascontiguousarray(theirs).tobytes()


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 12), (3, 0, 4)])
def test_a_stored_tensor_is_itself(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = sample(name, shape)
    same(evaluate(stored(array)), array)
    if DType.of(name).code is None or array.size * DType.of(name).bits % 8:
        return  # safetensors has no such tensor
    x = in_file(tmp_path, array)
    same(evaluate(x), array)
    same(in_blocks(x, [5, 3, 8]), array)


def test_arrays_of_any_layout_are_read_in_order() -> None:
    array = np.arange(60, dtype=np.int32).reshape(5, 12)
    for view in (array.T, array[::2, ::-3], array[:, :1], np.broadcast_to(array[0], (4, 12)), array.astype(">i4")):
        same(in_blocks(stored(view), [7, 2]), np.ascontiguousarray(view).astype("<i4"))


@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_slices(shape: list[int], sizes: list[int], data: st.DataObject) -> None:
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim]))
    stop = data.draw(st.integers(start, shape[dim]))
    x = Slice(stored(array), dim, start, stop)
    same(in_blocks(x, sizes), array[(slice(None),) * dim + (slice(start, stop),)])


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    parts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_joins(shape: list[int], parts: list[int], sizes: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    arrays = []
    for i, size in enumerate(parts):
        part = [*shape[:dim], size, *shape[dim + 1 :]]
        arrays.append(np.arange(np.prod(part), dtype=np.int32).reshape(part) + 1000 * i)
    x = Concat([stored(array) for array in arrays], dim)
    same(in_blocks(x, sizes), np.concatenate(arrays, dim))


def spans_of(x: Expression) -> list[Location]:
    spans = x.spans()
    assert spans is not None
    return spans


@pytest.mark.parametrize("name", ["float32", "float4_e2m1fn", "float6_e2m3fn"])
def test_parts_that_are_runs_of_bytes_are_known_as_such(name: str, tmp_path: Path) -> None:
    array = sample(name, (6, 4, 8))
    x = in_file(tmp_path, array)
    (whole,) = spans_of(x)
    rows = Slice(x, 0, 2, 4)
    (part,) = spans_of(rows)
    row = DType.of(name).nbytes(32)
    assert (part.start, part.stop) == (whole.start + 2 * row, whole.start + 4 * row)
    assert len(spans_of(Concat([rows, x]))) == 2
    assert Slice(Slice(x, 0, 2, 3), 1, 1, 3).spans() is not None
    assert Slice(x, 1, 0, 2).spans() is None
    assert Slice(x, 1, 3, 3).spans() == []
    assert Concat([x, x], 1).spans() is None
    assert Concat([Slice(x, 0, 0, 1), Slice(x, 0, 0, 1)], 1).spans() is not None
    same(evaluate(rows), array[2:4])
    same(evaluate(Slice(x, 2, 1, 4)), array[:, :, 1:4])


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn"])
def test_a_weighted_sum_is_rounded_once(name: str, accumulate: str) -> None:
    numbers = np.random.default_rng(3)
    arrays = [numbers.normal(size=(7, 9)).astype(DType.of(name).numpy) for _ in range(3)]
    before = [array.tobytes() for array in arrays]
    x = Linear([stored(array) for array in arrays], [0.5, 0.25, 0.3], accumulate=accumulate)
    kind = np.dtype(accumulate).type
    total = arrays[0].astype(kind) * kind(0.5)
    total = total + arrays[1].astype(kind) * kind(0.25)
    total = total + arrays[2].astype(kind) * kind(0.3)
    same(evaluate(x), total.astype(DType.of(name).numpy))
    assert [array.tobytes() for array in arrays] == before


def test_a_function_sees_what_it_was_given_whatever_the_operands_share() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    w = stored(array)
    x = Elementwise(lambda a, b: a - b, Slice(w, 0, 2, 4), Slice(w, 0, 0, 2), name="minus")
    same(evaluate(x), array[2:] - array[:2])
    assert x.summary() == "minus(w[2:4], w[0:2])"


def test_operands_in_one_file_are_not_mixed_up(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    w = in_file(tmp_path, array)
    x = Elementwise(np.subtract, Slice(w, 0, 2, 4), Slice(w, 0, 0, 2), dtype=BF16)
    same(in_blocks(x, [5]), (array[2:] - array[:2]).astype(BF16.numpy))


def test_blocks_begin_at_rows_where_they_fit() -> None:
    class Rows(Expression):
        def __init__(self, granule: int) -> None:
            super().__init__((100, 10), F32)
            self.granule = granule
            self.starts: list[int] = []

        def compute(self, start: int, stop: int, work: Work, into: Any = None) -> Array:
            self.starts.append(start)
            return np.arange(start, stop, dtype=np.float32)

        def summary(self) -> str:
            return "rows"

    assert block_of(Rows(12), 64) == 12
    assert block_of(Rows(12), 4 * 30) == 24
    # A granule is a hint: rows that are longer than a block, or that packed elements do not fit, are cut.
    assert block_of(Rows(1 << 20), 64) == 16
    assert block_of(Rows(10), 64) == 16
    x = Rows(1 << 10)
    same(evaluate(x), np.arange(1000, dtype=np.float32).reshape(100, 10))


def test_what_is_prepared_is_prepared_once_and_operands_first() -> None:
    calls = []

    class Scaled(Expression):
        def __init__(self, x: Expression, name: str) -> None:
            super().__init__(x.shape, F32, (x,))
            self.name = name

        def prepare(self, work: Work) -> float:
            calls.append(self.name)
            return float(max(block.max() for block in work.blocks(self.operands[0])))

        def compute(self, start: int, stop: int, work: Work, into: Any = None) -> Array:
            values: Array = self.operands[0].compute(start, stop, work) / work.prepared(self)
            return values.astype(np.float32)

        def summary(self) -> str:
            return self.name

    x = Scaled(Scaled(stored(np.array([1, 2, 4], np.float32)), "inner"), "outer")
    assert x.is_prepared
    assert not stored(np.zeros(1)).is_prepared
    np.testing.assert_array_equal(evaluate(x), np.array([0.25, 0.5, 1], np.float32))
    assert calls == ["inner", "outer"]


def test_a_block_fits_the_memory() -> None:
    x = Linear([stored(np.zeros((1 << 12, 1 << 10), np.float32))] * 4, [1] * 4)
    assert block_of(x, most=1 << 16) * x.footprint <= 1 << 16
    assert block_of(x, most=1) == 4


def message(error: type[Exception], make: Any) -> str:
    with pytest.raises(error) as caught:
        make()
    return str(caught.value)


def test_what_does_not_fit_is_refused_when_it_is_made() -> None:
    a, b = stored(np.zeros((2, 3), np.float32)), stored(np.zeros((3, 2), np.float32))
    i = stored(np.zeros((2, 3), np.int32))
    assert (
        message(PlanError, lambda: Slice(a, 2, 0, 1))
        == "w: Cannot slice 0:1 along dimension 2 of a tensor of shape [2, 3]."[:-1]
    )
    assert (
        message(PlanError, lambda: Slice(a, 1, 1, 4))
        == "w: Cannot slice 1:4 along dimension 1 of a tensor of shape [2, 3]"
    )
    assert message(MismatchError, lambda: Concat([a, b])) == (
        "'w' [2, 3] float32 and 'w' [3, 2] float32 cannot be joined along dimension 0"
    )
    assert message(MismatchError, lambda: Concat([a, i])) == (
        "'w' [2, 3] float32 and 'w' [2, 3] int32 cannot be joined along dimension 0"
    )
    assert message(MismatchError, lambda: Concat([a], 2)) == "'w' of shape [2, 3] has no dimension 2"
    assert message(MismatchError, lambda: Linear([a, b], [1, 1])) == "'w' has shape [2, 3], and 'w' [3, 2]"
    assert message(PlanError, lambda: Linear([i], [1])) == "w: A weighted sum needs floating-point tensors, not int32"
    assert message(PlanError, lambda: Cast(a, DType.of("int8"))) == "w: Dtype float32 cannot be cast to int8"
    assert message(PlanError, lambda: evaluate(Elementwise(np.sum, a))) == (
        "The function 'sum' returned an array of shape [] for 6 elements"
    )
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Linear([a, a], [1])


def test_a_lazy_tensor_has_nothing_to_read() -> None:
    import torch

    from torchparams.sources.opening import open_source

    model = torch.nn.LazyLinear(3)
    assert message(NotReadable, lambda: Stored(open_source(model), "weight")) == (
        "LazyLinear: 'weight' is lazy: it has no shape or values yet"
    )


def test_scratch_is_used_again() -> None:
    parts = [stored(np.arange(8, dtype=np.float32)) for _ in range(3)]
    first, second = (Linear(parts[i : i + 2], [1, 1]) for i in range(2))
    with ThreadWork() as work:
        work.begin(first)
        a = work.scratch(first, 0, 8, np.dtype(np.float32))
        assert np.shares_memory(a, work.scratch(first, 0, 4, np.dtype(np.float32)))
        assert not np.shares_memory(a, work.scratch(first, 1, 8, np.dtype(np.float32)))
        assert not np.shares_memory(a, work.scratch(second, 0, 8, np.dtype(np.float32)))
        work.begin(second)
        assert np.shares_memory(a, work.scratch(second, 0, 16, np.dtype(np.uint8)))
        assert work.scratch(second, 0, 100, np.dtype(np.float64)).shape == (100,)


def test_json_names_the_operations() -> None:
    w = stored(np.zeros((4, 2), np.float32))
    x = Cast(Concat([Slice(w, 0, 0, 2), w]), BF16)
    assert x.summary() == "join(w[0:2], w) as bfloat16"
    leaf = {"operation": "stored", "source": "memory", "name": "w"}
    assert x.to_json() == {
        "operation": "cast",
        "dtype": "bfloat16",
        "operands": [
            {
                "operation": "concat",
                "dim": 0,
                "operands": [
                    {"operation": "slice", "dim": 0, "start": 0, "stop": 2, "operands": [leaf]},
                    leaf,
                ],
            }
        ],
    }
    assert repr(x) == "<Cast [6, 2] bfloat16: join(w[0:2], w) as bfloat16>"
    many = Concat([w] * 5, 1)
    assert many.summary() == "join(w, …, w, dim=1)"
    assert Linear([w] * 4, [1, 2, 3, 4]).summary() == "[1, 2, 3, 4]·w"
    v = Stored(MemorySource({"v": np.zeros((4, 2), np.float32)}), "v")
    assert Linear([w, v], [1, 0.5]).summary() == "1·w + 0.5·v"
