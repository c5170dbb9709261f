"""The kernels of quantised weights against their definitions, bit for bit."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchparams.sketch import decode

Array = np.ndarray[Any, Any]

# The kernel in C; built without a compiler, there is the definition alone.
KERNELS: list[Any] = [importlib.import_module("torchparams.sketch._decode")] if decode.BUILT else []
ORDERS = [None, bytes([0, 2, 4, 6, 1, 3, 5, 7])]


EDGES = np.array(
    [0, 0x80000000, 1, 0x8000, 0x8001, 0x7FFF, 0x18000, 0x17FFF, 0x18001, 0x3F800000, 0x3F808000, 0x3F818000,
     0x7F7F0000, 0x7F7F0001, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001,
     0x7FC00000, 0xFFC12345, 0xFF7FFFFF, 0x80000001, 0x80008000],
    np.uint32,
)  # fmt: skip


@given(st.integers(0, 1 << 32), st.integers(0, 9000))
def test_narrow_is_the_definition(seed: int, count: int) -> None:
    from torchparams.dtypes import DType
    from torchparams.expressions import casts

    f32, bf16 = DType.of("float32"), DType.of("bfloat16")
    rng = np.random.default_rng(seed)
    bits = np.concatenate([EDGES, rng.integers(0, 1 << 32, count, np.uint32), rng.choice(EDGES, 40)])
    values = bits.view(np.float32)
    expected = casts.cast(values, f32, bf16)
    lost = casts.losses(values, expected, f32, bf16)
    for kernel in KERNELS:
        for level in range(kernel.levels()):
            kernel.use(level)
            found, counted = casts.cast_counting(values, f32, bf16)
            assert np.array_equal(found.view(np.uint16), expected.view(np.uint16))
            assert counted == lost


NUMBERS = np.arange(256, dtype=np.float32)
TABLES = {
    "any": np.where(NUMBERS == 7, np.nan, np.random.default_rng(0).standard_normal(256)).astype(np.float32),
    "counted": NUMBERS,
    "counted from -8": NUMBERS - 8,
    "signed": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "nearly counted": np.where(NUMBERS == 200, 3, NUMBERS),
    "negative zero": np.where(NUMBERS == 8, np.float32(-0.0), NUMBERS - 8),
    "halves": NUMBERS + np.float32(0.5),
    "infinite": NUMBERS + np.float32(np.inf),
}


@given(st.data())
def test_scaled_is_the_definition(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    block = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 41))
    start = data.draw(st.integers(0, rows * columns - 1))
    count = data.draw(st.integers(1, rows * columns - start))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    table = TABLES[data.draw(st.sampled_from(list(TABLES)))]
    lines, across = -(-rows // block[0]), -(-columns // block[1])
    scales, zeros = (rng.standard_normal((lines, across)).astype(np.float32) for _ in range(2))
    index = rng.integers(0, across, columns).astype(np.int32)
    codes = rng.integers(0, 256, count).astype(np.uint8)
    given = (
        codes, table, scales, data.draw(st.sampled_from([None, zeros])), data.draw(st.sampled_from([None, index])),
        columns, block, start,
    )  # fmt: skip
    expected, found = np.empty(count, np.float32), np.empty(count, np.float32)
    decode.numpy_scaled(*given, expected)
    for kernel in KERNELS:
        for level in range(kernel.levels()):
            kernel.use(level)
            found[:] = 0
            decode.scaled(*given, found)
            assert np.array_equal(found, expected, equal_nan=True)
            assert np.array_equal(np.signbit(found), np.signbit(expected)) or np.isnan(expected).any()


@given(st.data())
def test_unpack_is_the_definition(data: st.DataObject) -> None:
    bits, axis = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 1))
    lanes, count = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 100))
    order = data.draw(st.sampled_from(ORDERS)) if bits == 4 else None
    count = -(-count // 8) * 8 if order else count
    shape = [lanes, lanes]
    shape[axis] = -(-count * bits // 32)
    words = np.random.default_rng(bits).integers(0, 1 << 32, shape).astype(np.uint32)
    shape[axis] = count
    expected = np.empty(shape, np.uint8)
    decode.numpy_unpack(words, bits, count, axis, expected, order)
    for turned in (False, True):
        found = np.empty(shape[::-1], np.uint8).T if turned else np.empty(shape, np.uint8)
        decode.unpack(words, bits, count, axis, found, order)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_touch_no_memory_that_is_not_theirs(kernel: Any) -> None:
    codes, table, out = np.zeros(6, np.uint8), np.zeros(256, np.float32), np.zeros(6, np.float32)
    scales, index = np.zeros((2, 2), np.float32), np.array([0, 2, 0], np.int32)
    good = (codes, table, scales, None, None, 3, 1, 2, 2, 0, out)
    kernel.scaled(*good)
    wrong: Any
    for place, wrong in ((1, table[:9]), (2, scales[:1]), (3, scales[:1]), (4, index), (5, 0), (6, 0), (7, 1), (8, 0),
                         (9, 1), (9, -1), (10, out[:5])):  # fmt: skip
        with pytest.raises(ValueError, match=r"[a-z]"):
            kernel.scaled(*good[:place], wrong, *good[place + 1 :])
    words, fields = np.zeros((2, 2), np.uint32), bytes(range(8))
    fine = (words, 4, fields, 16, 2, 1, 2, 1, 16, np.zeros(32, np.uint8))
    kernel.unpack(*fine)
    for place, wrong in ((0, words[:1]), (1, 9), (1, 0), (2, b"\0"), (2, b"\x08" * 8), (3, 17), (3, -1), (4, 3),
                         (9, np.zeros(31, np.uint8))):  # fmt: skip
        with pytest.raises(ValueError, match=r"[a-z]"):
            kernel.unpack(*fine[:place], wrong, *fine[place + 1 :])
