"""Digests: their bytes, equal digests for equal weights in any source, and duplicates."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchparams as tp
from torch_files import members_of, saved, written, zipped
from torchparams.dtypes import DType
from torchparams.engines import ThreadEngine
from torchparams.errors import LimitExceeded, NoMatch, NotReadable
from torchparams.measure import hashing
from torchparams.testing import (
    NUMPY_DTYPES,
    SAFETENSORS_DTYPES,
    TORCH_DTYPES,
    Array,
    MemorySource,
    element_bytes,
    safetensors_bytes,
    sample,
    to_torch,
)

if TYPE_CHECKING:
    from pathlib import Path


# --- the bytes -------------------------------------------------------------------------------


def by_hand(dtype: str, shape: tuple[int, ...], elements: bytes) -> str:
    head = dtype + "[" + ",".join(str(size) for size in shape) + "]\n"
    context = "torchparams tensor digest v1"
    return blake3(head.encode("ascii") + blake3(elements).digest(), derive_key_context=context).hexdigest()


def set_by_hand(digests: dict[str, str]) -> str:
    text = b""
    for name in sorted(digests, key=lambda name: name.encode()):
        text += len(name.encode()).to_bytes(8, "little") + name.encode() + bytes.fromhex(digests[name])
    return blake3(text, derive_key_context="torchparams set digest v1").hexdigest()


def codes(dtype: str, *values: int) -> Array:
    return np.array(values, np.uint8).view(DType.of(dtype).numpy)


# Digests in version 1 are these for ever.
KNOWN: dict[str, tuple[Array, str, bytes, str]] = {
    "matrix": (
        np.arange(6, dtype=np.float32).reshape(2, 3),
        "float32",
        struct.pack("<6f", 0, 1, 2, 3, 4, 5),
        "76ccbaba91fbc52b3eade32adbe29c532e65cc2ee64fa976cd19b0f444e0311e",
    ),
    "scalar": (
        np.array(0x0201, np.int16),
        "int16",
        b"\x01\x02",
        "0a5943e96ab9d77492720b1250660fd080f136562155ed7e3619f5bd521662f0",
    ),
    "empty": (
        np.empty((0, 4), DType.of("bfloat16").numpy),
        "bfloat16",
        b"",
        "61f897d31bd286bd66fce883cce4c63c42da4706705f925b68af0519aec38ace",
    ),
    "bool": (
        np.array([True, False, True]),
        "bool",
        b"\x01\x00\x01",
        "a67595a0df804bbd77d1214113f0f4387fa8f09153936ab47ed7ca22bd3d9083",
    ),
    "4 bits": (
        codes("F4", 1, 2, 3),
        "float4_e2m1fn",
        b"\x21\x03",
        "96abdd15260472ac114ebba89769ce8d7a8281df53fb6f08250c158170b2dcc6",
    ),
    "6 bits": (
        codes("F6_E2M3", 1, 2),
        "float6_e2m3fn",
        b"\x81\x00",
        "c958bf46abef9e9e68ebe9de9baccb1bade0e0294d0995b2e9ee62579fb512eb",
    ),
    "complex": (
        np.array([1 - 2j], np.complex64),
        "complex64",
        struct.pack("<2f", 1, -2),
        "229f74eb405041870a417ae1ba4048d85991d649c3abf40ca03202f2d8fb4e8e",
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_digests_of_tensors(case: str) -> None:
    array, dtype, elements, known = KNOWN[case]
    assert by_hand(dtype, array.shape, elements) == known
    assert tp.digest(MemorySource({"w": array})).tensors["w"].digest == known


def test_known_digests_of_sets() -> None:
    digests = {"ä.b": KNOWN["bool"][3], "a": KNOWN["scalar"][3]}
    known = "ce0bef893367fcb9268123521e48ca404642399c60c586811a0dbed3c88cb318"
    assert set_by_hand(digests) == known
    assert tp.digest({"ä.b": KNOWN["bool"][0], "a": KNOWN["scalar"][0]}).digest == known
    assert tp.digest({}).digest == "9c81a96e38cbf681691ff615a05ea74ee27b50f0384637aa4a4daaf202f0ca5e"


def test_a_name_that_python_made_of_stray_bytes_has_a_digest() -> None:
    assert tp.digest({"\udcff": np.zeros(1)}).digest != tp.digest({"\udcfe": np.zeros(1)}).digest


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_every_dtype_as_by_hand(dtype: str) -> None:
    for shape in ((), (0,), (3,), (5, 7), (2, 0, 3)):
        array = sample(dtype, shape)
        expected = by_hand(dtype, shape, element_bytes(array))
        assert tp.digest(MemorySource({"w": array})).tensors["w"].digest == expected, shape


def test_dtype_and_shape_count() -> None:
    zeros = [
        np.zeros(shape, dtype)
        for shape in ((4,), (2, 2), (1, 4), (4, 1))
        for dtype in (np.float32, np.int32, np.uint32)
    ]
    digests = tp.digest({str(i): array for i, array in enumerate(zeros)})
    assert len({tensor.digest for tensor in digests.tensors.values()}) == len(zeros)


@given(st.lists(st.text(max_size=3), min_size=2, max_size=6, unique=True))
@settings(max_examples=50, deadline=None)
def test_the_set_depends_on_which_name_has_which_digest_and_not_on_order(names: list[str]) -> None:
    digests = {name: f"{i:064x}" for i, name in enumerate(names)}
    made = hashing.set_digest(digests.items())
    assert made == set_by_hand(digests) == hashing.set_digest(reversed(digests.items()))
    moved = dict(zip(names, (*list(digests.values())[1:], digests[names[0]]), strict=True))
    assert made != hashing.set_digest(moved.items())
    assert made != hashing.set_digest(list(digests.items())[1:])


# --- the same weights ------------------------------------------------------------------------


def everywhere(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The tensors in everything that holds tensors."""
    found: dict[str, Any] = {
        "mapping": tensors,
        "zip": written(folder, saved(tensors), "zip.pt"),
        "legacy": written(folder, saved(tensors, legacy=True), "legacy.pt"),
        "nested": written(folder, saved({"epoch": 3, "model": tensors}), "nested.pt") + "#model",
    }
    arrays = {name: tp.of(tensors).numpy(name) for name in tensors}
    found["arrays"] = MemorySource(arrays)
    if all(DType.of(array.dtype).code for array in arrays.values()):
        found["safetensors"] = written(folder, safetensors_bytes(arrays), "model.safetensors")
    return found


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_the_same_weights_have_the_same_digests_everywhere(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "matrix": to_torch(sample(dtype, (5, 3))),
        "transposed": to_torch(sample(dtype, (4, 6)).T),
        "every_other": to_torch(sample(dtype, (9, 2)))[::2],
        "scalar": to_torch(sample(dtype, ())),
        "empty": to_torch(sample(dtype, (0, 3))),
        "expanded": to_torch(sample(dtype, (1, 3))).expand(4, 3),
    }
    expected = {
        name: by_hand(dtype, tuple(tensor.shape), element_bytes(tp.of(tensors).numpy(name)))
        for name, tensor in tensors.items()
    }
    for what, x in everywhere(tmp_path, tensors).items():
        digests = tp.digest(x)
        assert {name: tensor.digest for name, tensor in digests.tensors.items()} == expected, what
        assert digests.digest == set_by_hand(expected), what


