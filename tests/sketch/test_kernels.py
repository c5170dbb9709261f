"""The kernels: the NumPy definition against plain arithmetic, and C against the definition."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_patterns import array_of_bits, arrays, long_arrays
from torchparams.sketch import kernels, native
from torchparams.sketch.kernels import Counted, NumpyTally, codes_of, group_counts, magnitude_codes, merge_counts, tally

NAMES = {
    "p8": "uint8",
    "p16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
    "i32": "int32",
    "u32": "uint32",
    "i64": "int64",
    "u64": "uint64",
}
HAS_C = native.BUILT
IMPLEMENTATIONS = ("numpy", "c") if HAS_C else ("numpy",)
UNITS = kernels.vector_units()


def raw(block: Any) -> Any:
    return block.view(np.uint8) if isinstance(block, np.ndarray) else block


def counted(kind: str, *blocks: Any, implementation: str = "numpy") -> Counted:
    made = tally(kind, implementation)
    for block in blocks:
        made.update(raw(block))
    return made.finish()


def plain(result: Counted) -> tuple[Any, ...]:
    signs = [np.signbit(v) if isinstance(v, float) else None for v in (result.min, result.max)]
    rest = [getattr(result, name) for name in ("zeros", "posinf", "neginf", "min", "max", "sum", "abs", "square")]
    return result.codes.tolist(), result.counts.tolist(), *rest, *signs


# --- the definition ------------------------------------------------------------------------------


def test_codes_of_patterns_are_the_patterns() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(codes_of("p16", bits), bits)
    assert np.array_equal(codes_of("p8", bits.astype(np.uint8)), bits & 255)


def test_codes_of_wide_floats_keep_sign_exponent_and_seven_bits() -> None:
    assert codes_of("f32", np.array([0x3F80FFFF, 0xFF800000], np.uint32)).tolist() == [0x3F80, 0xFF80]
    one = np.array([-1.0, 1 + 2**-7, 1 + 2**-8]).view(np.uint64)
    assert codes_of("f64", one).tolist() == [0xBFF << 7, (0x3FF << 7) + 1, 0x3FF << 7]


def test_codes_of_integers_ascend_with_the_values() -> None:
    values = np.array([-(2**63), -257, -256, -255, -1, 0, 1, 255, 256, 257, 258, 2**63 - 1], np.int64)
    codes = codes_of("i64", values.view(np.uint64)).tolist()
    assert codes == sorted(codes)
    assert [c - 32768 for c in codes[3:9]] == [-255, -1, 0, 1, 255, 256]


@given(st.integers(0, 2**64 - 1))
def test_magnitudes_of_one_code_are_within_a_128th(value: int) -> None:
    after = min(value + max(value // 128, 1), 2**64 - 1)
    code, following = magnitude_codes(np.array([value, after], np.uint64)).tolist()
    assert code == value if value < 256 else code >= 256
    assert following > code or after == 2**64 - 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["f32", "f64", "i32", "u32", "i64", "u64"])
@given(data=st.data())
def test_sums_are_those_of_fractions(kind: str, implementation: str, data: st.DataObject) -> None:
    array = data.draw(arrays(NAMES[kind]))
    found = counted(kind, array, implementation=implementation)
    values = [Fraction(v) for v in array.tolist() if np.isfinite(v)]
    unit = Fraction(2) ** kernels.UNIT[kind]
    assert found.sum * unit == sum(values)
    assert found.abs * unit == sum(map(abs, values))
    assert found.square * unit**2 == sum(v * v for v in values)
    assert found.min == min(values, default=None) and found.max == max(values, default=None)
    assert found.zeros == values.count(Fraction(0))
    assert (found.posinf, found.neginf) == (array.tolist().count(np.inf), array.tolist().count(-np.inf))
    assert found.counts.sum() == len(array)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extremes_of_zeros_are_positive_zeros(implementation: str) -> None:
    for kind, name in (("f32", np.float32), ("f64", np.float64)):
        found = counted(kind, np.array([-0.0, 0.0, -0.0], name), implementation=implementation)
        assert found.zeros == 3
        assert str(found.min) == str(found.max) == "0.0"


def test_counts_are_grouped_and_merged() -> None:
    codes, counts = group_counts(np.array([], np.uint32), np.array([], np.uint64))
    assert len(codes) == len(counts) == 0
    a = np.array([1, 5], np.uint32), np.array([2, 3], np.uint64)
    b = np.array([0, 5], np.uint32), np.array([1, 2**40], np.uint64)
    codes, counts = merge_counts([a, b, (np.zeros(0, np.uint32), np.zeros(0, np.uint64))])
    assert (codes.tolist(), counts.tolist()) == ([0, 1, 5], [1, 2, 2**40 + 3])


@settings(max_examples=20)
@given(st.lists(st.integers(1, 2**17), min_size=2, max_size=4), st.integers(0, 2**32))
def test_long_lists_of_counts_merge_as_short_ones(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    lists = [np.unique(rng.integers(0, 2 * size, size)).astype(np.uint32) for size in sizes]
    parts = [(codes, rng.integers(1, 2**40, len(codes)).astype(np.uint64)) for codes in lists]
    codes, counts = merge_counts(parts)
    expected = group_counts(np.concatenate([c for c, _ in parts]), np.concatenate([n for _, n in parts]))
    assert codes.dtype == np.uint32 and counts.dtype == np.uint64
    assert np.array_equal(codes, expected[0]) and np.array_equal(counts, expected[1])


# --- every implementation ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
@given(data=st.data())
def test_short_data_count_alike(kind: str, data: st.DataObject) -> None:
    array = data.draw(arrays(NAMES[kind]))
    expected = plain(counted(kind, array))
    for implementation in IMPLEMENTATIONS:
        assert plain(counted(kind, array, implementation=implementation)) == expected


@pytest.mark.parametrize("kind", NAMES)
def test_long_data_count_alike_in_every_vector_unit(kind: str) -> None:
    for about, array in long_arrays(NAMES[kind]).items():
        expected = plain(counted(kind, array))
        for unit in UNITS:
            kernels.use_vector_unit(unit)
            try:
                assert plain(counted(kind, array, implementation="c")) == expected, (about, unit)
            finally:
                kernels.use_vector_unit(UNITS[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", NAMES)
def test_cuts_and_order_do_not_show(kind: str, implementation: str) -> None:
    rng = np.random.default_rng(3)
    for about, array in long_arrays(NAMES[kind]).items():
        expected = plain(counted(kind, array, implementation=implementation))
        cuts = [0, *sorted(rng.integers(0, len(array), 7).tolist()), len(array)]
        blocks = [array[a:b].copy() for a, b in itertools.pairwise(cuts)]
        assert plain(counted(kind, *blocks, implementation=implementation)) == expected, about
        bits = array.view(f"u{array.itemsize}")
        assert plain(counted(kind, rng.permutation(bits), implementation=implementation)) == expected, about


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", NAMES)
def test_a_finished_tally_is_empty_again(kind: str, implementation: str) -> None:
    found = long_arrays(NAMES[kind])
    made = tally(kind, implementation)
    for about in ("random", "special", "normal", "constant", "spread"):
        for part in (found[about], found[about][:100].copy(), found[about]):
            made.update(raw(part))
            assert plain(made.finish()) == plain(counted(kind, part)), about
    assert plain(made.finish()) == plain(counted(kind))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", NAMES)
def test_many_values_of_one_code_are_not_lost(kind: str, implementation: str) -> None:
    # Narrow counters overflow; a tally that was meant for few values gets more.
    one = array_of_bits([1, 1, 3], NAMES[kind])
    made = tally(kind, implementation)
    for _ in range(3):
        made.update(raw(np.tile(one, 25_000)))
    found = made.finish()
    assert sorted(c for c in found.counts.tolist() if c) in ([75_000, 150_000], [225_000])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", NAMES)
def test_data_may_lie_at_any_address(kind: str, implementation: str) -> None:
    for array in long_arrays(NAMES[kind]).values():
        data = array[:9001].tobytes()
        shifted = np.frombuffer(b"x" + data, np.uint8)[1:]
        assert plain(counted(kind, shifted, implementation=implementation)) == plain(counted(kind, data))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flushed_subnormals_of_the_process_do_not_change_a_count(implementation: str) -> None:
    array = array_of_bits([1, 2**31 + 5, 2**22, 0x3F800000, 0x800000] * 40, "float32")
    expected = plain(counted("f32", array))
    torch.set_flush_denormal(True)
    try:
        found = counted("f32", array, implementation=implementation)
    finally:
        torch.set_flush_denormal(False)
    assert plain(found) == expected


# --- the extension -------------------------------------------------------------------------------


def test_c_refuses_half_an_element() -> None:
    for kind in NAMES if HAS_C else ():
        if kernels.ITEMSIZE[kind] > 1:
            with pytest.raises(ValueError, match="the data ends within an element"):
                tally(kind, "c").update(b"\0" * (kernels.ITEMSIZE[kind] + 1))


def test_a_vector_unit_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="vector unit 'abacus' is not available; available are "):
        kernels.use_vector_unit("abacus")


def test_c_refuses_what_is_no_tally() -> None:
    for size in (0, 8, 1000) if HAS_C else ():
        extension = importlib.import_module("torchparams.sketch._kernels")
        with pytest.raises(ValueError, match="not a tally"):
            extension.update(bytearray(size), 0, b"", True)
        for kind in (-1, 99):
            with pytest.raises(ValueError, match="no such kind of kernel"):
                extension.finish(np.zeros(extension.size() // 8, np.uint64), kind)
        for unit in (-1, 99):
            with pytest.raises(ValueError, match="this machine has no such vector unit"):
                extension.use(unit)


def test_where_there_is_a_compiler_both_implementations_are_tested() -> None:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    assert native.BUILT or shutil.which(compiler) is None


def test_it_says_which_kernels_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WANTED", "")
    if HAS_C:
        assert kernels.implementation() == f"C, {UNITS[-1]}"
    monkeypatch.setattr(native, "BUILT", False)
    assert kernels.implementation() == "NumPy, several times slower: the package was built without a C compiler"
    assert isinstance(tally("f32"), NumpyTally)


def test_the_environment_can_ask_for_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BUILT", True)
    monkeypatch.setattr(native, "WANTED", "numpy")
    assert isinstance(tally("f32"), NumpyTally)
    assert kernels.implementation() == "NumPy, several times slower: selected by TORCHPARAMS_KERNELS"


def run(code: str, **environment: str) -> str:
    path = os.pathsep.join(p for p in sys.path if p)
    everything = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=everything, capture_output=True, text=True, check=True
    ).stdout


USE = (
    "import numpy as np\n"
    "from torchparams.sketch import Sketch, kernels\n"
    "print(kernels.implementation().split(',')[0], Sketch.of(np.arange(4, dtype=np.float32)).mean)"
)


def test_without_the_extension_everything_works() -> None:
    assert run("import sys; sys.modules['torchparams.sketch._kernels'] = None\n" + USE) == "NumPy 1.5\n"
    assert run(USE, TORCHPARAMS_KERNELS="NumPy") == "NumPy 1.5\n"
