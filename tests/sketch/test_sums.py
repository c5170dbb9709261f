"""The kernel of weighted sums against its definition and against torch, bit for bit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from torchparams.dtypes import DType
from torchparams.sketch import native
from torchparams.sketch.sums import KINDS, MOST, CSum, NumpySum, takes, weighted_sum
from torchparams.testing import to_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

# The kernel in C, and what runs; built without a compiler, there is the definition alone.
KERNELS: list[Any] = [importlib.import_module("torchparams.sketch._sums")] if native.BUILT else []
IMPLEMENTATIONS: list[type[NumpySum]] = [NumpySum, CSum] if native.BUILT else [NumpySum]
Array = np.ndarray[Any, Any]
WEIGHTS = st.sampled_from([1.0, 0.0, -1.0, 0.5, 0.3, 3.0, 1e30, 1e-42])


def of_bits(bits: Array, name: str) -> Array:
    return bits.view(DType.of(name).numpy)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Array], list[float], str]:
    count, numel = draw(st.integers(1, 4)), draw(st.integers(0, 40))
    names = [draw(st.sampled_from(KINDS)) for _ in range(count)]
    parts = [of_bits(draw(arrays(f"u{DType.of(name).itemsize}", numel)), name) for name in names]
    return parts, [draw(WEIGHTS) for _ in names], draw(st.sampled_from(KINDS))


def summed(kind: type[NumpySum], parts: Sequence[Array], weights: Sequence[float], name: str) -> tuple[Array, int]:
    out = np.empty(len(parts[0]), DType.of(name).numpy)
    over = kind([DType.of(part.dtype) for part in parts], weights, DType.of(name))(parts, out)
    return out, over


def same(ours: Array, theirs: Array) -> None:
    numbers = ~np.isnan(theirs.astype(np.float32))
    assert np.array_equal(numbers, ~np.isnan(ours.astype(np.float32)))
    assert ours[numbers].tobytes() == theirs[numbers].tobytes()


@given(problems())
@settings(max_examples=50)
def test_c_is_the_definition(problem: tuple[list[Array], list[float], str]) -> None:
    expected, over = summed(NumpySum, *problem)
    for kernel in KERNELS:
        for level in range(kernel.levels()):
            kernel.use(level)
            made, count = summed(CSum, *problem)
            same(made, expected)
            assert count == over


@pytest.mark.parametrize("numel", [1, 7, 2047, 2048, 2049, 10_000])
def test_every_pattern_and_every_length(numel: int) -> None:
    every = of_bits(np.resize(np.arange(1 << 16, dtype=np.uint16), numel), "bfloat16")
    other = np.random.default_rng(0).standard_normal(numel).astype(np.float32)
    for parts in ([every], [every, other], [other, every, every]):
        weights = [0.3, 0.7, -1.1][: len(parts)]
        for name in KINDS:
            expected = summed(NumpySum, parts, weights, name)[0]
            for kind in IMPLEMENTATIONS:
                same(summed(kind, parts, weights, name)[0], expected)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_torch_gives_the_same(kind: type[NumpySum], name: str) -> None:
    numbers = np.random.default_rng(1)
    a = numbers.standard_normal(5000).astype(DType.of("bfloat16").numpy)
    b = numbers.integers(0, 1 << 32, 5000, np.uint32).view(np.float32)
    total = to_torch(a).float() * 0.3 + to_torch(b) * 0.7
    exact = total.to(getattr(torch, name))
    made, over = summed(kind, [a, b], [0.3, 0.7], name)
    same(made, exact.view(torch.uint8).numpy().view(DType.of(name).numpy))
    assert over == int((total.isfinite() & ~exact.isfinite()).sum())


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_ties_go_to_even_and_what_is_too_large_is_counted(kind: type[NumpySum]) -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F7FFF, 0x7F7F8000, 0xFF7FFFFF, 0x7F800000], np.uint32)
    made, over = summed(kind, [bits.view(np.float32)], [1.0], "bfloat16")
    assert [hex(code) for code in made.view(np.uint16)] == [
        "0x3f80", "0x3f82", "0x3f81", "0x7f7f", "0x7f80", "0xff80", "0x7f80",
    ]  # fmt: skip
    assert over == 2


def test_what_is_not_aligned_is_copied() -> None:
    whole = np.frombuffer(b"\0" + np.arange(5, dtype=np.float32).tobytes(), np.uint8)
    part = whole[1:].view(np.float32)
    assert not part.flags.aligned
    for kind in IMPLEMENTATIONS:
        assert summed(kind, [part], [2.0], "float32")[0].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_kernel_refuses(kernel: Any) -> None:
    out, a = np.empty(4, np.float32), np.zeros(4, np.float32)
    for arguments, message in (
        ((out, 1, ()), "too many tensors, or none"),
        ((out, 1, ((a, 1, 1.0),) * (MOST + 1)), "too many tensors, or none"),
        ((out, 7, ((a, 1, 1.0),)), "no such kind of values"),
        ((out, 1, ((a, 7, 1.0),)), "no such kind of values"),
        ((out, 1, ((a, 0, 1.0),)), "the tensors have different sizes, or are not aligned"),
        ((out, 1, ((a, 1, 1.0), (a[:3], 1, 1.0))), "the tensors have different sizes, or are not aligned"),
        ((out.view(np.uint8)[:15], 1, ((a, 1, 1.0),)), "the result has no whole elements, or is not aligned"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel.weighted(*arguments)
    wrong: list[tuple[Any, ...]] = [
        (out, 1, [(a, 1, 1.0)]),
        (out, 1, ((a, 1.0),)),
        (bytes(4), 1, ((a, 1, 1.0),)),
    ]
    for each in wrong:
        with pytest.raises(TypeError):
            kernel.weighted(*each)


def test_which_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    f32 = DType.of("float32")
    for c in (True, False):
        monkeypatch.setattr(native, "uses_c", lambda c=c: c)
        assert type(weighted_sum([f32], [1.0], f32)) is (CSum if c else NumpySum)
    assert not takes([DType.of("float16")], f32)
    assert not takes([f32] * (MOST + 1), f32)
