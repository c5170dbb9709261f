"""Arrays of every dtype for tests: arbitrary bit patterns, and the most error-prone ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from torchparams.dtypes import ALL, DType

Array = np.ndarray[Any, Any]

NUMERIC = tuple(str(dtype) for dtype in ALL if dtype.kind != "opaque" and dtype.numpy_name)
"""Every element type that has a numeric meaning and arrays."""

WIDE = ("float32", "float64", "int32", "uint32", "int64", "uint64")
EXACT = tuple(name for name in NUMERIC if name not in WIDE and DType.of(name).kind != "complex")

_FLOATS = {"float32": (8, 23), "float64": (11, 52), "float16": (5, 10), "bfloat16": (8, 7)}


def special_bits(dtype: DType) -> list[int]:
    """Zeros, subnormals, powers of two, neighbours of the limits, infinities, NaN of several payloads."""
    bits = dtype.bits
    top = 1 << bits
    if dtype.kind == "bool":
        return [0, 1]
    if bits <= 8:
        return list(range(top))
    near = [0, 1, 2, 127, 128, 129, 254, 255, 256, 257, 511, 512, 1000]
    near += [top - n for n in near[1:]] + [top // 2 + n for n in (-2, -1, 0, 1, 2, 255, 256, 257)]
    if str(dtype) in _FLOATS:
        exponent, mantissa = _FLOATS[str(dtype)]
        infinity = ((1 << exponent) - 1) << mantissa
        one = ((1 << (exponent - 1)) - 1) << mantissa
        positive = [infinity + n for n in (-1, 0, 1, (1 << mantissa) - 1, 1 << (mantissa - 1), 1 << (mantissa // 2))]
        positive += [one, one + 1, one - 1, one + (1 << mantissa), (1 << mantissa) - 1, 1 << mantissa]
        near += positive + [p | top // 2 for p in positive]
    return near


def array_of_bits(values: Any, name: str) -> Array:
    """The array of type `name` whose elements have these bits."""
    dtype = DType.of(name)
    return np.array(values, f"u{dtype.itemsize or 1}").view(dtype.numpy)


def arrays(name: str, most: int = 40) -> st.SearchStrategy[Array]:
    """Short one-dimensional arrays of the type: any bits, the special ones, and many equal ones."""
    dtype = DType.of(name)
    if dtype.kind == "complex":
        part = "float32" if name == "complex64" else "float64"
        return arrays(part, most).map(lambda a: a[: len(a) // 2 * 2].view(dtype.numpy))
    anything = st.integers(0, (1 << (1 if name == "bool" else dtype.bits)) - 1)
    special = st.sampled_from(special_bits(dtype))
    values = st.one_of(
        st.lists(anything, max_size=most),
        st.lists(st.one_of(special, anything), max_size=most),
        st.builds(lambda value, count: [value] * count, st.one_of(special, anything), st.integers(0, most)),
    )
    return values.map(lambda found: array_of_bits(found, name))


def long_arrays(name: str) -> dict[str, Array]:
    """Arrays of several blocks, of every kind of data for which a kernel has a way of its own."""
    rng = np.random.default_rng(7)
    dtype, n = DType.of(name), 20_011
    random = rng.integers(0, 1 << 8, n * (dtype.itemsize or 1), dtype=np.uint8)
    if dtype.bits < 8 or name == "bool":
        random %= np.uint8(2 if name == "bool" else 1 << dtype.bits)
    found = {"random": random.view(dtype.numpy), "special": np.resize(array_of_bits(special_bits(dtype), name), n)}
    with np.errstate(all="ignore"):
        for kind, values in {
            "normal": rng.normal(0, 0.02, n),
            "scaled": rng.normal(0, 50, n),
            "spread": rng.choice([-1, 1], n) * np.exp(rng.normal(0, 9, n)),
            "sparse": np.where(rng.random(n) < 0.9, 0, rng.normal(0, 1, n)),
            "two blocks": np.where(np.arange(n) < 8192, 3.0, -1e-30),
            "one NaN": np.where(np.arange(n) == 9000, np.nan, rng.normal(0, 1, n)),
        }.items():
            if dtype.kind in ("uint", "bool"):
                values = abs(values)
            if dtype.kind in ("int", "uint", "bool"):
                values = np.clip(np.nan_to_num(values), -100, 100)
            found[kind] = (
                values.astype(np.float32).astype(dtype.numpy) if dtype.bits < 32 else values.astype(dtype.numpy)
            )
    found["sorted"] = np.sort(found["normal"].view(f"u{dtype.itemsize or 1}")).view(dtype.numpy)
    found["constant"] = np.full(n, found["scaled"][3])
    return found
