"""The sketch, compared with numpy and torch, and its invariants."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_patterns import EXACT, NUMERIC, WIDE, Array, array_of_bits, arrays, long_arrays
from torchparams.dtypes import DType
from torchparams.errors import FileFormatError, MismatchError, NotReadable
from torchparams.sketch import Builder, Sketch, native

QUANTILES = [0.0, 0.01, 0.25, 1 / 3, 0.5, 0.9, 0.999, 1.0]
laws = settings(max_examples=20)


@pytest.fixture(params=("numpy", "c") if native.BUILT else ("numpy",))
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with each of the implementations; that their counts are equal is tested with the kernels."""
    monkeypatch.setattr(native, "WANTED", request.param)


def values_of(array: Array) -> Array:
    """The values that are counted, as float64 (or Python integers)."""
    dtype = DType.of(array.dtype)
    if dtype.kind == "complex":
        array = array.view("float32" if dtype == "complex64" else "float64")
    if array.dtype.kind in "iub":
        return np.array([int(v) for v in array.tolist()], object)
    with np.errstate(invalid="ignore"):
        wide: Array = array.astype(np.float64)
    return wide


def check(array: Array) -> None:
    """Every number of a sketch, against its definition on the values."""
    sketch = Sketch.of(array)
    name = str(sketch.dtype)
    every = values_of(array.reshape(-1))
    as_float = every.astype(np.float64)
    finite = every[np.isfinite(as_float)]
    fractions = [Fraction(v) for v in finite.tolist()]
    n = len(finite)

    assert sketch.numel == array.size
    assert sketch.finite == n
    assert sketch.zeros == sum(v == 0 for v in fractions)
    assert sketch.nan == np.isnan(as_float).sum()
    assert (sketch.posinf, sketch.neginf) == ((as_float == np.inf).sum(), (as_float == -np.inf).sum())

    numbers = every[~np.isnan(as_float)]
    if len(numbers):
        assert (sketch.min, sketch.max) == (numbers.min(), numbers.max())
    else:
        assert math.isnan(sketch.min) and math.isnan(sketch.max)
    assert sketch.finite_range == ((finite.min(), finite.max()) if n else None)

    total, square = sum(fractions), sum(v * v for v in fractions)
    assert sketch.l1 == _float(sum(map(abs, fractions), Fraction(0)))
    assert sketch.linf == max(map(abs, fractions), default=0)
    assert _near(sketch.l2, Fraction(square))
    if n:
        assert sketch.mean == _float(Fraction(total, n))
    else:
        assert math.isnan(sketch.mean)
    for correction in (0, 1):
        if n > correction:
            assert _near(sketch.std(correction), (square - Fraction(total) ** 2 / n) / (n - correction))
        else:
            assert math.isnan(sketch.std(correction))

    distinct = len(set(fractions)) + sum(int(c) > 0 for c in (sketch.nan, sketch.posinf, sketch.neginf))
    assert sketch.distinct == distinct if name in EXACT else sketch.distinct <= distinct
    equal = len(every) > 0 and len({str(v + 0) for v in every.tolist()}) == 1 and not sketch.nan
    assert sketch.constant == equal
    if name in EXACT and sketch.dtype.kind == "float":
        assert sketch.saturated == sum(abs(v) == np.float64(_largest(name)) for v in finite.tolist())
    else:
        assert sketch.saturated is None

    _check_quantiles(sketch, finite, exact=name in EXACT)
    _check_entropy(sketch, array)
    repr(sketch)


def _float(value: Fraction) -> float:
    try:
        return value.numerator / value.denominator
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _near(root: float, square: Fraction) -> bool:
    """Whether `root` is within one unit in the last place of the square root."""
    if math.isinf(root):
        return square > Fraction(np.finfo(np.float64).max) ** 2
    low, high = math.nextafter(root, -1), math.nextafter(root, math.inf)
    return Fraction(max(low, 0.0)) ** 2 <= square and (math.isinf(high) or square <= Fraction(high) ** 2)


def _largest(name: str) -> float:
    return (
        float(torch.finfo(DType.of(name).torch).max)
        if hasattr(torch, name)
        else {"4": 6.0}.get(name[5], 0.0) or _six(name)
    )


