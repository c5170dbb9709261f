"""The safetensors reader: the source contract, and its own behaviour."""

from __future__ import annotations

import gc
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchparams as tp
from torchparams.dtypes import ALL, BY_CODE, DType
from torchparams.errors import NotReadable, SourceError, TruncatedFile, UnknownName
from torchparams.info import Location, ParameterInfo, file_tensor
from torchparams.io import filebytes as _bytes
from torchparams.io.filebytes import as_array
from torchparams.io.packing import pack, unpack
from torchparams.sources import safetensors as _safetensors
from torchparams.sources.safetensors import SafetensorsSource, open_safetensors
from torchparams.testing import (
    SAFETENSORS_DTYPES,
    Array,
    SourceTests,
    assert_identical,
    element_bytes,
    safetensors_bytes,
    sample,
    to_torch,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


class TestSafetensors(SourceTests):
    dtypes = SAFETENSORS_DTYPES
    torch_dtypes = tuple(str(dtype) for dtype in ALL if dtype.code and dtype.torch_name)
    spans = metadata = True

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> SafetensorsSource:
        path = folder / "model.safetensors"
        path.write_bytes(safetensors_bytes(tensors, metadata))
        return open_safetensors(str(path))


def reference(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """What the format's own library makes of a file."""
    tensors: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]  # it has no types
    return tensors


def written(folder: Path, header: str | bytes | dict[str, Any], data: bytes = b"") -> str:
    """The path of a file with that header, byte for byte, and that data."""
    text = (
        header if isinstance(header, bytes) else (json.dumps(header) if isinstance(header, dict) else header).encode()
    )
    path = folder / "made.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


# --- the format's reference is the oracle ---------------------------------------------------


names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
numpy_arrays = st.builds(
    sample,
    st.sampled_from(["bool", "uint8", "int16", "uint32", "int64", "float16", "bfloat16", "float32", "float64"]),
    shapes,
    st.integers(0, 1000),
)
torch_arrays = st.builds(
    sample,
    st.sampled_from(
        [
            "bool",
            "uint16",
            "int32",
            "bfloat16",
            "float32",
            "complex64",
            "float8_e4m3fn",
            "float8_e5m2",
            "float8_e8m0fnu",
        ]
    ),
    shapes,
    st.integers(0, 1000),
)
texts = st.text(st.characters(codec="utf-8"), max_size=8)
# Of no tensors and empty metadata, version 0.8 of the reference makes a header that it cannot read itself.
metadatas = st.none() | st.dictionaries(texts, texts, min_size=1)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, numpy_arrays, max_size=6), metadatas)
def test_what_the_reference_writes_from_numpy(tensors: dict[str, Array], metadata: dict[str, str] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(safetensors.numpy.save(tensors, metadata))
        _check(path, tensors, metadata)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(names, torch_arrays, max_size=6), metadatas)
def test_what_the_reference_writes_from_torch(tensors: dict[str, Array], metadata: dict[str, str] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(safetensors.torch.save({name: to_torch(array) for name, array in tensors.items()}, metadata))
        _check(path, tensors, metadata)


def _check(path: Path, tensors: dict[str, Array], metadata: dict[str, str] | None) -> None:
    params = tp.of(path)
    assert set(params) == set(tensors)
    assert dict(params.metadata) == (metadata or {})
    for name, array in tensors.items():
        assert_identical(params.numpy(name), array)
    with safetensors.safe_open(path, "np") as reference:
        assert set(reference.keys()) == set(params)
        for name in params:
            piece = reference.get_slice(name)
            assert tuple(piece.get_shape()) == params.info(name).shape
            assert piece.get_dtype() == params.info(name).dtype.code


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, st.builds(sample, st.sampled_from(SAFETENSORS_DTYPES), st.just((8,)), st.integers(0, 9))))
def test_the_reference_reads_what_the_suite_writes(tensors: dict[str, Array]) -> None:
    data = safetensors_bytes(tensors)
    for name, about in reference(data):
        assert bytes(about["data"]) == element_bytes(tensors[name])
        assert about["dtype"] == DType.of(tensors[name].dtype).code
    assert len(reference(data)) == len(tensors)


