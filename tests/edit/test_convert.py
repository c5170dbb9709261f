"""convert: from every source to every format, compared with torch and safetensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import torchparams as tp
from bit_patterns import NUMERIC
from torch_files import saved, written, zipped
from torchparams.dtypes import DType
from torchparams.errors import MismatchError, NoMatch, NotReadable, PlanError, UnknownName
from torchparams.testing import MemorySource, safetensors_bytes, sample, to_torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Array = np.ndarray[Any, Any]
STORABLE = [name for name in NUMERIC if DType.of(name).code]


def contents(path: object) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every name, aliases included, with type, shape and bits."""
    table = tp.of(str(path))
    return {
        name: (str(info.dtype), info.shape or (), np.ascontiguousarray(table.numpy(info.name)).tobytes())
        for info in table.infos.values()
        for name in (info.name, *info.aliases)
    }


def expected(arrays: Mapping[str, Array]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(DType.of(a.dtype)), a.shape, np.ascontiguousarray(a).tobytes()) for name, a in arrays.items()}


def refusal(error: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        tp.convert(*arguments, **options)
    return str(caught.value)


SOME = {"a.weight": sample("float32", (3, 4)), "a.bias": sample("bfloat16", (4,)), "count": np.array(3)}


# --- formats ---------------------------------------------------------------------------------


@given(
    chosen=st.lists(
        st.tuples(st.sampled_from(STORABLE), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6
    ),
    most=st.integers(1, 200),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_there_and_back_is_bit_for_bit(tmp_path: Path, chosen: list[tuple[str, list[int]]], most: int) -> None:
    arrays = {}
    for i, (name, shape) in enumerate(chosen):
        array = sample(name, tuple(shape))
        if array.size * DType.of(name).bits % 8 == 0:
            arrays[f"{i}.{name}"] = array
    if not arrays:
        return
    one, shards, joined = tmp_path / "one.safetensors", tmp_path / "shards", tmp_path / "joined.safetensors"
    tp.convert(arrays, one, overwrite=True).run()
    tp.convert(one, shards, max_shard_size=most, overwrite=True).run()
    tp.convert(shards, joined, overwrite=True).run()
    assert contents(one) == contents(shards) == contents(joined) == expected(arrays)
    assert list(contents(joined)) == list(arrays)
    if all(DType.of(array.dtype).bits >= 8 for array in arrays.values()):
        through = tmp_path / "through.pt"
        tp.convert(shards, through, overwrite=True).run()
        tp.convert(through, joined, overwrite=True).run()
        assert contents(through) == contents(joined) == expected(arrays)


@pytest.mark.parametrize("name", [n for n in STORABLE if DType.of(n).torch_name and n != "float8_e8m0fnu"])
def test_safetensors_reads_every_type(name: str, tmp_path: Path) -> None:
    array = sample(name, (3, 5))
    path = tmp_path / "x.safetensors"
    tp.convert({"before": sample("uint8", (3,)), "w": array, "empty": sample(name, (0, 2))}, path).run()
    with safe_open(path, "pt") as file:
        assert file.get_tensor("w").view(torch.uint8).numpy().tobytes() == array.tobytes()
        assert file.get_tensor("empty").shape == (0, 2)
        assert file.metadata() == {"format": "pt"}
    assert load_file(path)["w"].dtype == DType.of(name).torch


def test_tensors_are_aligned_and_listed_in_their_own_order(tmp_path: Path) -> None:
    arrays = {"a": sample("uint8", (3,)), "b": sample("float64", (2,)), "c": sample("bfloat16", (1,)), "d": np.ones(2)}
    path = tmp_path / "x.safetensors"
    tp.convert(arrays, path).run()
    infos = tp.of(path).infos
    assert list(infos) == list(arrays)
    for info in infos.values():
        assert info.location is not None
        assert info.location.start % info.dtype.itemsize == 0
    with safe_open(path, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("b"), arrays["b"])


@pytest.mark.parametrize("make", [saved, lambda state: saved(state, legacy=True)])
def test_from_torch_files_of_both_formats(make: Any, tmp_path: Path) -> None:
    state = {name: to_torch(array) for name, array in SOME.items()}
    source = written(tmp_path, make(state))
    tp.convert(source, tmp_path / "x.safetensors").run()
    assert contents(tmp_path / "x.safetensors") == expected(SOME)
    tp.convert(source, tmp_path / "x.bin").run()
    for name, tensor in torch.load(tmp_path / "x.bin", weights_only=True).items():
        assert torch.equal(tensor, state[name])


def test_from_a_compressed_file(tmp_path: Path) -> None:
    from torch_files import members_of

    big = torch.arange(1000.0)
    plain = saved({"a": big[:500], "b": big[500:], "c": torch.arange(50)})
    source = written(tmp_path, zipped(members_of(plain), deflate=True))
    plan = tp.convert(source, tmp_path / "x.safetensors")
    assert plan.copied == 0
    plan.run()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], big[500:])
    assert refusal(PlanError, source, tmp_path / "y.safetensors", memory=900) == (
        "'a': It needs 3.91 KiB of memory; the limit is 900 B. Raise the limit: memory=… (--memory)."
    )


def test_from_a_network_what_its_state_dict_holds(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model.register_buffer("passing", torch.zeros(2), persistent=False)
    plan = tp.convert(torch.nn.DataParallel(model), tmp_path / "x.safetensors")
    assert plan.dropped == (("passing", "a non-persistent buffer"),)
    plan.run()
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_from_arrays_of_any_layout(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 12)
    views = {"t": array.T, "r": array[::-1, ::2], "o": array[:, 3:5], "f": np.asfortranarray(array)}
    tp.convert(views, tmp_path / "x.safetensors", shared="clone").run()
    tp.convert(views, tmp_path / "x.pt").run()
    assert contents(tmp_path / "x.safetensors") == expected(views)
    for name, tensor in torch.load(tmp_path / "x.pt", weights_only=True).items():
        assert torch.equal(tensor, torch.from_numpy(views[name].copy()))


def test_elements_of_four_bits_go_to_torch_in_pairs_and_back(tmp_path: Path) -> None:
    array = sample("float4_e2m1fn", (3, 8))
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"w": array}))
    tp.convert(tmp_path / "x.safetensors", tmp_path / "x.pt").run()
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)["w"]
    assert (loaded.dtype, tuple(loaded.shape)) == (torch.float4_e2m1fn_x2, (3, 4))
    tp.convert(tmp_path / "x.pt", tmp_path / "y.safetensors").run()
    assert contents(tmp_path / "y.safetensors") == contents(tmp_path / "x.safetensors")
    tp.convert({"w": loaded}, tmp_path / "live.safetensors").run()
    assert contents(tmp_path / "live.safetensors") == contents(tmp_path / "x.safetensors")
    tp.convert({"w": array}, tmp_path / "live.pt").run()
    again = torch.load(tmp_path / "live.pt", weights_only=True)["w"]
    assert torch.equal(again.view(torch.uint8), loaded.view(torch.uint8))
    assert refusal(PlanError, {"w": sample("float4_e2m1fn", (2, 3))}, tmp_path / "z.pt") == (
        "'w': torch stores float4_e2m1fn in pairs, but the last dimension is 3"
    )


