"""Comparisons: NumPy's definition against plain arithmetic, and C against the definition."""

from __future__ import annotations

import importlib
import itertools
import math
import pickle
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_patterns import NUMERIC, array_of_bits, arrays, long_arrays
from torchparams.dtypes import DType
from torchparams.errors import NotReadable
from torchparams.sketch import native
from torchparams.sketch.compare import Values, comparison
from torchparams.sketch.compared import UNIT, Compared, equal

Array = np.ndarray[Any, Any]

IMPLEMENTATIONS = ("numpy", "c") if native.BUILT else ("numpy",)
PARTS = {"complex64": "float32", "complex128": "float64"}
KERNELS = [importlib.import_module("torchparams.sketch._compare")] if native.BUILT else []
LEVELS = [(kernel, level) for kernel in KERNELS for level in range(kernel.levels())]


def bytes_of(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint8)


def compared(a: Array, b: Array, implementation: str = "numpy", cuts: tuple[int, ...] = ()) -> Compared:
    made = comparison(Values.of(a.dtype), implementation)
    for start, stop in zip((0, *cuts), (*cuts, len(a)), strict=True):
        made.update(bytes_of(a[start:stop]), bytes_of(b[start:stop]))
    return made.finish()


def pairs_of(name: str) -> list[tuple[Array, Array]]:
    """Pairs of long arrays: of one kind of data, of two, nearly equal, and equal."""
    if name in PARTS:
        return [(a[:-1].view(name), b[:-1].view(name)) for a, b in pairs_of(PARTS[name])]
    kinds = list(long_arrays(name).values())
    shifted = [(a, np.roll(a, 7)) for a in kinds[:4]]
    mixed = list(itertools.pairwise(kinds))[::2]
    near = []
    for a in kinds[:3]:
        b = a.copy()
        b[11::997] = kinds[3][11::997]
        near.append((a, b))
    return [*shifted, *mixed, *near, (kinds[0], kinds[0].copy())]


# --- the definition ------------------------------------------------------------------------------