# --- listing ---------------------------------------------------------------------------------


def test_the_order_is_the_headers(tmp_path: Path) -> None:
    header = {"z": entry("U8", [2], 4, 6), "a": entry("F32", [1], 0, 4), "m": entry("I16", [1], 6, 8)}
    source = open_safetensors(written(tmp_path, header, bytes(8)))
    assert list(source.infos()) == ["z", "a", "m"]


def test_a_record(tmp_path: Path) -> None:
    path = written(tmp_path, '{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}', bytes(12))
    assert open_safetensors(path).infos()["a"] == ParameterInfo(
        name="a",
        shape=(2, 3),
        dtype=DType.of("bfloat16"),
        numel=6,
        nbytes=12,
        device="file",
        kind="tensor",
        raw_name="a",
        location=Location(path, 66, 78),
    )


def test_quick_records_are_records() -> None:
    quick = file_tensor("w", (2, 3), DType.of("F32"), 6, 24, "f", 8, 32)
    plain = ParameterInfo(
        "w", (2, 3), DType.of("F32"), 6, 24, "file", "tensor", raw_name="w", location=Location("f", 8, 32)
    )
    assert type(quick) is ParameterInfo
    assert type(quick.location) is Location
    assert quick == plain
    assert hash(quick) == hash(plain)
    assert repr(quick) == repr(plain)
    with pytest.raises(AttributeError):
        quick.name = "v"  # type: ignore[misc]  # this is what is tested


@pytest.mark.parametrize(
    "header",
    [
        ' \n\t\r{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} \n\t\r  ',
        '{ "a" : { "data_offsets" : [ 0 , 1 ] , "shape" : [ 1 ] , "dtype" : "U8" } }',
        '{"\\u0061":{"dtype":"\\u00558","sh\\u0061pe":[1],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"comment":{"x":[1.5,null,true]}}}',
        '{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}',
    ],
)
def test_headers_that_are_legal(tmp_path: Path, header: str) -> None:
    path = written(tmp_path, header, b"\x07")
    assert len(reference(Path(path).read_bytes())) == 1
    source = open_safetensors(path)
    assert list(source.infos()) == ["a"]
    assert source.infos()["a"].numel == 1
    assert source.numpy("a").reshape(-1).tolist() == [7]


def test_every_dtype_is_known(tmp_path: Path) -> None:
    header = {code: entry(code, [0], 0, 0) for code in BY_CODE}
    assert len(header) == 22
    path = written(tmp_path, header)
    assert len(reference(Path(path).read_bytes())) == 22
    source = open_safetensors(path)
    assert [info.dtype.code for info in source.infos().values()] == list(BY_CODE)
    for code in BY_CODE:
        assert source.numpy(code).shape == (0,)


def test_metadata_that_needs_the_strict_way(tmp_path: Path) -> None:
    notes = {"a": '{"x": "-1"}', "true": "false", "n": "[-1]", "dtype": "shape"}
    source = open_safetensors(written(tmp_path, {"w": entry("U8", [1], 0, 1), "__metadata__": notes}, b"\0"))
    assert dict(source.metadata) == notes
    assert list(source.infos()) == ["w"]


def test_no_metadata_and_no_tensors(tmp_path: Path) -> None:
    source = open_safetensors(written(tmp_path, "{}"))
    assert len(source.infos()) == 0
    assert dict(source.metadata) == {}
    assert dict(open_safetensors(written(tmp_path, '{"__metadata__":{}}')).metadata) == {}