def _six(name: str) -> float:
    return {"float6_e2m3fn": 7.5, "float6_e3m2fn": 28.0}[name]


def _check_quantiles(sketch: Sketch, finite: Array, *, exact: bool) -> None:
    found = sketch.quantile(QUANTILES)
    assert repr(found) == repr([sketch.quantile(q) for q in QUANTILES])
    if not len(finite):
        assert all(map(math.isnan, found))
        return
    ordered = np.sort(finite.astype(np.float64))
    assert found[0] == ordered[0] and found[-1] == ordered[-1]
    for q, value in zip(QUANTILES, found, strict=True):
        place = q * (len(ordered) - 1)
        low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
        t = place - int(place)
        expected = low if low == high or t == 0 else low * (1 - t) + high * t
        if exact:
            assert value == expected
        else:
            # a relative 2^-8 of each neighbour; and what float64 rounds, or subnormal numbers lack
            slack = (abs(low) * (1 - t) + abs(high) * t) * (2.0**-8 + 1e-12)
            assert abs(value - expected) <= slack + (2.0**-133 if sketch.dtype != "float64" else 2.0**-1029)


def _check_entropy(sketch: Sketch, array: Array) -> None:
    if str(sketch.dtype) in EXACT:
        _, counts = np.unique(array.view(f"u{array.itemsize}"), return_counts=True)
        p = counts / max(array.size, 1)
        assert sketch.entropy == pytest.approx(float(-(p * np.log2(p)).sum()), abs=1e-12)
    assert 0 <= sketch.entropy <= math.log2(max(sketch._total, 1)) + 1e-9


@pytest.mark.parametrize("name", NUMERIC)
@laws
@given(data=st.data())
def test_every_number_of_short_arrays(name: str, data: st.DataObject) -> None:
    check(data.draw(arrays(name)))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("name", ["float8_e4m3fn", "bfloat16", "float16", "float32", "float64", "int32", "uint64"])
def test_every_number_of_long_arrays(name: str) -> None:
    for array in long_arrays(name).values():
        check(array[7500:9500])


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_against_torch(name: str) -> None:
    array = long_arrays(name)["normal"]
    tensor = torch.from_numpy(array.astype(np.float64))
    sketch = Sketch.of(array)
    assert sketch.mean == pytest.approx(tensor.mean().item(), rel=1e-9, abs=1e-15)
    assert sketch.std() == pytest.approx(tensor.std().item(), rel=1e-12)
    assert sketch.std(0) == pytest.approx(tensor.std(correction=0).item(), rel=1e-12)
    for mine, order in ((sketch.l1, 1), (sketch.l2, 2), (sketch.linf, math.inf)):
        assert mine == pytest.approx(torch.linalg.vector_norm(tensor, order).item(), rel=1e-12)
    wanted = torch.quantile(tensor, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    assert sketch.quantile(QUANTILES) == pytest.approx(wanted, rel=2**-8 + 1e-9, abs=1e-6)


def test_the_variance_does_not_cancel() -> None:
    array = (1e6 + np.arange(4096) % 2).astype(np.float32)
    assert Sketch.of(array).std(0) == 0.5
    assert Sketch.of(np.array([1e300, -1e300, 1e-300])).std(0) == pytest.approx(math.sqrt(2 / 3) * 1e300, rel=1e-15)
    assert Sketch.of(np.array([1e300, 1.0, -1e300])).mean == 1 / 3


def test_sums_beyond_float64_are_infinite_and_their_means_are_not() -> None:
    sketch = Sketch.of(np.full(4, 1.7e308))
    assert sketch.l1 == sketch.l2 == math.inf
    assert sketch.mean == 1.7e308 and sketch.std() == 0


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMERIC)
@laws
@given(data=st.data())
def test_sketches_add(name: str, data: st.DataObject) -> None:
    x, y, z = (data.draw(arrays(name, 12)) for _ in range(3))
    a, b, c = map(Sketch.of, (x, y, z))
    nothing = Sketch.empty(name)
    assert a + nothing == nothing + a == a
    assert a + b == b + a
    assert (a + b) + c == a + (b + c) == Sketch.merge([c, a, b])
    assert a + b == Sketch.of(np.concatenate([x.view(np.uint8), y.view(np.uint8)]).view(x.dtype))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("name", ["uint8", "bfloat16", "float32", "float64", "int64", "complex64"])