def test_big_endian_arrays_and_files_are_as_little_endian_ones(tmp_path: Path) -> None:
    values = sample("float32", (3, 4))
    expected = tp.digest({"w": values})
    big = values.astype(">f4")
    assert tp.digest({"w": big}).digest == expected.digest
    contents = saved({"w": to_torch(values)})
    members = members_of(contents)
    for name in members:
        if name.endswith("byteorder"):
            members[name] = b"big"
        elif "/data/" in name:
            members[name] = big.tobytes()
    assert tp.digest(written(tmp_path, zipped(members))).digest == expected.digest
    assert tp.digest(written(tmp_path, zipped(members, deflate=True))).digest == expected.digest


def test_conjugate_and_negated_views_are_what_they_show(tmp_path: Path) -> None:
    z = torch.randn(3, 2, dtype=torch.complex64)
    shown = {"conj": z.conj(), "neg": torch.randn(3, 2, dtype=torch.complex64).conj().imag}
    plain = {name: tensor.resolve_conj().resolve_neg() for name, tensor in shown.items()}
    expected = tp.digest(plain).digest
    assert tp.digest(shown).digest == expected
    assert tp.digest(written(tmp_path, saved(shown))).digest == expected


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_types_that_numpy_lacks(tmp_path: Path) -> None:
    raw = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    tensors = {
        "half": raw.clone().view(torch.complex32),
        "bits": raw.clone().view(torch.bits8),
        "x2": raw.clone().view(torch.float4_e2m1fn_x2),
    }
    expected = {
        "half": by_hand("complex32", (2, 2), bytes(range(16))),
        "bits": by_hand("bits8", (2, 8), bytes(range(16))),
        "x2": by_hand("float4_e2m1fn", (2, 16), bytes(range(16))),
    }
    for x in (tensors, written(tmp_path, saved(tensors))):
        assert {name: tensor.digest for name, tensor in tp.digest(x).tensors.items()} == expected
    assert tp.digest({"half": tensors["half"].T}).tensors["half"].digest == by_hand(
        "complex32", (2, 2), bytes([*range(4), *range(8, 12), *range(4, 8), *range(12, 16)])
    )


