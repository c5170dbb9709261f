"""Values of codes, compared with numpy and ml_dtypes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bit_patterns import EXACT, WIDE, arrays, special_bits
from torchparams.dtypes import ALL, DType
from torchparams.errors import NotReadable
from torchparams.sketch.codes import Coding
from torchparams.sketch.kernels import codes_of

TINY = {"float32": 2.0**-126, "float64": 2.0**-1022}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_code_is_the_value(name: str) -> None:
    coding = Coding.of(name)
    codes = np.arange(coding.size, dtype=np.uint32)
    assert coding.exact and coding.parts == 1
    assert coding.size == (2 if name == "bool" else 1 << DType.of(name).bits)
    with np.errstate(invalid="ignore"):
        expected = codes.astype(np.uint16 if coding.dtype.bits == 16 else np.uint8).view(coding.dtype.numpy)
        expected = expected.astype(np.float64)
    assert np.array_equal(coding.values(codes), expected, equal_nan=True)


@pytest.mark.parametrize("name", EXACT)
def test_sums_of_exact_codes_are_exact_whatever_the_counts(name: str) -> None:
    coding = Coding.of(name)
    codes = np.arange(coding.size, dtype=np.uint32)
    values = coding.values(codes)
    codes, values = codes[np.isfinite(values)], values[np.isfinite(values)]
    # Power-of-two units make every value an integer.
    whole = [int(v) if coding.unit == 0 else int(Fraction(v) * Fraction(2) ** -coding.unit) for v in values.tolist()]
    varied = np.arange(len(codes), dtype=np.uint64) * 997 % 4096
    for counts in (varied, np.full_like(varied, 2**36 // len(codes)), np.full_like(varied, 2**47)):
        n = counts.tolist()
        assert coding.sums(codes, counts) == (
            sum(a * b for a, b in zip(whole, n, strict=True)),
            sum(abs(a) * b for a, b in zip(whole, n, strict=True)),
            sum(a * a * b for a, b in zip(whole, n, strict=True)),
        )


@pytest.mark.parametrize("name", WIDE)
@given(data=st.data())
def test_a_wide_code_is_within_a_256th_of_its_values(name: str, data: st.DataObject) -> None:
    array = data.draw(arrays(name))
    coding = Coding.of(name)
    codes = codes_of(coding.kind, array.view(f"u{array.itemsize}"))
    assert (codes < coding.size).all()
    for value, middle in zip(array.tolist(), coding.values(codes).tolist(), strict=True):
        if coding.is_float and not np.isfinite(value):
            assert not np.isfinite(middle)  # which of NaN and Inf, the code of Inf does not tell
        elif coding.is_float:
            least = TINY[name]
            assert abs(middle - value) <= max(abs(value), least) * 2.0**-7 if abs(value) < least else True
            assert abs(value) < least or abs(middle - value) <= abs(value) * 2.0**-8
        else:
            assert abs(int(middle) - value) <= abs(value) / 256 + (1 if abs(value) > 2**53 else 0)
            assert abs(value) >= 256 or middle == value


@pytest.mark.parametrize("name", ["float32", "int8", "bfloat16", "float64", "int64", "uint64", "float8_e8m0fnu"])
def test_widened_codes_are_those_of_the_values_in_float64(name: str) -> None:
    coding = Coding.of(name)
    patterns = np.array(special_bits(coding.dtype), f"u{coding.dtype.itemsize}")
    codes = np.unique(codes_of(coding.kind, patterns))
    values = coding.values(codes)
    codes, values = codes[np.isfinite(values)], values[np.isfinite(values)]
    wide, counts = coding.widened(codes, np.ones(len(codes), np.uint64))
    expected = codes_of("f64", values.view(np.uint64))
    assert wide.tolist() == sorted(set(expected.tolist()))
    assert counts.sum() == len(codes)


def test_infinities_and_nan_of_wide_floats() -> None:
    for name, infinity in (("float32", 0x7F80), ("float64", 0x3FF80)):
        coding = Coding.of(name)
        sign = (infinity | (infinity - 1)) + 1 >> 0
        sign = coding.size // 2
        values = coding.values(np.array([infinity, infinity + 1, infinity + sign, infinity + sign + 5], np.uint32))
        assert values[[0, 2]].tolist() == [np.inf, -np.inf]
        assert np.isnan(values[[1, 3]]).all()


def test_the_largest_value_of_the_types_that_saturate() -> None:
    assert Coding.of("float8_e4m3fn").largest == 448
    assert Coding.of("float8_e5m2").largest == 57344
    assert Coding.of("float16").largest == 65504
    assert Coding.of("float4_e2m1fn").largest == 6
    assert Coding.of("float32").largest is Coding.of("int8").largest is None


@pytest.mark.parametrize("name", [str(dtype) for dtype in ALL if dtype.kind == "opaque"])
def test_types_without_a_numeric_meaning_are_refused(name: str) -> None:
    with pytest.raises(NotReadable) as caught:
        Coding.of(name)
    assert str(caught.value) == (
        f"The bits of {name} are not numbers. Quantised and packed values need a scale or layout stored "
        "elsewhere. Unpack or dequantise the tensor first."
    )
