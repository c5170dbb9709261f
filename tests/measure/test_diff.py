"""`tp.diff`: results for two sources, against torch and NumPy in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchparams as tp
from bit_patterns import NUMERIC, array_of_bits, arrays, long_arrays
from torchparams.dtypes import DType
from torchparams.engines import ThreadEngine
from torchparams.errors import MismatchError, NoMatch, RenameError, SelectorError, UnknownName
from torchparams.io.packing import pack
from torchparams.testing import MemorySource, safetensors_bytes

if TYPE_CHECKING:
    from torchparams.measure.diff import Diff

Array = np.ndarray[Any, Any]
F32 = np.float32


def statuses(found: Diff) -> dict[str, str]:
    return {row.name: row.status for row in found}


def write(path: Path, tensors: dict[str, Array]) -> str:
    path.write_bytes(safetensors_bytes(tensors))
    return str(path)


# --- every type ----------------------------------------------------------------------------------


def values_of(array: Array) -> Array:
    if array.dtype.kind == "c":
        array = array.view({8: np.float32, 16: np.float64}[array.itemsize])
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


@pytest.mark.parametrize("name", NUMERIC)
def test_against_numpy_in_float64(name: str) -> None:
    kinds = long_arrays("float32" if name == "complex64" else "float64" if name == "complex128" else name)
    a = kinds["sparse" if name in ("bool", "float4_e2m1fn") else "scaled"]
    b = np.roll(a, 5)
    b[::3] = a[::3]
    if name.startswith("complex"):
        a, b = a[:-1].view(name), b[:-1].view(name)
    row = tp.diff(MemorySource({"w": a}), MemorySource({"w": b}))["w"]
    assert row.status == "changed"
    assert row.changed == sum(x.tobytes() != y.tobytes() for x, y in zip(a, b, strict=True))
    assert row.share == row.changed / len(a)
    x, y = values_of(a), values_of(b)
    finite = np.isfinite(x) & np.isfinite(y)
    assert (row.nan_a, row.nan_b) == (np.isnan(x[~np.isnan(y)]).sum(), np.isnan(y[~np.isnan(x)]).sum())
    x, y = x[finite], y[finite]
    if finite.all():
        assert row.max == abs(y - x).max()
    assert row.compared is not None
    if row.nan_a or row.nan_b:
        assert all(map(math.isnan, (row.max, row.relative, row.cosine)))
    found = replace(row.compared, nan_a=0, nan_b=0, infinite=0)
    assert found.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


@pytest.mark.parametrize("name", NUMERIC)
@given(data=st.data())
@settings(max_examples=8)
def test_a_tensor_is_identical_to_itself_and_counts_are_symmetric(name: str, data: st.DataObject) -> None:
    a, b = data.draw(arrays(name)), data.draw(arrays(name))
    n = min(len(a), len(b))
    left, right = MemorySource({"w": a[:n]}), MemorySource({"w": b[:n]})
    assert statuses(tp.diff(left, left)) == {"w": "identical"}
    assert statuses(tp.diff(left, left, numeric=True)) == {"w": "equal"}
    there, back = tp.diff(left, right)["w"], tp.diff(right, left)["w"]
    assert (there.status, there.changed, str(there.max)) == (back.status, back.changed, str(back.max))
    assert (there.nan_a, there.nan_b) == (back.nan_b, back.nan_a)


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float6_e2m3fn", "bfloat16", "complex64", "int64"])
def test_neither_blocks_nor_threads_show(name: str) -> None:
    kinds = long_arrays("float32" if name == "complex64" else name)
    sources = []
    for kind in ("normal", "spread"):
        a = np.concatenate([kinds["sorted"][:9000], kinds[kind], kinds["random"]])
        sources.append(MemorySource({"w": a[: len(a) // 2 * 2].view(np.complex64) if name == "complex64" else a}))
    found = [
        tp.diff(*sources, engine=ThreadEngine(threads, block_bytes=block, part_bytes=part))
        for threads, block, part in ((1, 1 << 20, 1 << 25), (1, 64, 64), (2, 1000, 4096), (2, 4096, 30_000))
    ]
    assert found[0]["w"].changed
    assert all(other.to_json() == found[0].to_json() for other in found)
    assert all(other["w"].compared == found[0]["w"].compared for other in found)


@pytest.mark.parametrize("name", ["float4_e2m1fn", "float6_e3m2fn"])
def test_packed_elements_of_a_file_and_those_in_memory(name: str, tmp_path: Path) -> None:
    dtype = DType.of(name)
    a = array_of_bits([1, 2, 3, 0, 5, 7, 7, 5], name)
    packed = pack(a, dtype).tobytes()
    header = json.dumps({"w": {"dtype": dtype.code, "shape": [8], "data_offsets": [0, len(packed)]}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + packed)
    assert statuses(tp.diff(file, MemorySource({"w": a}))) == {"w": "identical"}
    assert statuses(tp.diff(file, file)) == {"w": "identical"}
    b = array_of_bits([1, 2, 3, 0, 6, 7, 7, 5], name)
    row = tp.diff(file, MemorySource({"w": b}))["w"]
    assert (row.changed, row.max) == (1, abs(float(b[4]) - float(a[4])))


def test_a_nan_that_comes_goes_and_stays() -> None:
    a = array_of_bits([0x7FC00000, 0x7FC00000, 0x7FC00000, 0x3F800000, 0x3F800000], "float32")
    b = array_of_bits([0x7FC00000, 0x7FC00001, 0x3F800000, 0x7FC00000, 0x3F800000], "float32")
    for numeric, changed in ((False, 3), (True, 2)):
        found = tp.diff({"w": a}, {"w": b}, numeric=numeric)
        row = found["w"]
        assert (row.status, row.changed, row.nan_a, row.nan_b) == ("changed", changed, 1, 1)
        for numbers in (row, found.total.compared):
            assert math.isnan(numbers.relative) and math.isnan(numbers.cosine)
        assert math.isnan(row.max) and math.isnan(found.total.compared.greatest)
        assert [row.to_json()[key] for key in ("max", "relative", "cosine", "nan_a", "nan_b")] == ["nan"] * 3 + [1, 1]
        assert found.to_json()["total"]["max"] == "nan"
        assert "    NaN      NaN     NaN              1, 1" in str(found)


def test_a_nan_in_both_has_no_part_in_the_numbers() -> None:
    row = tp.diff({"w": np.array([math.nan, 3.0, 4.0])}, {"w": np.array([math.nan, 3.0, 3.0])})["w"]
    assert (row.changed, row.nan_a, row.nan_b, row.max, row.relative) == (1, 0, 0, 1, 0.2)


def test_an_infinity_that_comes_goes_turns_and_stays() -> None:
    inf = math.inf
    for a, b in (([inf, 1], [1, 1]), ([1, 1], [1, -inf]), ([inf, 1], [-inf, 1])):
        row = tp.diff({"w": np.array(a, F32)}, {"w": np.array(b, F32)})["w"]
        assert (row.changed, row.infinite, row.max, row.relative) == (1, 1, inf, inf)
        assert math.isnan(row.cosine)
        assert row.to_json()["infinite"] == 1
    row = tp.diff({"w": np.array([-inf, 3.0, 4.0])}, {"w": np.array([-inf, 3.0, 3.0])})["w"]
    assert (row.changed, row.infinite, row.max, row.relative) == (1, 0, 1, 0.2)
    largest = np.finfo(np.float64).max  # the difference alone is beyond float64
    row = tp.diff({"w": np.array([largest])}, {"w": np.array([-largest])})["w"]
    assert (row.infinite, row.max, row.relative, row.cosine) == (0, inf, 2, -1)


def test_no_difference_is_greater_than_a_nan() -> None:
    a = {name: np.array([1.0, 2.0]) for name in "abcd"}
    b = {"a": a["a"], "b": np.array([9.0, 9.0]), "c": np.array([1.0, math.nan]), "d": np.array([1.0, 3.0])}
    assert [row.name for row in tp.diff(a, b, sort="-max")][:3] == ["c", "b", "d"]
    assert [row.name for row in tp.diff(a, b, sort="-relative")][:3] == ["c", "b", "d"]
    assert next(iter(tp.diff(a, b, sort="cosine"))).name == "c"


def test_zeros_of_two_signs_are_changed_by_nothing() -> None:
    a, b = {"w": np.array([0.0, 1.0], F32)}, {"w": np.array([-0.0, 1.0], F32)}
    found = tp.diff(a, b)
    assert not found.same
    row = found["w"]
    assert (row.status, row.changed, row.max, row.relative, row.cosine) == ("changed", 1, 0, 0, 1)
    assert tp.diff(a, b, numeric=True).same


def test_tensors_that_begin_alike_have_whole_norms() -> None:
    a = np.linspace(1, 2, 5000, dtype=F32)
    b = a.copy()
    b[4900] = 7
    engine = ThreadEngine(1, block_bytes=1024)
    row = tp.diff({"w": a}, {"w": b}, engine=engine)["w"]
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert row.changed == 1
    assert row.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
    assert row.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)


def test_an_equal_tensor_has_numbers_of_its_own() -> None:
    row = tp.diff({"w": np.ones(3)}, {"w": np.ones(3)})["w"]
    assert (row.changed, row.share, row.max, row.relative, row.cosine) == (0, 0, 0, 0, 1)
    empty = tp.diff({"w": np.ones(0)}, {"w": np.ones(0)})["w"]
    assert (empty.status, empty.share) == ("identical", 0)


def test_packed_numbers_are_compared_by_their_bits(tmp_path: Path) -> None:
    packed = torch.tensor([0x21, 0x43, 0x65], dtype=torch.uint8)
    other = torch.tensor([0x21, 0x44, 0x65], dtype=torch.uint8)
    for name, tensor in (("a.pt", packed), ("b.pt", other)):
        torch.save({"w": tensor.view(torch.float4_e2m1fn_x2)}, tmp_path / name)
    assert tp.diff(tmp_path / "a.pt", tmp_path / "a.pt").same
    for numeric in (False, True):
        row = tp.diff(tmp_path / "a.pt", tmp_path / "b.pt", numeric=numeric)["w"]
        assert (row.status, row.changed) == ("changed", 1)
        assert all(map(math.isnan, (row.max, row.relative, row.cosine)))
    row = tp.diff(tmp_path / "a.pt", {"w": np.ones(3, F32)}, numeric=True)["w"]
    assert row.status == "dtype"


# --- across types --------------------------------------------------------------------------------


def test_another_dtype_is_said_and_not_compared() -> None:
    a = {"w": np.array([1, 2], F32)}
    found = tp.diff(a, {"w": np.array([1, 2], np.float64)})
    assert (found["w"].status, found["w"].compared, found.same) == ("dtype", None, False)
    assert math.isnan(found["w"].share)


@pytest.mark.parametrize(
    ("a", "b", "changed", "most"),
    [
        (np.array([1, 2.5], F32), np.array([1, 2.5], np.float64), 0, 0.0),
        (np.array([1, 0.1], F32), np.array([1, 0.1], np.float64), 1, abs(0.1 - float(F32(0.1)))),
        (np.array([1, 300], F32).astype(DType.of("bf16").numpy), np.array([1, 300], np.float16), 0, 0.0),
        (np.array([1, 2], np.int8), np.array([1, 2.5], F32), 1, 0.5),
        (np.array([True, False]), np.array([1, 1], np.int64), 1, 1),
        (np.array([-1, 2**62 + 1]), np.array([-1, 5], np.int8), 1, 2**62 - 4),
        (np.array([2**64 - 1, 1], np.uint64), np.array([1, 1], np.uint8), 1, 2**64 - 2),
        (np.array([2**63 + 2, 1], np.uint64), np.array([1, 1], np.int8), 1, 2**63 + 1),
        (np.array([2**53 + 1]), np.array([2**53], np.uint64), 1, 1),
        (np.array([2**53 + 1]), np.array([2.0**53]), 1, 1.0),
        (np.array([2**53 + 1]), np.array([2**53], F32), 1, 1.0),
        (np.array([2**53 + 1], np.uint64), np.array([2.0**53]), 1, 1.0),
        (np.array([2**53 + 1], np.uint64), np.array([2.0**53 + 2]), 1, 1.0),
        (np.array([-(2**63), 5]), np.array([2**64 - 1, 5], np.uint64), 1, 2**64 + 2**63 - 1),
        (np.array([-(2**63), 2**60]), np.array([-(2.0**63), 2.0**60]), 0, 0.0),
        (np.array([2**64 - 1, 2**63], np.uint64), np.array([2.0**64, 2.0**63]), 1, 1.0),
        (np.array([2**62 + 1, 7]), np.array([2.0**62, 7], np.complex128), 1, 1.0),
        (np.array([2**62 + 1, 7], np.uint64), np.array([2.0**62 + 3j, 7 + 0j], np.complex64), 1, 3.0),
        (np.array([2**53 + 1, 3]), np.array([1, 3], DType.of("bf16").numpy), 1, 2.0**53),
        (np.array([1 + 2j], np.complex64), np.array([1 + 2j], np.complex128), 0, 0.0),
        (np.array([1 + 2j], np.complex64), np.array([1], F32), 1, 2.0),
        (np.array([1], DType.of("float8_e4m3fn").numpy), np.array([1 + 1j], np.complex64), 1, 1.0),
        (np.array([math.nan, -0.0], F32), np.array([-math.nan, 0.0], np.float16), 0, 0.0),
    ],
)
def test_values_decide_when_asked(a: Array, b: Array, changed: int, most: float) -> None:
    for x, y in ((a, b), (b, a)):
        row = tp.diff(MemorySource({"w": x}), MemorySource({"w": y}), numeric=True)["w"]
        assert (row.status, row.changed, row.max) == ("changed" if changed else "equal", changed, most)


@pytest.mark.parametrize("name", NUMERIC)
def test_every_type_has_values(name: str) -> None:
    a = long_arrays("float32" if name == "complex64" else "float64" if name == "complex128" else name)["normal"]
    a = a[:-1].view(name) if name.startswith("complex") else a
    b = a.astype(np.complex128) if name.startswith("complex") else a.astype(np.float64)
    found = tp.diff(MemorySource({"w": a}), MemorySource({"w": b}), numeric=True)
    assert statuses(found) == {"w": "equal"}


@pytest.mark.parametrize("name", NUMERIC)
def test_values_of_any_two_types_compare_as_in_the_widest(name: str) -> None:
    def odd(dtype: str, seed: int) -> Array:
        codes = np.random.default_rng(seed).integers(0, 256, 16 * 200, np.uint8)
        codes[:64] = 0
        numpy = DType.of(dtype).numpy
        if DType.of(dtype).bits < 8:
            return (codes & ((1 << DType.of(dtype).bits) - 1)).view(numpy)[:200]
        return (codes & 1 if dtype == "bool" else codes).view(numpy)[:200].copy()

    def wide(x: Array, complexes: bool) -> Array:
        with np.errstate(all="ignore"):
            return x.astype(np.complex128) if complexes else x.astype(np.float64)

    a = odd(name, 0)
    for other in NUMERIC:
        b = odd(other, 1)
        if any("int64" in each for each in (name, other)):
            continue  # float64 does not hold all of them
        complexes = [each.startswith("complex") for each in (name, other)]
        if any(complexes) and not all(complexes):
            continue
        found, expected = (
            tp.diff(MemorySource({"w": x}), MemorySource({"w": y}), numeric=True)["w"]
            for x, y in ((a, b), (wide(a, any(complexes)), wide(b, any(complexes))))
        )
        for field in ("status", "changed", "nan_a", "nan_b", "infinite", "max", "relative", "cosine"):
            ours, theirs = getattr(found, field), getattr(expected, field)
            assert ours == theirs or (ours != ours and theirs != theirs), (other, field)


@pytest.mark.parametrize("name", ["int64", "uint64"])
def test_a_wide_integer_is_not_the_float_that_is_nearest(name: str) -> None:
    a = np.array([2**53 + 1, 2**60 + 3, 17], name)
    row = tp.diff({"w": a}, {"w": a.astype(np.float64)}, numeric=True)["w"]
    assert (row.status, row.changed, row.max) == ("changed", 2, 3.0)
    row = tp.diff({"w": a[2:]}, {"w": a[2:].astype(np.float64)}, numeric=True)["w"]
    assert row.status == "equal"
    found = tp.diff({"w": a}, {"w": np.array([math.nan, 1, math.inf])}, numeric=True)["w"]
    assert (found.changed, found.nan_b, found.infinite) == (3, 1, 1)


def test_sums_of_what_is_equal_do_not_depend_on_where_rows_are_cut() -> None:
    a = np.linspace(1, 2, 5000)
    a[4900] = 0.0
    b = a.copy()
    b[4900] = -0.0
    x, y = {"w": a, "v": np.ones(1)}, {"w": b, "v": np.zeros(1)}
    engines = [ThreadEngine(1, block_bytes=1024), ThreadEngine(1, block_bytes=1 << 20)]
    one, other = (tp.diff(x, y, numeric=True, engine=engine).to_json() for engine in engines)
    assert one == other
    assert one["total"]["relative"] == 1


# --- which tensors -------------------------------------------------------------------------------


def test_what_stands_on_one_side_and_what_has_another_shape() -> None:
    a = {"x": np.ones(2), "y": np.ones((2, 3)), "z": np.ones(1), "o": np.ones(4)}
    b = {"new": np.ones(1), "z": np.zeros(1), "y": np.ones((3, 2)), "x": np.ones(2)}
    found = tp.diff(a, b)
    assert statuses(found) == {"x": "identical", "y": "shape", "z": "changed", "o": "only_a", "new": "only_b"}
    assert [row.name for row in found.differing] == ["y", "z", "o", "new"]
    assert found.counts == {"identical": 1, "equal": 0, "changed": 1, "shape": 1, "dtype": 0, "only_a": 1, "only_b": 1,
                            "unread": 0}  # fmt: skip
    assert len(found) == 5
    with pytest.raises(UnknownName, match="No parameter is named 'znew'"):
        found["znew"]


def test_a_selection_is_of_either_side() -> None:
    a = {"m.x": np.ones(2), "m.y": np.ones(1), "n": np.ones(1)}
    b = {"m.x": np.ones(2, F32), "m.z": np.ones(1), "n": np.zeros(1)}
    assert statuses(tp.diff(a, b, "m.*")) == {"m.x": "dtype", "m.y": "only_a", "m.z": "only_b"}
    assert statuses(tp.diff(a, b, "m.z | [dtype=f32]")) == {"m.x": "dtype", "m.z": "only_b"}
    assert statuses(tp.diff(a, b, "k.*", strict=False)) == {}
    with pytest.raises(NoMatch) as caught:
        tp.diff(a, b, "m.z | k.*")
    assert "`k.*` matches nothing" in str(caught.value)
    assert tp.diff(a, b, "m.z").selector == "m.z"


def test_a_table_of_a_part_is_compared_as_it_is() -> None:
    a, b = tp.of({"x": np.ones(2), "y": np.ones(1)}), {"x": np.ones(2), "y": np.zeros(1)}
    assert statuses(tp.diff(a.select("x"), b)) == {"x": "identical", "y": "only_b"}


def test_what_only_one_side_records_can_be_asked_for() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert statuses(tp.diff(model, state, ":trainable")) == {"weight": "identical"}
    with pytest.raises(SelectorError):
        tp.diff(state, state, ":trainable")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(2), persistent=False)


def test_a_model_and_what_was_saved_of_it(tmp_path: Path) -> None:
    model = Net()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = tp.diff(model, tmp_path / "a.pt")
    assert found.same
    assert "mask" not in statuses(found)
    assert statuses(found)["norm.running_mean"] == "identical"
    with torch.no_grad():
        model.get_buffer("norm.running_mean").add_(1)
    assert [row.name for row in tp.diff(tmp_path / "a.pt", model).differing] == ["norm.running_mean"]


def test_ties_answer_to_all_of_their_names() -> None:
    model = Net()
    weight = model.embed.weight.detach().numpy()
    others = {name: t.numpy() for name, t in model.state_dict().items() if "norm" in name}
    for mine in ({"embed.weight": weight}, {"head.weight": weight}, {"embed.weight": weight, "head.weight": weight}):
        state = {**{name: value.copy() for name, value in mine.items()}, **others}
        assert tp.diff(model, state).same
        assert tp.diff(state, model).same
    # A tie that was broken: one of the two is another tensor now.
    state = {"embed.weight": weight, "head.weight": weight + 1, **others}
    assert [(row.name, row.status) for row in tp.diff(model, state).differing] == [("head.weight", "changed")]
    assert [(row.name, row.status) for row in tp.diff(state, model).differing] == [("head.weight", "changed")]


def test_values_that_cannot_be_had_are_said_to_be_so() -> None:
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    found = tp.diff(nn.Linear(2, 2), empty)
    assert statuses(found) == {"weight": "unread", "bias": "unread"}
    assert not found.same
    assert found["bias"].reason.startswith("'bias' is on the meta device, which holds no values")
    lazy = nn.LazyLinear(2)
    assert statuses(tp.diff(lazy, lazy)) == {"weight": "unread", "bias": "unread"}
    assert "not compared" in str(found)


# --- renames -------------------------------------------------------------------------------------

BASE = {"a.w": np.ones(2), "b.w": np.zeros(3)}
WRAPPED = {"module.a.w": np.ones(2), "module.b.w": np.zeros(3), "epoch": np.ones(())}


def test_a_rename_is_proposed_and_used_when_asked() -> None:
    found = tp.diff(BASE, WRAPPED)
    assert found.rename is None
    assert str(found.proposal) == "strip 'module.' from 2 of 3 names"
    assert found.counts["only_a"] == 2
    assert "more names match with --rename auto (rename='auto'): strip 'module.' from 2 of 3 names" in str(found)
    found = tp.diff(BASE, WRAPPED, rename="auto")
    assert statuses(found) == {"a.w": "identical", "b.w": "identical", "epoch": "only_b"}
    assert found["a.w"].b is not None
    assert found["a.w"].b.name == "module.a.w"
    assert found.proposal is None
    assert "names of B: strip 'module.' from 2 of 3 names" in str(found)
    back = tp.diff(WRAPPED, BASE, rename="auto", selector="module.**")
    assert statuses(back) == {"module.a.w": "identical", "module.b.w": "identical"}


def test_nothing_is_proposed_where_names_meet() -> None:
    assert tp.diff(BASE, BASE).proposal is None
    assert tp.diff(BASE, BASE, rename="auto").rename is None


@pytest.mark.parametrize("rename", [r"^module\.=", [(r"^module\.", "")], lambda name: name.removeprefix("module.")])
def test_renames_of_every_spelling(rename: object) -> None:
    assert statuses(tp.diff(BASE, WRAPPED, "*.w", rename=rename)) == {"a.w": "identical", "b.w": "identical"}


def test_a_rename_applies_to_ties_and_to_selections() -> None:
    model = nn.ModuleDict({"net": Net()})
    state = {name: t.clone() for name, t in Net().state_dict().items() if name == "head.weight"}
    found = tp.diff(state, model, "head.*", rename=r"^net\.=")
    assert statuses(found) == {"head.weight": "changed"}
    assert statuses(tp.diff(BASE, WRAPPED, "step", rename={"epoch": "step"})) == {"step": "only_b"}


def test_renames_that_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"'module.a.w' and 'module.b.w' would both be named 'w'"):
        tp.diff(BASE, WRAPPED, rename=r"^module\.[ab]\.=")
    with pytest.raises(NoMatch, match="matches no name"):
        tp.diff(BASE, WRAPPED, rename="nothing=x")
    with pytest.raises(RenameError, match="'automatic' is not a rename"):
        tp.diff(BASE, WRAPPED, rename="automatic")


# --- groups and order ----------------------------------------------------------------------------


def layered(changed: int) -> dict[str, Array]:
    tensors = {f"h.{i}.{part}.weight": np.full(4, 2.0) for i in range(3) for part in ("q", "k")}
    tensors[f"h.{changed}.q.weight"] = np.array([2.0, 2.0, 2.0, 1.0])
    return tensors


def test_by_layer() -> None:
    found = tp.diff(layered(0), layered(2), by="layer")
    assert found.by == ("layer",)
    assert [(g.name, g.tensors, g.differing, g.share) for g in found.groups] == [
        ("h.0", 2, 1, 1 / 8), ("h.1", 2, 0, 0.0), ("h.2", 2, 1, 1 / 8)
    ]  # fmt: skip
    assert found.groups[0].compared.relative == pytest.approx(1 / math.sqrt(13))
    assert found.groups[1].cosine == 1
    assert found.total.tensors == 6
    assert found.total.compared.relative == pytest.approx(math.sqrt(2 / 29))


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("module", ["h.0.q", "h.0.k", "h.1.q", "h.1.k", "h.2.q", "h.2.k"]),
        (1, ["h"]),
        ("2", ["h.0", "h.1", "h.2"]),
        (["1"], ["h"]),
        (["**.q.*"], ["**.q.*", "(rest)"]),
        ("dtype", ["float64"]),
    ],
)
def test_other_groups(by: object, names: list[str]) -> None:
    assert [group.name for group in tp.diff(layered(0), layered(1), by=by).groups] == names


def test_groups_that_are_refused() -> None:
    with pytest.raises(SelectorError, match="The number of name components to group by must be at least 1, not 0"):
        tp.diff(BASE, BASE, by=0)
    with pytest.raises(NoMatch):
        tp.diff(BASE, BASE, by="nothing.*")


def test_a_tensor_of_b_alone_is_in_the_group_of_its_new_name() -> None:
    found = tp.diff({"x.a": np.ones(1)}, {"y.b": np.ones(1)}, rename="^y=x", by="module")
    assert [(group.name, group.tensors, group.differing) for group in found.groups] == [("x", 2, 2)]


def test_order() -> None:
    a = {name: np.array([1.0, 1.0]) for name in "abcd"}
    b = {"a": np.array([1.0, 2.0]), "b": np.array([5.0, 2.0]), "c": np.array([1.0, 1.0])}
    assert [row.name for row in tp.diff(a, b, sort="-max")] == ["b", "a", "c", "d"]
    assert [row.name for row in tp.diff(a, b, sort="share")] == ["c", "a", "b", "d"]
    with pytest.raises(SelectorError) as caught:
        tp.diff(a, b, sort="size")
    assert str(caught.value) == (
        "No column 'size' to sort by. Columns are name, numel, changed, share, max, relative, cosine."
    )


# --- how it looks --------------------------------------------------------------------------------


def test_what_is_identical_is_said_in_a_line() -> None:
    assert str(tp.diff(BASE, BASE)) == (
        "A  mapping of 2 tensors\nB  mapping of 2 tensors\nidentical, bit for bit: 2 tensors, 5 elements"
    ).replace("mapping of 2 tensors", tp.of(BASE).source.label)
    assert str(tp.diff(BASE, BASE, numeric=True)).endswith("equal in value: 2 tensors, 5 elements")


def test_where_nothing_is_compared_nothing_is_the_same() -> None:
    nothing = tp.diff({}, {"step": 1})
    assert not nothing.same
    assert str(nothing).endswith("nothing was compared: neither source has tensors")


def test_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    both: dict[str, Array] = {"same": np.ones(9, F32)}
    a = {"x": np.arange(4, dtype=F32), "y": np.ones(3, F32), "head": np.ones((2, 3), F32), "t": np.ones(1, F32)}
    b = {"x": np.array([0, 1, 2, 4], F32), "y": np.array([1, 1, math.nan], F32), "head": np.ones((3, 3), F32)}
    a = {**a, "old": np.ones(1, F32), **both}
    b = {**b, "t": np.ones(1, np.float16), "new": np.ones(2, F32), **both}
    write(Path("a.safetensors"), a)
    write(Path("b.safetensors"), b)
    assert str(tp.diff("a.safetensors", "b.safetensors")) == (
        "A  a.safetensors\n"
        "B  b.safetensors\n"
        "changed  shape  elements  max |Δ|  rel. L2   cosine  NaN in A, B only\n"
        "x        [4]      25.0 %        1   0.2673  0.99146              0, 0\n"
        "y        [3]      33.3 %      NaN      NaN      NaN              0, 1\n"
        "─────────────────────────────────────────────────────────────────────\n"
        "total             12.5 %      NaN      NaN      NaN\n"
        "of different shape  in A            in B\n"
        "head                [2, 3] float32  [3, 3] float32\n"
        "of different dtype  in A         in B\n"
        "t                   [1] float32  [1] float16\n"
        "only in A  shape  dtype\n"
        "old        [1]    float32\n"
        "only in B  shape  dtype\n"
        "new        [2]    float32\n"
        "2 changed · 1 of different shape · 1 of different dtype · 1 only in A · 1 only in B · 1 identical\n"
        "to compare values across dtypes, pass --numeric (numeric=True)"
    )
    assert str(tp.diff("a.safetensors", "b.safetensors", "t | x", numeric=True)) == (
        "A  a.safetensors\n"
        "B  b.safetensors\n"
        "changed  shape  elements  max |Δ|  rel. L2   cosine\n"
        "x        [4]      25.0 %        1   0.2673  0.99146\n"
        "1 changed · 1 equal in value"
    )
    assert str(tp.diff("a.safetensors", "b.safetensors", "x | y | same", by="module")) == (
        "A  a.safetensors\n"
        "B  b.safetensors\n"
        "by module    differ  tensors  elements  max |Δ|  rel. L2  cosine\n"
        "(top level)       2        3    12.5 %      NaN      NaN     NaN\n"
        "────────────────────────────────────────────────────────────────\n"
        "total             2        3    12.5 %      NaN      NaN     NaN\n"
        "2 changed · 1 identical"
    )


def test_types_are_a_column_where_they_differ() -> None:
    text = str(tp.diff({"w": np.array([0.1], F32)}, {"w": np.array([0.1])}, numeric=True))
    assert "w        [1]    float32 → float64     100 %" in text


def test_the_middle_of_many_is_left_out() -> None:
    a, b = {f"w{i}": np.zeros(1) for i in range(100)}, {f"w{i}": np.ones(1) for i in range(100)}
    text = str(tp.diff(a, b, limit=4))
    assert "… 96 more tensors …" in text
    assert [line.split()[0] for line in text.splitlines()[3:8]] == ["w0", "w1", "…", "w98", "w99"]
    assert len(str(tp.diff(a, b, limit=None)).splitlines()) == 106


def test_json_is_json_and_has_no_rows_of_what_is_the_same() -> None:
    a = {"w": np.array([0.0, 1.0]), "v": np.zeros(1), "i": np.array([1.0])}
    b = {"w": np.array([1.0, math.inf]), "v": np.zeros(1), "n": np.ones(1)}
    found = json.loads(json.dumps(tp.diff(a, b, "w | v | n", by="module", rename={"n": "n2"}, strict=False).to_json()))
    assert found["same"] is False
    assert found["counts"] == {"identical": 1, "equal": 0, "changed": 1, "shape": 0, "dtype": 0, "only_a": 0,
                               "only_b": 1, "unread": 0}  # fmt: skip
    assert found["tensors"][1]["name"] == "n2"  # also selected by what B calls it
    assert found["tensors"][1]["a"] is None
    assert found["tensors"][1]["b"]["name"] == "n"
    assert found["tensors"][:1] == [
        {
            "name": "w",
            "status": "changed",
            "a": {"name": "w", "shape": [2], "dtype": "float64"},
            "b": {"name": "w", "shape": [2], "dtype": "float64"},
            "numel": 2,
            "changed": 2,
            "share": 1.0,
            "max": "inf",
            "relative": "inf",
            "cosine": "nan",
            "sqnr": "-inf",
            "nan_a": 0,
            "nan_b": 0,
            "infinite": 1,
            "reason": None,
        }
    ]
    assert found["by"] == ["module"]
    assert found["groups"][0]["name"] == "(top level)"
    assert found["proposal"] is None
    assert tp.diff(BASE, WRAPPED).to_json()["proposal"] == "strip 'module.' from 2 of 3 names"
    assert found["rename"]["rules"] == [{"names": {"n": "n2"}}]


def test_notebooks_show_a_table() -> None:
    assert "<table>" in tp.diff({"w": np.ones(1)}, {"w": np.zeros(1)})._repr_html_()
    assert repr(tp.diff(BASE, BASE)).startswith("A  ")


# --- cost ----------------------------------------------------------------------------------------


class Counting(MemorySource):
    """Counts the arrays that it gives."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        super().__init__(tensors)
        self.given = 0

    def numpy(self, name: str) -> Array:
        self.given += 1
        return super().numpy(name)


def test_every_tensor_is_read_once() -> None:
    n = 300
    a = Counting({f"a.{i}.w": np.full(3, float(i)) for i in range(n)})
    b = Counting({f"a.{i}.w": np.full(3, float(i % 7)) for i in range(n)})
    assert tp.diff(a, b).counts["changed"] == n - 7
    assert (a.given, b.given) == (n, n)


def test_nothing_is_read_of_tensors_that_do_not_go_together() -> None:
    a, b = Counting({"w": np.ones(3), "x": np.ones(1)}), Counting({"w": np.ones(4), "y": np.ones(1)})
    assert not tp.diff(a, b).same
    assert (a.given, b.given) == (0, 0)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    tp.diff(BASE, BASE, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (80, 80)


def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"w": np.ones(3, F32)})
    table = tp.of(file)
    assert table.names == ["w"]
    Path(file).write_bytes(b"")
    with pytest.raises(tp.errors.SourceError):
        tp.diff(table, table)


def test_a_row_is_found_without_a_search() -> None:
    weights = {f"w{i}": np.full(1, i) for i in range(50)}
    found = tp.diff(weights, weights)
    assert found["w3"] is found.rows[3] and found._by_name is found._by_name
    assert found.sorted("-name")["w3"] is found.rows[3]
