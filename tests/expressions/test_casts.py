"""Casts compared with torch, and numbers of lost values compared with an element-wise count."""

from __future__ import annotations

from math import isfinite, isnan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_patterns import NUMERIC, array_of_bits, arrays, special_bits
from torchparams.dtypes import DType
from torchparams.expressions.casts import Losses, cast, cast_counting, castable, count_losses, losses, widen
from torchparams.testing import to_torch

Array = np.ndarray[Any, Any]

TORCH_FLOATS = [name for name in NUMERIC if DType.of(name).kind == "float" and DType.of(name).torch_name]
FLOATS = [name for name in NUMERIC if DType.of(name).kind == "float"]
TARGETS = [name for name in FLOATS if name != "float8_e8m0fnu"]


def values_of(name: str) -> Array:
    """Every element of a type of up to 16 bits; special and random ones of a wider type."""
    dtype = DType.of(name)
    if dtype.bits <= 16:
        return array_of_bits(np.arange(1 << dtype.bits), name)
    numbers = np.random.default_rng(1)
    scaled = np.exp(numbers.normal(0, 8, 4000)) * numbers.choice([-1, 1], 4000)
    return np.concatenate([array_of_bits(special_bits(dtype), name), scaled.astype(dtype.numpy)])


@pytest.mark.parametrize("old", FLOATS)
def test_losses_are_counted_without_the_cast(old: str) -> None:
    values, dtype = values_of(old), DType.of(old)
    for new in map(DType.of, TARGETS):
        assert count_losses(values, dtype, new) == losses(values, cast(values, dtype, new), dtype, new), new
        ordinary = (
            values[np.isfinite(values) & (abs(values) > 1e-3) & (abs(values) < 1e3)] if dtype.bits >= 32 else values
        )
        assert count_losses(ordinary, dtype, new) == losses(ordinary, cast(ordinary, dtype, new), dtype, new), new
    assert count_losses(values[:0], dtype, DType.of("float16")) == Losses()


def test_losses_of_complex_numbers_are_those_of_their_parts() -> None:
    values = np.array([0.1 + 1j, 7e4 - 1e-9j], np.complex64)
    assert count_losses(values, DType.of("complex64"), DType.of("complex32")) == Losses(1, 1, 3)
    assert count_losses(values, DType.of("complex64"), DType.of("complex128")) == Losses()


@pytest.mark.parametrize("old", TORCH_FLOATS)
def test_floats_are_rounded_as_torch_rounds_them(old: str) -> None:
    values = values_of(old)
    for new in TORCH_FLOATS:
        if new in (old, "float8_e8m0fnu"):
            continue
        made = cast(values, DType.of(old), DType.of(new))
        with np.errstate(all="ignore"):
            ours = made.astype(np.float64)
        theirs = to_torch(values).to(DType.of(new).torch).to(torch.float32 if new != "float64" else torch.float64)
        with np.errstate(all="ignore"):
            expected = theirs.numpy().astype(np.float64)
        np.testing.assert_array_equal(ours, expected, err_msg=new)


@pytest.mark.parametrize("name", [name for name in FLOATS if DType.of(name).bits <= 16])
def test_widening_is_exact(name: str) -> None:
    values = values_of(name)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float32)
    np.testing.assert_array_equal(widen(values, DType.of(name)), expected)


def largest(name: str) -> float:
    with np.errstate(all="ignore"):
        found: list[float] = values_of(name).astype(np.float64).tolist()
    return max(x for x in found if isfinite(x))


def counted(before: Array, after: Array, new: str) -> Losses:
    """What is lost, as the definition says it."""
    most = largest(new)
    over = under = changed = 0
    for x, y in zip(before.astype(np.float64).tolist(), after.astype(np.float64).tolist(), strict=True):
        if isnan(x) and isnan(y):
            continue
        over += isfinite(x) and (not isfinite(y) or (abs(x) > most and abs(y) == most))
        under += x != 0 and y == 0
        changed += x != y
    return Losses(over, under, changed)


@pytest.mark.parametrize("old", ["float16", "bfloat16", "float32", "float64", "float8_e5m2", "float8_e4m3fnuz"])
def test_losses_are_those_of_the_definition(old: str) -> None:
    values = values_of(old)[::7]
    for new in TARGETS:
        if new == old:
            continue
        after = cast(values, DType.of(old), DType.of(new))
        with np.errstate(all="ignore"):
            expected = counted(values, after, new)
        assert losses(values, after, DType.of(old), DType.of(new)) == expected, new
        made, lost = cast_counting(values, DType.of(old), DType.of(new))
        assert made.tobytes() == after.tobytes()
        assert lost == expected, new


INTEGERS = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


@given(data=st.data(), old=st.sampled_from(INTEGERS), new=st.sampled_from([*INTEGERS[1:], "float32", "bfloat16"]))
@settings(max_examples=150, deadline=None)
def test_what_integers_lose(data: st.DataObject, old: str, new: str) -> None:
    before = data.draw(arrays(old))
    after, lost = cast_counting(before, DType.of(old), DType.of(new))
    exact = [int(x) for x in before.tolist()]
    made = [int(y) if DType.of(new).kind != "float" else float(y) for y in after.tolist()]
    assert lost.changed == sum(x != y for x, y in zip(exact, made, strict=True))
    assert lost.underflow == sum(x != 0 and y == 0 for x, y in zip(exact, made, strict=True))
    if DType.of(new).kind != "float":
        assert lost.overflow == lost.changed
        with np.errstate(all="ignore"):
            assert after.tolist() == before.astype(new).tolist()


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        ("float32", "bfloat16", True),
        ("int64", "int32", True),
        ("bool", "uint8", True),
        ("int8", "float16", True),
        ("complex128", "complex64", True),
        ("float32", "int8", False),
        ("complex64", "float32", False),
        ("float32", "complex64", False),
        ("float32", "float8_e8m0fnu", False),
        ("float8_e8m0fnu", "float8_e8m0fnu", True),
        ("float32", "bool", False),
        ("complex32", "complex64", False),
    ],
)
def test_which_casts_have_a_meaning(old: str, new: str, allowed: bool) -> None:
    assert castable(DType.of(old), DType.of(new)) is allowed


@pytest.mark.parametrize("name", ["int64", "uint64"])
@pytest.mark.parametrize("new", ["float32", "float64", "bfloat16", "float16"])
def test_integers_beyond_those_that_a_float_has(name: str, new: str) -> None:
    before = array_of_bits(special_bits(DType.of(name)), name)
    after, lost = cast_counting(before, DType.of(name), DType.of(new))
    with np.errstate(all="ignore"):
        made = after.astype(np.float64).tolist()
    assert lost.changed == sum(x != y for x, y in zip(before.tolist(), made, strict=True))


def test_parts_of_complex_numbers_are_counted() -> None:
    before = np.array([1 + 1e300j, 1e-300 + 2j], np.complex128)
    _, lost = cast_counting(before, DType.of("complex128"), DType.of("complex64"))
    assert lost == Losses(overflow=1, underflow=1, changed=2)