def as_float64(array: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return (array.view(PARTS[array.dtype.name]) if array.dtype.name in PARTS else array).astype(np.float64)


def exact(array: Array) -> list[Fraction | float]:
    """The values as fractions; what is not finite as it is."""
    if array.dtype.kind in "iu":
        return [Fraction(int(value)) for value in array]
    return [Fraction(value) if math.isfinite(value) else value for value in as_float64(array).tolist()]


def expected_of(a: Array, b: Array) -> Compared:
    """The comparison in plain exact arithmetic."""
    width = a.itemsize
    differs = (bytes_of(a).reshape(-1, width) != bytes_of(b).reshape(-1, width)).any(1)
    found = numbers_of(exact(a), exact(b))
    return replace(found, changed=int(np.count_nonzero(differs)))


def numbers_of(x: list[Fraction | float], y: list[Fraction | float]) -> Compared:
    pairs = list(zip(x, y, strict=True))
    finite = [(p, q) for p, q in pairs if isinstance(p, Fraction) and isinstance(q, Fraction)]
    nan = [(p != p, q != q) for p, q in pairs]
    most = max((abs(q - p) for p, q in finite), default=Fraction(0))
    unit = Fraction(2) ** UNIT
    return Compared(
        changed=sum(p != q for p, q in pairs),
        nan_a=nan.count((True, False)),
        nan_b=nan.count((False, True)),
        infinite=sum(
            p == p and q == q and p != q for p, q in pairs if not isinstance(p, Fraction) or not isinstance(q, Fraction)
        ),
        max=int(most) if most.denominator == 1 and most < 2**66 else rounded(most),
        aa=int(sum(p * p for p, _ in finite) / unit),
        bb=int(sum(q * q for _, q in finite) / unit),
        ab=int(sum(p * q for p, q in finite) / unit),
    )


def rounded(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def of_types(a: Array, b: Array) -> Compared:
    """The comparison of values of two types."""
    made = comparison(Values.of(a.dtype), others=Values.of(b.dtype))
    made.update(bytes_of(a), bytes_of(b))
    return made.finish()


@pytest.mark.parametrize("name", NUMERIC)
def test_against_fractions(name: str) -> None:
    for a, b in pairs_of(name):
        a, b = a[8100:8500], b[8100:8500]
        expected = expected_of(a, b)
        if name in ("int64", "uint64"):
            assert compared(a, b) == expected
        else:
            assert compared(a, b) == replace(
                expected, max=rounded(Fraction(expected.max)) if math.isfinite(expected.max) else math.inf
            )


@given(a=arrays("int64"), b=arrays("uint64"))
@settings(max_examples=50)
def test_integers_of_two_types_are_compared_exactly(a: Array, b: Array) -> None:
    n = min(len(a), len(b))
    for x, y in ((a[:n], b[:n]), (b[:n], a[:n])):
        found = of_types(x, y)
        assert found == numbers_of(exact(x), exact(y))
        assert isinstance(found.max, int)


@pytest.mark.parametrize("whole", ["int64", "uint64"])
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
@given(data=st.data())
@settings(max_examples=30)
def test_integers_and_floats_are_compared_exactly(whole: str, name: str, data: st.DataObject) -> None:
    a, b = data.draw(arrays(whole)), data.draw(arrays(name))
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    if data.draw(st.booleans()):  # near each other
        with np.errstate(all="ignore"):
            b = a.astype(np.float64).astype(b.dtype)
    for x, y in ((a, b), (b, a)):
        found, expected = of_types(x, y), numbers_of(exact(x), exact(y))
        assert found == replace(
            expected, max=rounded(Fraction(expected.max)) if math.isfinite(expected.max) else math.inf
        )


def test_sums_of_values_that_are_simple_are_exact() -> None:
    a, b = np.arange(1000.0, dtype=np.float32), np.arange(1000.0, dtype=np.float32) + np.float32(0.5)
    found = compared(a, b)
    assert found.changed == 1000
    assert found.max == 0.5
    assert Fraction(found.dd) * Fraction(2) ** UNIT == 250
    assert Fraction(found.aa) * Fraction(2) ** UNIT == sum(i * i for i in range(1000))
    assert found.relative == math.sqrt(250 / sum(i * i for i in range(1000)))


def test_zeros_of_two_signs_differ_by_nothing() -> None:
    found = compared(np.array([0.0, 1.0], np.float32), np.array([-0.0, 1.0], np.float32))
    assert (found.changed, found.max, found.relative, found.cosine) == (1, 0, 0, 1)


def test_nan_and_infinities() -> None:
    nan, inf = math.nan, math.inf
    a = np.array([nan, nan, 1, inf, inf, inf, nan, 3], np.float32)
    b = np.array([nan, 1, nan, inf, -inf, 2, inf, 4], np.float32)
    found = compared(a, b)
    assert (found.changed, found.nan_a, found.nan_b, found.infinite, found.max) == (6, 2, 1, 2, 1)
    assert all(map(math.isnan, (found.greatest, found.relative, found.cosine)))
    found = replace(found, nan_a=0, nan_b=0)
    assert (found.greatest, found.relative) == (math.inf, math.inf) and math.isnan(found.cosine)
    found = replace(found, infinite=0)
    assert (found.greatest, found.relative, found.cosine) == (1, 1 / 3, 1)
    payload = array_of_bits([0x7FC00000], "float32"), array_of_bits([0x7FC00001], "float32")
    assert compared(*payload) == Compared(changed=1, max=0.0)


@pytest.mark.parametrize("scale", [1e-308, 1e-200, 1e200, 1e300])
def test_squares_beyond_float64(scale: float) -> None:
    a, b = np.array([3.0, 4.0]) * scale, np.array([3.0, 3.0]) * scale
    found = compared(a, b)
    assert found.relative == pytest.approx(0.2, rel=1e-12)
    assert found.cosine == pytest.approx(21 / (5 * math.sqrt(18)), rel=1e-12)
    assert found.norm == pytest.approx(5 * scale, rel=1e-12)
    assert found.distance == pytest.approx(scale, rel=1e-12)


def test_numbers_of_nothing() -> None:
    assert compared(np.zeros(0, np.float32), np.zeros(0, np.float32)) == Compared(max=0.0)
    zeros, ones = np.zeros(3), np.ones(3)
    assert compared(zeros, ones).relative == math.inf
    assert math.isnan(compared(zeros, ones).cosine)
    assert compared(ones, zeros).relative == 1
    assert compared(ones, -ones).cosine == -1


def test_integers_of_64_bits_are_exact() -> None:
    a, b = np.array([2**62, -(2**63)], np.int64), np.array([2**62 + 1, 2**63 - 1], np.int64)
    assert compared(a, b).max == 2**64 - 1
    assert compared(a[:1], b[:1]).max == 1
    assert compared(np.array([2**64 - 1], np.uint64), np.array([0], np.uint64)).max == 2**64 - 1


def test_types_that_are_no_numbers() -> None:
    with pytest.raises(NotReadable, match="The bits of qint8 are not numbers"):
        Values.of("qint8")


def test_the_halves_of_complex32_are_float16() -> None:
    made = comparison(Values.of("complex32"))
    made.update(np.array([1, 2, 3, 4], np.float16).view(np.uint8), np.array([1, 2, 5, 6], np.float16).view(np.uint8))
    found = made.finish()
    assert (found.changed, found.max) == (1, 2)


@given(st.lists(st.integers(0, 2**70), min_size=2, max_size=2))
@settings(max_examples=50)
def test_roots(values: list[int]) -> None:
    bb, aa = values
    found = Compared(bb=bb, aa=aa)
    if aa:
        assert found.relative == pytest.approx(math.sqrt(Fraction(aa + bb, aa)), rel=1e-15)
    assert Compared(bb=bb << -UNIT).distance == pytest.approx(math.sqrt(bb), rel=1e-15)
    assert Compared(bb=1 << 5000).distance == math.inf
    assert Compared(bb=1 << 5000, aa=1).relative == math.inf


# --- C -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMERIC)
def test_c_is_numpy(name: str) -> None:
    for a, b in pairs_of(name):
        expected = compared(a, b)
        for implementation in IMPLEMENTATIONS:
            assert compared(a, b, implementation, cuts=(1, 64, 6411, 6411, 12800)) == expected
        for kernel, level in LEVELS:  # the last is the best, and stays
            kernel.use(level)
            assert compared(a, b, "c") == expected


@pytest.mark.parametrize("name", NUMERIC)
@given(data=st.data())
@settings(max_examples=15)
def test_c_is_numpy_for_any_bits(name: str, data: st.DataObject) -> None:
    a, b = data.draw(arrays(name)), data.draw(arrays(name))
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    expected = compared(a, b)
    swapped = compared(b, a)
    assert (swapped.changed, swapped.nan_a, swapped.nan_b) == (expected.changed, expected.nan_b, expected.nan_a)
    assert (swapped.max, swapped.aa, swapped.bb, swapped.ab) == (expected.max, expected.bb, expected.aa, expected.ab)
    for implementation in IMPLEMENTATIONS:
        assert compared(a, b, implementation) == expected
        assert compared(a, a.copy(), implementation).changed == 0


@pytest.mark.parametrize("name", NUMERIC)
@given(data=st.data())
@settings(max_examples=10)
def test_parts_add_to_the_whole_in_any_order(name: str, data: st.DataObject) -> None:
    a, b = data.draw(st.sampled_from(pairs_of(name)))
    start = data.draw(st.integers(0, len(a) - 900))
    a, b = a[start : start + 900], b[start : start + 900]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(a)), max_size=6)))
    blocks = data.draw(st.permutations(list(itertools.pairwise([0, *cuts, len(a)]))))
    whole = compared(a, b)
    for implementation in IMPLEMENTATIONS:
        one = comparison(Values.of(a.dtype), implementation)
        for first, last in blocks:
            one.update(bytes_of(a[first:last]), bytes_of(b[first:last]))
        assert one.finish() == whole
        parts = [compared(a[first:last], b[first:last], implementation) for first, last in blocks]
        total = pickle.loads(pickle.dumps(Compared.total(parts)))
        assert total == whole
        assert repr(total) == repr(Compared.total(reversed(parts)))
    shuffled = np.array(data.draw(st.permutations(range(0, len(a), 9))))
    assert compared(a[shuffled], b[shuffled], IMPLEMENTATIONS[-1]) == compared(a[::9], b[::9])


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("spread", [1, 8, 14, 15, 21, 22, 38, 44, 60, 67, 83, 90, 111, 120, 400])
def test_any_spread_of_magnitudes_is_added_exactly(name: str, spread: int) -> None:
    rng = np.random.default_rng(spread)
    n, most = 1000, 127 if name == "float32" else 1000
    exponents = rng.integers(max(-most, -spread), 0, (2, n), endpoint=True)
    exponents[:, ::256] = 0
    with np.errstate(under="ignore", over="ignore"):
        mantissas = np.nextafter(np.array(2, name), np.array(0, name)) - rng.random((2, n)).astype(name) * (
            rng.random((2, n)) < 0.5
        )
        values = np.ldexp(mantissas.astype(name) * rng.choice([-1, 1], (2, n)).astype(name), exponents).astype(name)
    for scale in (0, 60, -60, *((900, -900) if name == "float64" else ())):
        a, b = np.ldexp(values, scale)
        for x, y in ((a, b), (abs(a), abs(b)), (abs(a), -abs(a))):  # signs that cancel, and that do not
            expected = compared(x, y)
            for kernel, level in LEVELS:
                kernel.use(level)
                assert compared(x, y, "c") == expected