# --- what formats cannot hold ----------------------------------------------------------------


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    assert refusal(PlanError, {"w": sample("complex128", (2,))}, tmp_path / "x.safetensors") == (
        "'w': safetensors has no dtype for complex128. Write a torch file (.pt), or exclude it with -s '~[dtype=…]'."
    )
    assert refusal(PlanError, {"w": sample("float6_e2m3fn", (4,))}, tmp_path / "x.pt") == (
        "'w': torch has no dtype for float6_e2m3fn. Write a .safetensors file."
    )
    assert refusal(PlanError, {"w": sample("float4_e2m1fn", (3,))}, tmp_path / "x.safetensors") == (
        "'w': 3 elements of 4 bits do not fill a whole number of bytes"
    )
    assert refusal(PlanError, {"__metadata__": np.ones(1)}, tmp_path / "x.safetensors") == (
        "The name '__metadata__' is reserved in safetensors files. Rename it."
    )
    assert refusal(NotReadable, {"w": torch.zeros(2, device="meta")}, tmp_path / "x.safetensors") == (
        "dict: 'w' is on the meta device, and has no values"
    )
    assert refusal(NotReadable, {"w": torch.eye(2).to_sparse()}, tmp_path / "x.safetensors").startswith(
        "dict: 'w': A sparse tensor"
    )
    assert refusal(PlanError, {}, tmp_path / "x.safetensors") == "dict: It holds no tensors"
    assert list(tmp_path.iterdir()) == []