PIECES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(0, 2) | st.sampled_from(["F32", "U8", "x", "shape", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "a"]), inner, max_size=2),
    max_leaves=4,
)
RIGHT = st.sampled_from(
    [entry("U8", [2], 0, 2), entry("U8", [0, 3], 0, 0), entry("F16", [1], 2, 4), entry("U8", [2, 1], 4, 6)]
)
WRONG = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.just("U8") | PIECES,
        "shape": st.just([2]) | PIECES,
        "data_offsets": st.just([0, 2]) | PIECES,
        "extra": PIECES,
    },
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "c-d", "true", "é", '"', "__metadata__", "dtype"]), RIGHT | WRONG | PIECES, max_size=4
)


@settings(deadline=None, max_examples=300)
@given(HEADERS, st.integers(0, 6), st.booleans())
def test_the_fast_way_computes_what_the_strict_way_does(header: dict[str, Any], size: int, ascii_only: bool) -> None:
    text = json.dumps(header, ensure_ascii=ascii_only).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
        file = _bytes.FileBytes(str(path))
        try:
            fast, tiled = _safetensors._fast(text, file)
        except (_safetensors._Unsure, ValueError, TypeError, KeyError):
            return
        assert _safetensors._strict(text, file) == fast
        if tiled:
            _safetensors._check_tiling(fast[0], 8 + len(text), file)


@pytest.mark.parametrize("shape", [{}, "", {"4": 4}, "4"])
def test_a_shape_that_spells_like_one_before_it_is_refused(tmp_path: Path, shape: object) -> None:
    before = entry("F32", [], 0, 4) if not shape else entry("F32", [4], 0, 16)
    stop = before["data_offsets"][1]
    after = {"dtype": "F32", "shape": shape, "data_offsets": [stop, 2 * stop]}
    with pytest.raises(SourceError, match="shape is"):
        tp.of(written(tmp_path, {"a": before, "b": after}, bytes(2 * stop)))


def test_very_many_sizes_are_read_as_few_are(tmp_path: Path) -> None:
    header = {str(i): entry("U8", [i, 0, 1], 0, 0) for i in range(1000)}
    header["last"] = entry("U8", [2, 3], 0, 6)
    infos = tp.of(written(tmp_path, header, bytes(6))).infos
    assert [infos[name].shape for name in ("0", "999", "last")] == [(0, 0, 1), (999, 0, 1), (2, 3)]


def test_files_as_they_are_written_take_the_fast_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(header: bytes, file: _bytes.FileBytes) -> Any:
        raise AssertionError("the strict way was taken")

    monkeypatch.setattr(_safetensors, "_strict", never)
    tensors = {f"model.layers.{i}.re-lu": sample(dtype, (2, 4), i) for i, dtype in enumerate(SAFETENSORS_DTYPES)}
    tensors["none"] = tensors["of:a:name"] = sample("float32", (0, 3))
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(tensors, {"format": "pt", "made:at": "12:30"}))
    assert set(open_safetensors(str(path)).infos()) == set(tensors)
    path.write_bytes(safetensors.torch.save({"a-1": torch.zeros(3), "b": torch.zeros((), dtype=torch.int64)}))
    assert set(open_safetensors(str(path)).infos()) == {"a-1", "b"}


@pytest.mark.parametrize("length", [0x7B, 0x280, 0x380, 0x480, 0x580, 0x10280, 0x137B])
def test_header_lengths_that_look_like_another_format(tmp_path: Path, length: int) -> None:
    # As bytes, these start a pickle or a JSON text.
    text = json.dumps({"a": entry("U8", [1], 0, 1)})
    params = tp.of(written(tmp_path, text + " " * (length - len(text)), b"\0"))
    assert params.source.format == "safetensors"
    assert params.names == ["a"]