def test_two_four_bit_elements_in_a_byte_are_as_safetensors_stores_them(tmp_path: Path) -> None:
    from safetensors.torch import save

    pair = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    stored = tp.digest(written(tmp_path, save({"w": pair}), "model.safetensors"))
    assert stored.tensors["w"].shape == (2, 8)
    assert stored.digest == tp.digest({"w": pair}).digest


@pytest.mark.parametrize("dtype", [name for name in SAFETENSORS_DTYPES if DType.of(name).bits < 8])
def test_packed_elements_are_as_unpacked_ones(tmp_path: Path, dtype: str) -> None:
    array = sample(dtype, (3, 80, 8))
    path = written(tmp_path, safetensors_bytes({"w": array}), "model.safetensors")
    engine = ThreadEngine(2, block_bytes=64, part_bytes=64)
    assert tp.digest(path).digest == tp.digest(MemorySource({"w": array}), engine=engine).digest


# --- live models -----------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)


def test_a_model_is_as_the_file_of_its_state_dict(tmp_path: Path) -> None:
    model = Net()
    digests = tp.digest(model)
    assert list(digests.tensors) == [
        "embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    ]  # fmt: skip
    assert digests.tensors["embed.weight"].aliases == ("head.weight",)
    for legacy in (False, True):
        assert tp.digest(written(tmp_path, saved(model.state_dict(), legacy=legacy))).digest == digests.digest
    # A file of copies, as safetensors has to make them, is the same mapping.
    arrays = {name: tp.of(model.state_dict()).numpy(name).copy() for name in model.state_dict()}
    copies = tp.digest(written(tmp_path, safetensors_bytes(arrays), "copies.safetensors"))
    assert len(copies.tensors) == 7
    assert copies.digest == digests.digest
    # A name that is missing is not.
    del arrays["head.weight"]
    assert tp.digest(written(tmp_path, safetensors_bytes(arrays), "one.safetensors")).digest != digests.digest


def test_a_table_is_taken_as_it_stands() -> None:
    model = Net()
    assert list(tp.digest(tp.of(model)).tensors) == ["embed.weight", "norm.weight", "norm.bias"]
    assert "mask" in tp.digest(tp.of(model, buffers=True)).tensors
    assert list(tp.digest(model, ":buffer & ~**.num_*").tensors) == ["norm.running_mean", "norm.running_var"]


def test_wrappers_have_no_part_in_names() -> None:
    model = Net()
    assert tp.digest(nn.DataParallel(model)).digest == tp.digest(model).digest


# --- options ---------------------------------------------------------------------------------


def test_threads_blocks_and_mapping_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {
        "large": sample("bfloat16", (1000, 700)),
        "small": sample("float64", (3,)),
        "wide": np.ascontiguousarray(sample("int32", (70, 900))).T,
        "packed": sample("float6_e3m2fn", (400, 8)),
    }
    path = written(tmp_path, safetensors_bytes(arrays), "model.safetensors")
    expected = tp.digest(MemorySource(arrays), engine=ThreadEngine(1)).digest
    assert tp.digest(path).digest == expected
    for shared in (1, 1 << 40):
        monkeypatch.setattr(hashing, "_SHARED", shared)
        for threads, block in ((1, 1 << 20), (2, 4096), (5, 333)):
            for mapped in (False, True):
                engine = ThreadEngine(threads, block_bytes=block, part_bytes=block, mapped=mapped)
                assert tp.digest(path, engine=engine).digest == expected
                assert tp.digest(MemorySource(arrays), engine=engine).digest == expected


def test_a_forked_child_does_not_wait_for_threads_that_it_lacks(tmp_path: Path) -> None:
    # In a process of its own: this one may have threads that do not survive a fork.
    script = """
import os, signal
import numpy as np
import torchparams as tp

weights = {"w": np.zeros(8 << 20, np.uint8)}
expected = tp.digest(weights).digest
child = os.fork()
if not child:
    signal.alarm(20)
    os._exit(0 if tp.digest(weights).digest == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "0\n", ran.stderr


def test_a_selector_and_what_it_hits_nothing_with(tmp_path: Path) -> None:
    weights = {"a.weight": np.ones(2), "a.bias": np.zeros(2)}
    assert list(tp.digest(weights, "**.bias").tensors) == ["a.bias"]
    with pytest.raises(NoMatch):
        tp.digest(weights, "**.bias | b")
    assert list(tp.digest(weights, "**.bias | b", strict=False).tensors) == ["a.bias"]


def test_progress_counts_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    tp.digest({"w": np.zeros(1000)}, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (8000, 8000)


def test_the_records_are_read_once() -> None:
    class Counted(MemorySource):
        reads = 0

        def infos(self) -> Any:
            Counted.reads += 1
            return super().infos()

    few, many = (Counted({f"w{i}": np.zeros(1) for i in range(count)}) for count in (2, 200))
    tp.digest(few)
    reads, Counted.reads = Counted.reads, 0
    tp.digest(many)
    assert Counted.reads == reads


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_has_no_values_is_named() -> None:
    cases = {
        "dict: 'w': A tensor on the meta device has a shape but no values": torch.zeros(2, device="meta"),
        "dict: 'w': A sparse tensor (torch.sparse_coo) cannot become an array. Pass tensor.to_dense().": torch.eye(
            2
        ).to_sparse(),
    }
    for message, tensor in cases.items():
        with pytest.raises(NotReadable) as error:
            tp.digest({"w": tensor})
        assert str(error.value) == message
    with pytest.raises(NotReadable) as error:
        tp.digest(nn.LazyLinear(2))
    assert str(error.value) == "LazyLinear: 'weight' is lazy: it has no shape or values yet"


def test_a_view_of_more_elements_than_there_are_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchparams.limits.EXPANDED_ELEMENTS", 1000)
    expanded = {"w": torch.zeros(1, 40).expand(40, 40)}
    path = written(tmp_path, saved(expanded))
    with pytest.raises(LimitExceeded) as error:
        tp.digest(path)
    assert str(error.value) == (
        f"{path}: 'w' has 1,600 elements, which are a view of 160 bytes. "
        "If you trust the file, raise torchparams.limits.EXPANDED_ELEMENTS."
    )
    assert len(tp.digest(expanded).tensors) == 1  # memory of one's own may be as odd as one likes


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_bit_flipped_anywhere_changes_the_digest_of_its_tensor_alone(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
    arrays = {f"t{i}": sample("uint16", tuple(shape), seed=i) for i, shape in enumerate(shapes)}
    before = tp.digest(arrays)
    name = data.draw(st.sampled_from(sorted(arrays)))
    place = data.draw(st.integers(0, math.prod(arrays[name].shape) * 2 - 1))
    flat = arrays[name].reshape(-1).view(np.uint8)
    flat[place] ^= 1 << data.draw(st.integers(0, 7))
    after = tp.digest(arrays)
    assert [n for n in arrays if before.tensors[n] != after.tensors[n]] == [name]
    assert before.digest != after.digest


# --- what is there more than once ------------------------------------------------------------


def groups(found: Any) -> list[tuple[int, list[list[str]]]]:
    return [
        (same.extra_bytes, [[f"{at.source}:{at.name}" for at in copy] for copy in same.copies])
        for same in found.same_content
    ]


def test_copies_and_tied_tensors_are_told_apart() -> None:
    shared, other = np.arange(8), np.arange(2)
    digests = tp.digest({"a": shared, "b": shared, "c": shared.copy(), "d": other, "e": np.zeros(3)})
    assert groups(digests) == [(64, [["dict:a", "dict:b"], ["dict:c"]])]
    assert groups(tp.digest({"a": shared, "b": shared})) == [(0, [["dict:a", "dict:b"]])]


def test_copies_in_files(tmp_path: Path) -> None:
    array = sample("float32", (4, 4))
    tensor = to_torch(array)
    first = written(tmp_path, safetensors_bytes({"w": array, "x": array.copy()}), "a.safetensors")
    second = written(tmp_path, saved({"u": tensor, "v": tensor, "part": tensor[0]}), "b.pt")
    found = tp.duplicates(first, second)
    assert groups(found) == [
        (128, [[f"{first}:w"], [f"{first}:x"], [f"{second}:u", f"{second}:v"]]),
    ]
    assert found.extra_bytes == 128


def test_one_file_under_two_names_is_one_copy(tmp_path: Path) -> None:
    path = written(tmp_path, safetensors_bytes({"w": sample("float32", (4,))}), "a.safetensors")
    link = tmp_path / "b.safetensors"
    link.symlink_to(path)
    assert groups(tp.duplicates(path, link)) == [(0, [[f"{path}:w", f"{link}:w"]])]
    assert groups(tp.duplicates(path, path)) == [(0, [[f"{path}:w", f"{path} (2):w"]])]


def test_a_model_and_its_state_dict_share_memory() -> None:
    model = nn.Linear(2, 3)
    assert {copies for copies, _ in groups(tp.duplicates(model, model.state_dict()))} == {0}


def test_views_of_one_place_are_one_copy_and_equal_parts_of_it_are_not() -> None:
    memory = torch.zeros(4)
    model = nn.ParameterDict({"a": nn.Parameter(memory[:2]), "b": nn.Parameter(memory[:2])})
    assert groups(tp.digest(model)) == [(0, [["ParameterDict:a", "ParameterDict:b"]])]
    assert groups(tp.digest({"a": memory[:2], "b": memory[2:]})) == [(8, [["dict:a"], ["dict:b"]])]


# --- results ---------------------------------------------------------------------------------


def test_the_report() -> None:
    tied = np.zeros((2, 2), np.float32)
    digests = tp.digest({"a": tied, "b": tied, "c": tied.copy(), "n\n": np.ones(1, np.int8)})
    a, n = digests.tensors["a"].digest, digests.tensors["n\n"].digest
    assert str(digests) == (
        "dict (mapping)\n"
        "name   shape   dtype    digest\n"
        f"a = b  [2, 2]  float32  {a}\n"
        f"c      [2, 2]  float32  {a}\n"
        f"n\\n    [1]     int8     {n}\n"
        "3 tensors · 33 B · digest of the set:\n"
        f"{digests.digest}\n"
        "\n"
        "same content          names  copies  extra\n"
        "[2, 2] float32, 16 B      3       2   16 B\n"
        "  a = b\n"
        "  c\n"
        "1 tensor under several names; copies cost 16 B"
    )
    assert repr(digests) == str(digests)
    assert "<table>" in digests._repr_html_()


def test_the_report_on_several() -> None:
    found = tp.duplicates({"a": np.zeros(2)}, {"b": np.zeros(2)}, {"c": np.ones(1)})
    lines = str(found).split("\n")
    assert lines[0] == "dict (mapping)"
    assert lines[6] == "dict (2) (mapping)"
    assert lines[-5:] == [
        "same content       names  copies  extra",
        "[2] float64, 16 B      2       2   16 B",
        "  dict: a",
        "  dict (2): b",
        "1 tensor under several names; copies cost 16 B",
    ]
    assert str(tp.duplicates({"a": np.zeros(2)})).endswith("\n\nNo duplicate tensors.")


def test_json() -> None:
    tied = np.zeros(2, np.float32)
    digests = tp.digest({"a": tied, "b": tied})
    entry = digests.tensors["a"].digest
    assert digests.to_json() == {
        "format": "torchparams manifest",
        "version": 1,
        "source": "dict",
        "digest": digests.digest,
        "tensors": [
            {"name": "a", "dtype": "float32", "shape": [2], "nbytes": 8, "digest": entry, "aliases": ["b"]},
        ],
        "same_content": [
            {
                "digest": entry,
                "dtype": "float32",
                "shape": [2],
                "nbytes": 8,
                "extra_bytes": 0,
                "copies": [[{"source": "dict", "name": "a"}, {"source": "dict", "name": "b"}]],
            }
        ],
        "left_out": [],
    }
    several = tp.duplicates({"a": tied}, {"b": np.ones(1)}).to_json()
    assert [source["source"] for source in several["sources"]] == ["dict", "dict (2)"]
    assert (several["same_content"], several["extra_bytes"]) == ([], 0)