# --- names -----------------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    arrays = {"model.a.gamma": np.ones(1), "model.b.gamma": np.zeros(2), "step": np.array(1)}
    plan = tp.convert(arrays, tmp_path / "x.safetensors", strip_prefix="model.", rename=["gamma$=weight", ("^b", "c")])
    assert [output.name for output in plan.outputs] == ["a.weight", "c.weight", "step"]
    path = tmp_path / "x.safetensors"
    assert refusal(MismatchError, arrays, path, rename=r"\.[ab]\.=.") == (
        "dict: 'model.a.gamma' and 'model.b.gamma' would both be named 'model.gamma'"
    )
    assert refusal(NoMatch, arrays, path, rename="beta=bias") == "dict: The rename pattern 'beta' matches no name"
    assert refusal(NoMatch, arrays, path, strip_prefix="net.") == (
        "dict: No name starts with the prefix 'net.' to strip"
    )
    refusal(UnknownName, arrays, path, rename={"nothing": "something"})
    with pytest.raises(NoMatch):
        tp.convert(arrays, path, "head.**")
    assert len(tp.convert(arrays, path, "head.** | step", strict=False).outputs) == 1


def test_a_selection_says_how_much_it_is(tmp_path: Path) -> None:
    plan = tp.convert(SOME, tmp_path / "x.safetensors", "a.**")
    assert plan.notes == ("selected: 2 of 3 tensors",)
    assert [output.name for output in tp.convert(tp.of(SOME).select("count"), tmp_path / "y.safetensors").outputs] == [
        "count"
    ]


# --- element types ---------------------------------------------------------------------------


def test_a_type_for_all_floats_and_for_some(tmp_path: Path) -> None:
    weights = {
        "l.weight": np.array([1.0, 0.1, 1e-30], np.float32),
        "l.norm.weight": np.array([1.0], np.float32),
        "half": np.array([0.5, 3.0], np.float16),
        "position": np.arange(3),
    }
    path = tmp_path / "x.safetensors"
    plan = tp.convert(weights, path, dtype={"**": "f16", "**.norm.**": torch.float32, "position": "i32"})
    assert plan.notes == ("not cast, because of another kind: 1 tensor of int64",)
    report = plan.run()
    loaded = load_file(path)
    assert {name: str(t.dtype) for name, t in loaded.items()} == {
        "l.weight": "torch.float16",
        "l.norm.weight": "torch.float32",
        "half": "torch.float16",
        "position": "torch.int32",
    }
    assert torch.equal(loaded["l.weight"], torch.from_numpy(weights["l.weight"]).half())
    assert [tuple(cast.to_json().values()) for cast in report.casts] == [
        ("l.weight", "float32", "float16", 3, 0, 1, 2),
        ("position", "int64", "int32", 3, 0, 0, 0),
    ]
    assert list(report.casts[0].to_json()) == ["name", "from", "to", "numel", "overflow", "underflow", "changed"]
    assert "l.weight  float32  float16      3         0          1        2" in str(report)
    assert "1 tensor cast without a change in value" in str(report)
    everything = tp.convert(weights, path, dtype="bf16", overwrite=True)
    assert [str(output.expression.dtype) for output in everything.outputs] == ["bfloat16"] * 3 + ["int64"]