def test_cuts_do_not_show(name: str) -> None:
    source = "float32" if name == "complex64" else name
    for array in long_arrays(source).values():
        array = array[: len(array) // 2 * 2].view(DType.of(name).numpy)
        whole = Sketch.of(array)
        for cuts in ([1], [8192], [5, 4097, 4098, 16_000 // 2], list(range(0, len(array), 997))):
            edges = [0, *[cut for cut in cuts if cut < len(array)], len(array)]
            parts = [Sketch.of(array[a:b]) for a, b in itertools.pairwise(edges)]
            assert Sketch.merge(parts) == whole
            builder = Builder(name)
            for a, b in itertools.pairwise(edges):
                builder.update(array[a:b])
            assert builder.finish() == whole


@pytest.mark.usefixtures("either")
def test_counts_grow_beyond_32_bits_and_stay_exact() -> None:
    sketch = Sketch.of(np.array([1.5, 1.5, -3.0], np.float16))
    for _ in range(60):
        sketch = sketch + sketch
    assert sketch.numel == 3 << 60
    assert (sketch.mean, sketch.std(0), str(sketch.counts.dtype)) == (0.0, math.sqrt(4.5), "uint64")
    assert sketch == Sketch.from_json(json.loads(json.dumps(sketch.to_json())))


def test_different_arrays_have_different_sketches() -> None:
    one = np.ones(4, np.float32)
    others = [one[:3], np.nextafter(one, 2), one.astype(np.float64), np.array([1, 1, 1, -1], np.float32)]
    assert all(Sketch.of(one) != Sketch.of(other) for other in others)
    assert Sketch.of(one) != "a sketch"


def test_sketches_of_different_types_do_not_add() -> None:
    a, b = Sketch.empty("float16"), Sketch.empty("bfloat16")
    with pytest.raises(MismatchError) as caught:
        a + b
    assert str(caught.value) == (
        'Cannot add a sketch of bfloat16 to one of float16. Merge them as Sketch.merge(sketches, "float64").'
    )
    with pytest.raises(MismatchError, match="No sketches to merge"):
        Sketch.merge([])
    assert Sketch.merge([], "int8") == Sketch.empty("int8")
    with pytest.raises(TypeError):
        _ = a + 1


@pytest.mark.parametrize("name", NUMERIC)
@laws
@given(data=st.data())
def test_widened_sketches_of_any_types_add(name: str, data: st.DataObject) -> None:
    array = data.draw(arrays(name))
    sketch = Sketch.of(array)
    wide = sketch.widen()
    assert wide.dtype == "float64" and wide.widen() is wide
    for what in ("finite", "zeros", "nan", "posinf", "neginf", "l1", "l2", "linf"):
        assert getattr(wide, what) == float(getattr(sketch, what)), what
    assert wide.mean == sketch.mean or math.isnan(sketch.mean)
    if DType.of(name).kind == "float":
        exact = Sketch.of(values_of(array))
        assert wide.finite_range == exact.finite_range and wide.sums == exact.sums
    if sketch.finite:
        low, high = wide.finite_range or (0, 0)
        for q in (0.1, 0.5):
            bound = abs(sketch.quantile(q)) * 2**-7 + 2.0**-133
            assert low <= wide.quantile(q) <= high
            if sketch.finite % 2 and q == 0.5:
                assert abs(wide.quantile(q) - sketch.quantile(q)) <= bound
    assert Sketch.merge([sketch, Sketch.of(np.array([1.0]))], "float64").finite == sketch.finite + 1


# --- of what -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("name", ["bfloat16", "float32", "int64"])
def test_arrays_of_any_layout(name: str) -> None:
    array = long_arrays(name)["scaled"][:19_998].reshape(6, 11, 303)
    whole = Sketch.of(array)
    layouts = [array.T, np.asfortranarray(array), array[::-1, :, ::-1], array.transpose(1, 0, 2)]
    assert all(Sketch.of(view) == whole for view in layouts)
    assert Sketch.of(array[0, 0, 0:1].reshape(())).numel == 1
    assert Sketch.of(np.broadcast_to(array[:1, :1, :1], (3, 5, 7))).constant
    assert Sketch.of(array[:0]) == Sketch.empty(name)
    if name != "bfloat16":
        assert Sketch.of(array.astype(array.dtype.newbyteorder(">"))) == whole


def test_complex_elements_are_two_values_each() -> None:
    sketch = Sketch.of(np.array([3 - 4j, 0 + 1j], np.complex64))
    assert (sketch.numel, sketch.zeros, sketch.min, sketch.max, sketch.l1) == (2, 1, -4.0, 3.0, 8.0)
    assert Sketch.of_bytes(np.array([1, 2], np.float16).tobytes(), "complex32").numel == 1


def test_any_byte_but_0_is_true() -> None:
    assert Sketch.of_bytes(bytes([0, 1, 2, 255]), "bool") == Sketch.of(np.array([False, True, True, True]))


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"])
@laws
@given(data=st.data())
def test_packed_elements(name: str, data: st.DataObject) -> None:
    dtype = DType.of(name)
    patterns = data.draw(st.lists(st.integers(0, (1 << dtype.bits) - 1), max_size=30))
    whole = sum(p << (dtype.bits * i) for i, p in enumerate(patterns))
    packed = whole.to_bytes(dtype.nbytes(len(patterns)), "little")
    assert Sketch.of_bytes(packed, name, len(patterns)) == Sketch.of(array_of_bits(patterns, name))
    if len(packed) * 8 == len(patterns) * dtype.bits:
        assert Sketch.of_bytes(packed, name).numel == len(patterns)


@pytest.mark.usefixtures("either")
def test_packed_elements_block_by_block() -> None:
    data = np.random.default_rng(1).integers(0, 256, 30_000, dtype=np.uint8)
    for name in ("float4_e2m1fn", "float6_e2m3fn"):
        builder = Builder(name, packed=True)
        for start in range(0, len(data), 7_500):
            builder.update(data[start : start + 7_500])
        assert builder.finish() == Sketch.of_bytes(data, name)


def test_types_without_a_numeric_meaning_are_refused() -> None:
    for make in (Sketch.empty, Builder, lambda name: Sketch.of_bytes(b"", name)):
        with pytest.raises(NotReadable, match="The bits of quint8 are not numbers"):
            make("quint8")


def test_a_builder_is_used_once() -> None:
    builder = Builder("int8")
    builder.finish()
    with pytest.raises(RuntimeError, match="is finished"):
        builder.finish()
    with pytest.raises(RuntimeError, match="is finished"):
        builder.update(b"")


def test_a_sketch_does_not_change() -> None:
    for sketch in (Sketch.of(np.ones(3, np.float16)), Sketch.empty("int8"), Sketch.of_bytes(b"1", "float4_e2m1fn")):
        for array in (sketch.codes, sketch.counts):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


@pytest.mark.usefixtures("either")
def test_nothing_at_all() -> None:
    for name in NUMERIC:
        check(np.zeros(0, DType.of(name).numpy))


# --- histograms, errors, forms -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "bool", "bfloat16", "float16", "float8_e5m2"])
@laws
@given(data=st.data(), bins=st.integers(1, 20))
def test_histograms_of_exact_types_are_numpys(name: str, data: st.DataObject, bins: int) -> None:
    array = data.draw(arrays(name))
    values = values_of(array).astype(np.float64)
    values = values[np.isfinite(values)]
    sketch = Sketch.of(array)
    for limits in (None, (-1.0, 2.0), (0.0, 0.0)):
        counts, edges = sketch.histogram(bins, limits)
        expected = np.array([np.histogram(values, edges)[0][i] for i in range(bins)])
        assert counts.tolist() == expected.tolist() and counts.dtype == np.uint64
        low, high = limits or ((values.min(), values.max()) if len(values) else (0.0, 1.0))
        low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
        assert edges[0] == low and edges[-1] == high and edges == pytest.approx(np.linspace(low, high, bins + 1))


@pytest.mark.parametrize("name", WIDE)
def test_histograms_of_wide_types_miss_only_near_edges(name: str) -> None:
    for array in long_arrays(name).values():
        sketch = Sketch.of(array)
        values = np.sort(array[np.isfinite(array)].astype(np.float64))
        counts, edges = sketch.histogram(50)
        assert counts.sum() == sketch.finite
        cumulative = np.concatenate([[0], np.cumsum(counts)])
        edges = edges / 2  # room for the tolerance
        values = values / 2
        tolerance = abs(edges) * 2.0**-7 + 2.0**-133
        below = np.searchsorted(values, edges - tolerance, side="left")
        above = np.searchsorted(values, edges + tolerance, side="right")
        assert (cumulative >= np.minimum(below, cumulative[-1])).all() and (cumulative <= above).all()


def test_a_histogram_of_the_whole_range_of_float64() -> None:
    counts, edges = Sketch.of(np.array([-1.7e308, 1.7e308])).histogram(2)
    assert counts.tolist() == [1, 1] and edges.tolist() == [-1.7e308, 0.0, 1.7e308]


def test_impossible_questions() -> None:
    sketch = Sketch.of(np.ones(3, np.float32))
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"a quantile must be between 0 and 1, not {q}"):
            sketch.quantile(q)
    for bins, limits in ((0, None), (3, (1, 0)), (3, (0, math.inf)), (3, (math.nan, 1))):
        with pytest.raises(ValueError, match="a histogram needs at least one bin and finite, ascending edges"):
            sketch.histogram(bins, limits)


@pytest.mark.parametrize("name", NUMERIC)
@laws
@given(data=st.data())
def test_forms_of_a_sketch_give_it_back(name: str, data: st.DataObject) -> None:
    sketch = Sketch.of(data.draw(arrays(name)))
    assert Sketch.from_json(json.loads(json.dumps(sketch.to_json(), allow_nan=False))) == sketch
    assert pickle.loads(pickle.dumps(sketch)) == sketch


WIDE_FORM = Sketch.of(np.array([1.0, 2.0], np.float32)).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sketch": 2}, "Not a sketch of version 1"),
        ({"dtype": "nonsense"}, "Unknown dtype 'nonsense'"),
        ({"dtype": "quint8"}, "are not numbers"),
        ({"codes": [3, 3]}, "codes must ascend, and counts must not be zero"),
        ({"codes": [4, 3]}, "codes must ascend, and counts must not be zero"),
        ({"counts": [1, 0]}, "codes must ascend, and counts must not be zero"),
        ({"counts": [1]}, "every code needs a count"),
        ({"codes": [1, 70_000]}, "70000 is not a code of float32"),
        ({"codes": [-1, 2]}, "Cannot read the sketch"),
        ({"codes": "ab"}, "Cannot read the sketch"),
        ({"counts": [1, 2**64]}, "Cannot read the sketch"),
        ({"sums": ["0x1"]}, "Cannot read the sketch"),
        ({"sums": ["zz", "0x1", "0x1"]}, "Cannot read the sketch"),
        ({"min": "low"}, "Cannot read the sketch"),
        ({"zeros": None}, "Cannot read the sketch"),
    ],
)
def test_forms_that_are_no_sketch(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        Sketch.from_json({**WIDE_FORM, **change})
    assert type(caught.value).__module__ == "torchparams.errors"


def test_a_form_without_a_key_or_of_another_kind() -> None:
    for key in WIDE_FORM:
        with pytest.raises(FileFormatError, match=r"Not a sketch|Cannot read the sketch"):
            Sketch.from_json({k: v for k, v in WIDE_FORM.items() if k != key})
    with pytest.raises(FileFormatError, match=r"Not a sketch of version 1\. Pass the result of Sketch.to_json"):
        Sketch.from_json([1])  # type: ignore[arg-type]  # what a file may hold


def test_it_prints_what_a_person_looks_for() -> None:
    array = np.array([1, 2, np.nan, np.inf], np.float32)
    assert repr(Sketch.of(array)) == "<Sketch of 4 float32: mean 1.5, std 0.7071, 1 to 2, 1 NaN, 1 +Inf>"
    assert repr(Sketch.empty("int8")) == "<Sketch of 0 int8: none finite>"