def test_listing_imports_neither_numpy_nor_torch(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": entry("F32", [1], 0, 4)}, bytes(4))
    program = (
        "import sys, torchparams as tp; print(tp.of(sys.argv[1])); "
        "print([m for m in ('numpy', 'torch', 'rich', 'mmap_') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_left_as_it_was(tmp_path: Path, collecting: bool) -> None:
    good = written(tmp_path, {"a": entry("F32", [1], 0, 4)}, bytes(4))
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        open_safetensors(good)
        assert gc.isenabled() is collecting
        with pytest.raises(ValueError):
            open_safetensors(written(tmp_path, "{"))
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()


def test_names_that_are_not_there(tmp_path: Path) -> None:
    source = open_safetensors(written(tmp_path, {"fc.weight": entry("F32", [1], 0, 4)}, bytes(4)))
    for read in (source.numpy, source.span):
        with pytest.raises(
            UnknownName, match=re.escape("No parameter is named 'fc.wieght'. Did you mean 'fc.weight'?")
        ):
            read("fc.wieght")


def test_nothing_is_nested_in_it(tmp_path: Path) -> None:
    path = written(tmp_path, {"model.w": entry("F32", [1], 0, 4)}, bytes(4))
    with pytest.raises(SourceError) as caught:
        tp.of(f"{path}#model")
    assert str(caught.value) == (
        f"{path}: safetensors files have no nested mappings, so there is none at 'model'. "
        "Leave #model out, and select by name: model.**."
    )


# --- values ----------------------------------------------------------------------------------


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    array = sample("float32", (1 << 18,))
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": array, "b": sample("int8", (3,))}))
    source = open_safetensors(str(path))
    first, second = source.numpy("a"), source.numpy("a")
    assert not first.flags.owndata
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        first.flags.writeable = True


def test_arrays_that_are_not_aligned(tmp_path: Path) -> None:
    tensors = {
        "one": sample("uint8", (1,)),
        **{f"a{d}": sample(d, (3, 2), 1) for d in ("float32", "bfloat16", "int64")},
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    source = open_safetensors(str(path))
    assert not source.numpy("afloat32").flags.aligned
    assert source.numpy("abfloat16").astype(np.float32).shape == (3, 2)
    for name, array in tensors.items():
        assert_identical(source.numpy(name), array)
        tensor = source.tensor(name)
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert tensor.numpy().tobytes() == array.tobytes() if name != "abfloat16" else True


def test_a_large_tensor_is_not_copied(tmp_path: Path) -> None:
    array = sample("float32", (1 << 20,))
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"before": sample("int64", (5,)), "a": array}))
    source = open_safetensors(str(path))
    source.tensor("before")
    tracemalloc.start()
    tensor = source.tensor("a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16
    assert tensor.numpy().tobytes() == array.tobytes()
    tensor.zero_()
    assert_identical(source.numpy("a"), array)
    assert source.tensor("a").numpy().tobytes() == array.tobytes()


def test_mappings_that_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = sample("float32", (1 << 19,))
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": array}))
    source = open_safetensors(str(path))
    source.numpy("a")

    def refuse(*args: object, **options: object) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("torchparams.io.filebytes.mmap.mmap", refuse)
    assert source.tensor("a").numpy().tobytes() == array.tobytes()


def test_elements_of_less_than_a_byte(tmp_path: Path) -> None:
    # The lower half of a byte comes first; four elements of 6 bits fill three bytes from the lowest bit on.
    header = {"four": entry("F4", [2, 2], 0, 2), "six": entry("F6_E2M3", [4], 2, 5)}
    codes = [0b000001, 0b000010, 0b100000, 0b011111]
    packed = sum(code << 6 * i for i, code in enumerate(codes)).to_bytes(3, "little")
    source = open_safetensors(written(tmp_path, header, b"\x21\xf7" + packed))
    four = source.numpy("four")
    assert four.dtype == ml_dtypes.float4_e2m1fn
    assert four.astype(np.float32).tolist() == [[0.5, 1.0], [6.0, -6.0]]
    assert source.numpy("six").view(np.uint8).tolist() == codes
    assert source.numpy("six").astype(np.float32).tolist() == [0.125, 0.25, -0.0, 7.5]
    with pytest.raises(NotReadable, match="no dtype for float4_e2m1fn"):
        source.tensor("four")


@settings(deadline=None)
@given(st.sampled_from(["float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"]), st.integers(0, 40), st.integers(0, 99))
def test_packing(name: str, numel: int, seed: int) -> None:
    dtype = DType.of(name)
    array = sample(name, (numel,), seed)
    packed = pack(array, dtype)
    assert packed.tobytes() == element_bytes(array)
    assert_identical(unpack(packed, dtype, (numel,)), array)


@pytest.mark.parametrize("name", ["int8", "int16", "float32", "complex64", "complex128", "bfloat16", "bool"])
def test_the_other_byte_order(name: str) -> None:
    array = sample(name, (3, 4))
    dtype = DType.of(name)
    width = array.itemsize // (2 if dtype.kind == "complex" else 1)
    swapped = np.frombuffer(array.tobytes(), f"u{width}").byteswap().tobytes()
    assert_identical(as_array(b"x" + swapped, dtype, (3, 4), offset=1, byteorder="big"), array)
    assert_identical(as_array(swapped, dtype, (4, 3), stride=(1, 4), byteorder="big"), array.T.copy())
    assert_identical(as_array(swapped, dtype, (), byteorder="big"), array[0, 0].reshape(()))


def test_strided_views() -> None:
    array = sample("float32", (4, 6))
    memory = array.tobytes()
    f32 = DType.of("float32")
    assert_identical(as_array(memory, f32, (6, 4), stride=(1, 6)), array.T)
    assert_identical(as_array(memory, f32, (2, 3), offset=4, stride=(12, 2)), array[::2, 1::2])
    assert_identical(as_array(memory, f32, (5, 2), stride=(0, 1)), np.broadcast_to(array[0, :2], (5, 2)))
    assert_identical(as_array(b"", f32, (0, 4), stride=(4, 1)), array[:0, :4])


def test_more_dimensions_than_numpy_has(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": entry("U8", [1] * 65, 0, 1)}, b"\0")
    source = open_safetensors(path)
    assert source.infos()["a"].ndim == 65
    with pytest.raises(NotReadable, match=re.escape(f"{path}: 'a': numpy does not support arrays with 65 dimensions")):
        source.numpy("a")


# --- the file behind it ----------------------------------------------------------------------


def test_a_file_that_is_written_to(tmp_path: Path) -> None:
    array = sample("float32", (8,))
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": array}))
    source = open_safetensors(str(path))
    os.utime(path, ns=(0, 1))
    for read in (source.numpy, source.tensor):
        with pytest.raises(SourceError) as caught:
            read("a")
        assert str(caught.value) == (f"{path}: The file changed after it was listed. Open the file again.")


def test_a_file_that_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": sample("float32", (8,)), "b": sample("float32", (8,))}))
    source, mapped = open_safetensors(str(path)), open_safetensors(str(path))
    mapped.numpy("a")
    path.unlink()
    with pytest.raises(SourceError, match="No such file"):
        source.numpy("a")
    assert mapped.numpy("b").shape == (8,)


def test_a_file_that_is_cut_while_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": sample("float32", (8,))}))
    source = open_safetensors(str(path))
    source.numpy("a")
    size = path.stat().st_size
    os.truncate(path, 50)
    with pytest.raises(TruncatedFile) as caught:
        source.numpy("a")
    assert str(caught.value) == f"{path}: The file has 50 bytes; it had {size} when it was listed"


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for open_one in (open_safetensors, tp.of):
        with pytest.raises(SourceError, match="Not a regular file"):
            open_one(str(tmp_path / "pipe.safetensors"))


def test_closing_forgets_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    array = sample("float32", (8,))
    path.write_bytes(safetensors_bytes({"a": array}))
    source = open_safetensors(str(path))
    before = source.numpy("a")
    source.close()
    after = source.numpy("a")
    assert not np.shares_memory(before, after)
    assert_identical(before, array)
    assert_identical(after, array)