def test_overflow_is_refused_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weights = {"a": np.array([1e6, -1e30, 2.0], np.float32), "b": np.array([7e4], np.float32)}
    path.write_text("old")
    with pytest.raises(PlanError) as caught:
        tp.convert(weights, path, dtype="f16", overwrite=True).run()
    assert str(caught.value) == (
        f"{path}: 2 values of 'a' are too large for float16, also in 1 other tensor. Nothing was written. "
        "Choose a wider dtype, or pass allow_overflow=True (--allow-overflow)."
    )
    assert [child.name for child in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_text() == "old"
    report = tp.convert(weights, path, dtype="f16", overwrite=True, allow_overflow=True).run()
    assert [cast.losses.overflow for cast in report.casts] == [2, 1]
    assert load_file(path)["b"].item() == float("inf")


def test_types_that_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert refusal(PlanError, SOME, path, dtype="int8") == (
        "dict: All floating-point tensors cannot be cast to int8. "
        "Choose a floating-point dtype, or cast a selection: {selector: dtype}."
    )
    assert refusal(PlanError, SOME, path, dtype={"a.weight": "int8"}) == (
        "dict: 'a.weight': Cannot cast float32 to int8. Cast floats to floats, and integers to integers."
    )
    assert refusal(PlanError, SOME, path, dtype="f8_e8m0") == "a.weight: Dtype float32 cannot be cast to float8_e8m0fnu"
    assert refusal(PlanError, SOME, path, dtype="bf17").startswith("Unknown dtype 'bf17'")
    with pytest.raises(NoMatch):
        tp.convert(SOME, path, dtype={"nothing": "bf16"})


# --- metadata --------------------------------------------------------------------------------


def test_metadata(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt", "author": "ä"})
    tp.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", metadata={"more": "x", "author": "b"}).run()
    assert tp.of(tmp_path / "b.safetensors").metadata == {"format": "pt", "author": "b", "more": "x"}
    plan = tp.convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert plan.dropped == (("author", "metadata; a torch file cannot store it"),)
    assert refusal(PlanError, tmp_path / "a.safetensors", tmp_path / "b.pt", metadata={"a": "b"}).endswith(
        "b.pt: A torch file cannot store metadata. Write a .safetensors file."
    )
    assert refusal(PlanError, tmp_path / "a.safetensors", tmp_path / "c.safetensors", metadata={"a": 1}).endswith(
        "c.safetensors: safetensors metadata must be text, but 'a' is 1"
    )


def test_other_entries_of_a_checkpoint_are_listed_as_not_written(tmp_path: Path) -> None:
    source = written(tmp_path, saved({"epoch": 3, "model": {"w": torch.ones(2)}, "args": {"lr": 0.1}}))
    plan = tp.convert(source, tmp_path / "x.safetensors")
    assert [name for name, _ in plan.dropped] == ["epoch", "args"]
    assert "not written: epoch (not a tensor), args (not a tensor)" in str(plan)
    assert "not written: epoch (not a tensor), args (not a tensor)" in str(plan.run())


def test_the_metadata_of_shards_and_of_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"author": "x"})
    tp.convert(tmp_path / "a.safetensors", tmp_path / "out", max_shard_size=8).run()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 16},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    index["metadata"]["note"] = {"kept": [1]}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    tp.convert(tmp_path / "out", tmp_path / "again", max_shard_size=8).run()
    again = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert again["metadata"] == {"note": {"kept": [1]}, "total_size": 16}
    tp.convert(tmp_path / "out", tmp_path / "joined.safetensors").run()
    assert tp.of(tmp_path / "joined.safetensors").metadata == {"author": "x"}


# --- shards ----------------------------------------------------------------------------------


def test_shards_hold_as_much_as_they_may(tmp_path: Path) -> None:
    arrays = {name: np.zeros(n, np.uint8) for name, n in (("a", 6), ("b", 4), ("c", 1), ("d", 30), ("e", 2))}
    plan = tp.convert(arrays, tmp_path / "out", max_shard_size=10)
    assert [list(file.offsets) for file in plan.files] == [["a", "b"], ["c"], ["d"], ["e"]]
    report = plan.run()
    assert report.files[0][0] == "model-00001-of-00004.safetensors"
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) == report.nbytes == plan.file_bytes


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (100, 100),
        ("5GB", 5 * 10**9),
        ("500 m", 5 * 10**8),
        ("2GiB", 2 << 30),
        ("1.5k", 1500),
        ("7", 7),
        ("64KiB", 65536),
    ],
)
def test_sizes(size: int | str, count: int, tmp_path: Path) -> None:
    assert tp.convert(SOME, tmp_path / "out", max_shard_size=size).max_shard_size == count


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("5 parsecs", "'5 parsecs' is not a size. Write a number of bytes, or one with a unit: 500M, 5GB, 2GiB."),
        ("", "'' is not a size. Write a number of bytes, or one with a unit: 500M, 5GB, 2GiB."),
        ("-1", "A size must be positive, not -1"),
        (0, "A size must be positive, not 0"),
        ("infG", "'infG' is not a size. Write a number of bytes, or one with a unit: 500M, 5GB, 2GiB."),
    ],
)
def test_what_is_no_size(size: int | str, message: str, tmp_path: Path) -> None:
    assert refusal(PlanError, SOME, tmp_path / "out", max_shard_size=size) == message


def test_shards_are_a_directory_of_safetensors(tmp_path: Path) -> None:
    assert refusal(PlanError, SOME, "x.safetensors", max_shard_size=10) == (
        "x.safetensors: Shards need a directory, but the path names a file. Write x/."
    )
    assert refusal(PlanError, SOME, "x.pt", max_shard_size=10) == (
        "x.pt: Only safetensors can be written in shards. Pass a directory: out/."
    )
    assert refusal(PlanError, SOME, tmp_path, format="torch zip") == (
        f"{tmp_path}: A torch zip is a file, but the path names a directory. End it in .pt."
    )