def test_of_equal_greatest_differences_the_integer_is_kept() -> None:
    whole, floating = Compared(max=1), Compared(max=1.0)
    assert isinstance((whole + floating).max, int) and isinstance((floating + whole).max, int)
    assert (Compared(max=2**53 + 1) + Compared(max=2.0**53)).max == 2**53 + 1


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_pattern(name: str) -> None:
    a = np.arange(1 << 16, dtype=np.uint16).view(DType.of(name).numpy)
    b = np.roll(a, 1)
    for implementation in IMPLEMENTATIONS:
        assert compared(a, b, implementation) == compared(a, b)


def test_results_do_not_depend_on_how_the_process_rounds() -> None:
    import torch

    a, b = array_of_bits([1, 2, 3], "float32"), array_of_bits([3, 1, 2], "float32")
    expected = compared(a, b)
    assert expected.max > 0
    torch.set_flush_denormal(True)
    try:
        assert compared(a, b, IMPLEMENTATIONS[-1]) == expected
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_checks_what_it_is_given(kernel: Any) -> None:
    state, table = np.zeros(kernel.size(), np.uint8), np.zeros(0)
    for arguments, message in (
        ((state[:8], 3, 4, table, b"", b""), "not a comparison: it has another size, or is not aligned"),
        ((state, 99, 4, table, b"", b""), "no such kind of values"),
        ((state, 3, 2, table, b"", b""), "a unit is one value or two"),
        ((state, 0, 1, table, b"", b""), "the table has no 256 doubles"),
        ((state, 3, 4, table, b"aaaa", b""), "the blocks have different sizes"),
        ((state, 3, 8, table, b"aaaa", b"aaaa"), "the blocks end within an element"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.update(*arguments)
    with pytest.raises(ValueError, match="not a comparison"):
        kernel.finish(state[:8])
    with pytest.raises(ValueError, match="this machine has no such vector unit"):
        kernel.use(99)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_bytes(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WANTED", implementation)
    data = bytes(range(256)) * 1000
    assert equal(b"", b"") and equal(memoryview(data), bytearray(data)) and equal(np.zeros(3), np.zeros(3))
    assert not equal(data, data[:-1])
    for at in (0, 63, 100_000, len(data) - 1):
        other = bytearray(data)
        other[at] ^= 1
        assert not equal(data, other)


def test_the_cosine_of_a_right_angle_has_no_sign() -> None:
    found = Compared(changed=2, aa=1 << 9, bb=1 << 9, ab=0)
    assert math.copysign(1, found.cosine) == 1 and found.cosine == 0