def test_the_suffix_says_the_format() -> None:
    assert refusal(PlanError, SOME, "out/llama-3.1") == (
        "out/llama-3.1: The suffix '.1' does not name a format. Known suffixes are .safetensors .pt .pth .bin .ckpt. "
        "For a directory of safetensors, write out/llama-3.1/."
    )
    assert refusal(PlanError, SOME, "") == "The target path is empty"
    assert refusal(PlanError, SOME, "x.gguf", format="gguf") == (
        "`format` must be 'safetensors' or 'torch zip', not 'gguf'"
    )
    assert tp.convert(SOME, "x.weights", format="torch zip").format == "torch zip"
    assert tp.convert(SOME, "x.weights", format="safetensors").format == "safetensors"


# --- what it says ----------------------------------------------------------------------------


def test_a_plan_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tp.convert(SOME, "x.safetensors").run()
    plan = tp.convert("x.safetensors", "y.safetensors", dtype={"a.weight": "bf16"}, rename="^a=b")
    assert str(plan) == (
        "plan: y.safetensors (safetensors)\n"
        "name      shape   dtype     size  from\n"
        "b.weight  [3, 4]  bfloat16  24 B  a.weight as bfloat16\n"
        "b.bias    [4]     bfloat16   8 B  a.bias\n"
        "count     []      int64      8 B  unchanged\n"
        "3 tensors · 264 B · 16 B copied unchanged · 24 B computed"
    )
    assert repr(plan) == str(plan)
    assert plan._repr_html_().startswith('<p style="font-weight:bold">plan: y.safetensors (safetensors)</p><table>')
    told = json.loads(json.dumps(plan.to_json()))
    assert told["tensors"][0] == {
        "name": "b.weight",
        "shape": [3, 4],
        "dtype": "bfloat16",
        "nbytes": 24,
        "file": "y.safetensors",
        "from": {
            "operation": "cast",
            "dtype": "bfloat16",
            "operands": [{"operation": "stored", "source": "x.safetensors", "name": "a.weight"}],
        },
    }
    report = plan.run()
    assert str(report).startswith("y.safetensors: 3 tensors, 264 B in 0.")
    assert set(json.loads(json.dumps(report.to_json()))) == {
        *("path", "files", "tensors", "nbytes", "copied_bytes", "seconds", "casts", "dropped", "notes"),
    }


@pytest.mark.parametrize("inline", [1 << 22, -1])
def test_progress_ends_at_the_whole(inline: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.edit.write import execute

    monkeypatch.setattr(execute, "INLINE", inline)
    arrays = {str(i): np.zeros(1000, np.float32) for i in range(20)}
    told: list[tuple[int, int]] = []
    tp.convert(arrays, tmp_path / "x.safetensors", dtype="f16").run(lambda *at: told.append(at))
    assert told[-1] == (40_000, 40_000)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_tensors_that_follow_each_other_are_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.io import system as _system

    arrays = {f"{i}": np.full(1000, i, np.float32) for i in range(50)}
    tp.convert(arrays, tmp_path / "x.safetensors").run()
    copies: list[tuple[int, ...]] = []
    copy = _system.copy

    def counted(*arguments: int) -> int:
        copies.append(arguments)
        return copy(*arguments)

    monkeypatch.setattr(_system, "copy", counted)
    tp.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors").run()
    assert len(copies) == 1
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_threads_write_what_one_does(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.edit.write import execute
    from torchparams.engines import threads

    arrays = {str(i): sample("float32", (i * 100, 3)) for i in range(12)}
    tp.convert(arrays, tmp_path / "x.pt").run()
    options: dict[str, Any] = {"dtype": {"{0..5}": "bf16"}, "allow_overflow": True}
    one = tp.convert(tmp_path / "x.pt", tmp_path / f"one{suffix}", **options).run()
    monkeypatch.setattr(execute, "INLINE", -1)
    monkeypatch.setattr(execute, "PIECE", 1000)
    monkeypatch.setattr(threads, "processors", lambda: 4)
    several = tp.convert(tmp_path / "x.pt", tmp_path / f"several{suffix}", **options).run()
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"several{suffix}").read_bytes()
    assert one.casts == several.casts


def test_a_source_of_ones_own(tmp_path: Path) -> None:
    tp.convert(MemorySource({"w": np.arange(3)}), tmp_path / "x.safetensors").run()
    assert contents(tmp_path / "x.safetensors") == expected({"w": np.arange(3)})
