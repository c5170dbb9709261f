from __future__ import annotations

import io
import pickle
import struct
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from torch_files import (
    Payload,
    assert_same,
    bits,
    floats,
    legacy_file,
    named,
    number,
    row,
    saved,
    storage,
    table,
    tensor,
    tensors_of,
    text,
    whole,
    written,
)
from torchparams.errors import FileFormatError, NotReadable, SizeMismatch, SourceError, TrailingBytes, TruncatedFile
from torchparams.sources.torchfile.legacy import (
    LegacySource,
    PlainPickleSource,
    open_legacy,
    open_plain_pickle,
    refuse_tar,
)
from torchparams.testing import TORCH_DTYPES, Array, SourceTests, assert_identical

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torchparams.sources.base import Source

# torch.load fails on the types that came after the format; what torch.save wrote is whole all the same.
LATER = ("uint16", "uint32", "uint64", "float8_", "complex32")


class TestLegacy(SourceTests):
    dtypes = TORCH_DTYPES
    ties = strides = spans = metadata = True

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> LegacySource:
        return open_legacy(written(folder, saved(tensors_of(tensors, metadata), legacy=True)))


class TestPickledTensors(SourceTests):
    """torch tensors that were pickled without torch.save: each storage is a legacy file within the pickle."""

    dtypes = TORCH_DTYPES
    ties = strides = metadata = True

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> PlainPickleSource:
        plain = {} if tensors else {"__": np.zeros(1, np.int8)}  # so that a table of nothing is a table
        made = tensors_of(tensors, metadata)
        return _without(open_plain_pickle(written(folder, pickle.dumps({**made, **plain}), "a.pkl")), "__")


class TestPickledArrays(SourceTests):
    """Arrays of numpy and ml_dtypes in a pickle."""

    dtypes = tuple(dtype for dtype in TORCH_DTYPES if not dtype.startswith(("bfloat", "float8")))
    torch_dtypes = dtypes
    ties = metadata = True

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> PlainPickleSource:
        things = {**(tensors or {"__": np.zeros(1, np.int8)}), **(metadata or {})}
        return _without(open_plain_pickle(written(folder, pickle.dumps(things, 5), "a.pkl")), "__")


def _without(source: PlainPickleSource, name: str) -> PlainPickleSource:
    """The source as if the tensor `name` were not in its file."""
    source._names.pop(name, None)
    source._entries.pop(name, None)
    source._infos = {key: info for key, info in source._infos.items() if key != name}  # type: ignore[assignment]
    return source


def refusal(
    tmp_path: Path, contents: bytes, kind: type[SourceError] = FileFormatError, opener: Any = open_legacy
) -> str:
    """The message with which a file is refused, without its path."""
    path = written(tmp_path, contents)
    with pytest.raises(SourceError) as caught:
        opener(path)
    assert type(caught.value) is kind
    return str(caught.value).removeprefix(path).removeprefix(": ")


# --- the legacy format -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_reads_as_torch_loads_it(tmp_path: Path, dtype: str) -> None:
    raw = torch.arange(1, 97, dtype=torch.uint8)
    made = (raw % 2 if dtype == "bool" else raw).view(getattr(torch, dtype))
    things = {
        "a": made,
        "view": made[1:4],
        "t": made[:4].reshape(2, 2).t(),
        "wide": made[2].expand(3),
        "none": made[:0],
    }
    path = written(tmp_path, saved(things, legacy=True))
    theirs = things if dtype.startswith(LATER) else torch.load(path)
    source = open_legacy(path)
    assert list(source.infos()) == list(things)
    for name in things:
        assert_same(source.tensor(name), theirs[name], name)
        assert source.numpy(name).tobytes() == bits(theirs[name])


def test_checkpoints_modules_and_parameters(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    path = written(tmp_path, saved({"model": model.state_dict(), "whole": model, "epoch": 3}, legacy=True))
    source = open_legacy(path)
    state = model.state_dict()
    assert list(source.infos()) == [f"model.{name}" for name in state]
    assert source.infos()["model.0.weight"].aliases == ("whole.0.weight",)
    assert source.infos()["model.0.weight"].kind == "parameter"
    assert source.metadata["epoch"] == 3
    inner = tp.of(f"{path}#whole")
    assert inner.names == list(state)
    assert [info.kind for info in inner.infos.values()].count("buffer") == 3
    assert inner.info("0.weight").module == "torch.nn.modules.linear.Linear"
    for name in state:
        assert torch.equal(inner[name], state[name])


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    source = open_legacy(written(tmp_path, saved({"w": torch.ones(2)}, legacy=True, protocol=protocol)))
    assert source.numpy("w").tolist() == [1, 1]


def test_the_byte_order_of_the_machine_is_not_that_of_the_file(tmp_path: Path) -> None:
    pickled = whole(table({"w": tensor(legacy_storage("k", 2), [2], [1])}))
    for little in (True, False):
        path = written(tmp_path, legacy_file(pickled, [("k", 2, floats(1, 2))], little=little))
        assert open_legacy(path).numpy("w").tolist() == [1, 2]
        assert torch.load(path)["w"].tolist() == [1, 2]


def legacy_storage(key: str, numel: int, kind: str = "Float") -> bytes:
    return storage(key, numel, kind, view=b"N")


def test_views_of_storages(tmp_path: Path) -> None:
    view = storage("root", 6, view=row(text("part"), number(2), number(3)))
    pickled = whole(
        table(
            {
                "part": tensor(view, [2], [1], 1),
                "all": tensor(legacy_storage("root", 6), [6], [1]),
                "same": tensor(legacy_storage("root", 6), [2], [1], 3),
            }
        )
    )
    path = written(tmp_path, legacy_file(pickled, [("root", 6, floats(0, 1, 2, 3, 4, 5))]))
    source = open_legacy(path)
    infos = source.infos()
    assert source.numpy("part").tolist() == torch.load(path)["part"].tolist() == [3, 4]
    assert infos["part"].aliases == ("same",)
    shared = infos["part"].storage
    assert shared is not None
    assert (shared.key, shared.offset, shared.nbytes) == ("root", 3, 24)
    outside = whole(table({"part": tensor(view, [3], [1], 1)}))
    assert refusal(tmp_path, legacy_file(outside, [("root", 6, bytes(24))])) == (
        "'part': It is a view of elements 1 to 3 of a storage of 3"
    )
    for start, count in ((4, 3), (-1, 2), (2, -1)):
        wrong = storage("root", 6, view=row(text("part"), number(start), number(count)))
        assert "of a storage of 6 elements" in refusal(
            tmp_path, legacy_file(whole(table({"w": tensor(wrong, [1], [1])})), [("root", 6, bytes(24))])
        )
    assert "a view of a storage that is not described by three values" in refusal(
        tmp_path, legacy_file(whole(storage("root", 6, view=row(number(1)))), [("root", 6, bytes(24))])
    )


def test_old_files_spell_keys_and_words_in_other_ways(tmp_path: Path) -> None:
    word = b"U\x07storage"  # text of Python 2
    pid = row(word, named("torch", "FloatStorage"), number(94), b"U\x03cpu", number(2), b"N") + b"Q"
    contents = legacy_file(whole(table({"w": tensor(pid, [2], [1])})), [("", 2, floats(1, 2))], keys=[94])
    assert open_legacy(written(tmp_path, contents)).numpy("w").tolist() == [1, 2]


def test_classes_of_modules_with_their_source(tmp_path: Path) -> None:
    cls = row(text("module"), named("lib", "Net"), text("/lib.py"), text("class Net: …")) + b"Q"
    state = table(
        {"_modules": b"}", "_buffers": b"}", "_parameters": table({"w": tensor(legacy_storage("0", 1), [1], [1])})}
    )
    contents = legacy_file(whole(cls + b")\x81" + state + b"b"), [("0", 1, floats(5))])
    source = open_legacy(written(tmp_path, contents))
    assert source.infos()["w"].module == "lib.Net"
    assert source.numpy("w").tolist() == [5]


def test_tensors_from_before_they_were_rebuilt(tmp_path: Path) -> None:
    data = (
        named("torch", "FloatTensor")
        + b")\x81"
        + row(legacy_storage("0", 4), number(1), row(number(2)), row(number(1)))
        + b"b"
    )
    parameter = named("torch.nn.parameter", "Parameter") + b")\x81" + row(data, b"N", b"\x89", b"N") + b"b"
    variable = named("torch.autograd.variable", "Variable") + row(data) + b"R"
    contents = legacy_file(whole(table({"t": data, "p": parameter, "v": variable})), [("0", 4, floats(0, 1, 2, 3))])
    source = open_legacy(written(tmp_path, contents))
    info = source.infos()["t"]
    assert (info.aliases, info.kind, info.requires_grad) == (("p", "v"), "parameter", False)
    assert source.numpy("p").tolist() == [1, 2]


def test_cut_at_every_byte(tmp_path: Path) -> None:
    contents = saved({"w": torch.ones(3), "b": torch.zeros(2)}, legacy=True)
    assert len(contents) < 800
    for size in range(1, len(contents)):
        refusal(tmp_path, contents[:size], TruncatedFile)


def test_where_it_was_cut_is_said(tmp_path: Path) -> None:
    pickled = whole(table({"w": tensor(legacy_storage("k", 2), [2], [1])}))
    contents = legacy_file(pickled, [("k", 2, floats(1, 2))])
    size = len(contents)
    assert refusal(tmp_path, contents[:-3], TruncatedFile) == (
        f"The file ends at byte {size - 3}, within the storage 'k', which takes bytes {size - 8} to {size}"
    )
    assert refusal(tmp_path, contents[:-9], TruncatedFile) == (
        f"The file ends at byte {size - 9}, within the number of elements of the storage 'k'"
    )
    assert refusal(tmp_path, contents[:-18], TruncatedFile).startswith("The pickle that starts at byte ")
    assert refusal(tmp_path, contents + b"ab", TrailingBytes) == f"2 bytes after the last storage, at byte {size}"


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    pickled = whole(table({"w": tensor(legacy_storage("k", 2), [2], [1])}))
    values = floats(1, 2)
    assert "has 3 elements by its own header and 2 by the pickle" in refusal(
        tmp_path, legacy_file(pickled, [("k", 3, values)]), SizeMismatch
    )
    assert "has -1 elements by its own header" in refusal(
        tmp_path, legacy_file(pickled, [("k", -1, b"")]), SizeMismatch
    )
    assert refusal(tmp_path, legacy_file(pickled, [])) == "The file lacks the storage 'k'. It lists 0 storages."
    assert refusal(tmp_path, legacy_file(pickled, [("k", 2, values), ("k", 2, values)])) == (
        "The file lists the storage 'k' twice"
    )
    assert refusal(tmp_path, legacy_file(pickled, [("other", 2, values)])) == (
        "The file lists a storage 'other' that is not used"
    )
    assert refusal(tmp_path, legacy_file(pickled, [], keys={"k": 1})).endswith(
        "The list of storages is a dict of 1 item"
    )
    assert refusal(tmp_path, legacy_file(pickled, [("k", 2, values)], protocol=7)) == (
        "torch's legacy format with the unknown protocol 7; only 1001 is supported"
    )
    assert refusal(tmp_path, legacy_file(pickled, [("k", 2, values)], magic=5)) == (
        "Not torch's legacy format: it does not start with its magic number"
    )
    both = whole(
        table({"a": tensor(legacy_storage("k", 2), [2], [1]), "b": tensor(legacy_storage("k", 9, "Double"), [2], [1])})
    )
    assert refusal(tmp_path, legacy_file(both, [("k", 2, values)]), SizeMismatch) == (
        "The storage 'k' has 8 bytes, but is used as one of 9 × float64"
    )


def test_a_tar_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    assert refusal(tmp_path, buffer.getvalue(), opener=refuse_tar) == (
        "A tar archive of torch 0.1, which is not supported. "
        "Load it with torch.load(path, weights_only=False) if you trust it, and save it again."
    )
    with pytest.raises(FileFormatError, match=r"A tar archive of torch 0\.1"):
        tp.of(written(tmp_path, buffer.getvalue()))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO(b""))
    assert refusal(tmp_path, buffer.getvalue(), opener=refuse_tar) == (
        "A tar archive, not a checkpoint. Unpack it, and open the checkpoint in it."
    )


# --- plain pickles -----------------------------------------------------------------------------------


def test_arrays_lie_where_the_file_has_them(tmp_path: Path) -> None:
    things = {"a": np.arange(5000.0), "small": np.ones((2, 3), np.int8), "foreign": np.arange(4000, dtype=">u2")}
    path = written(tmp_path, pickle.dumps(things, 4), "a.pkl")
    source = open_plain_pickle(path)
    for name, array in things.items():
        assert_identical(source.numpy(name), array.astype(array.dtype.newbyteorder("=")))
    span = source.span("a")
    assert span is not None
    with open(path, "rb") as file:
        assert file.read()[span.start : span.stop] == things["a"].tobytes()
    assert source.span("foreign") is None
    assert source.infos()["foreign"].location is not None
    assert source.infos()["small"].location is None


def test_every_way_to_pickle_arrays(tmp_path: Path) -> None:
    things = {"a": np.arange(6, dtype=np.float16).reshape(2, 3).T, "b": np.array(3), "c": np.array([1j], np.complex64)}
    for protocol in range(6):
        source = open_plain_pickle(written(tmp_path, pickle.dumps(things, protocol), "a.pkl"))
        for name, array in things.items():
            assert_identical(source.numpy(name), array, f"protocol {protocol}")


def test_a_pickle_without_tensors(tmp_path: Path) -> None:
    assert refusal(tmp_path, pickle.dumps({"a": 1}), opener=open_plain_pickle) == (
        "The pickle contains no tensors and no numeric arrays: it is a dict of 1 item"
    )
    contents = pickle.dumps(Payload(print, "never"))
    assert refusal(tmp_path, contents, opener=open_plain_pickle).endswith(
        "it is builtins.print('never'). It calls builtins.print: do not unpickle."
    )


def test_plain_pickles_are_one_pickle(tmp_path: Path) -> None:
    contents = pickle.dumps({"a": np.ones(2)})
    assert refusal(tmp_path, contents + b"ab", TrailingBytes, open_plain_pickle) == (
        f"2 bytes after the end of the pickle, at byte {len(contents)}"
    )
    for size in range(1, len(contents)):
        refusal(tmp_path, contents[:size], TruncatedFile, open_plain_pickle)


def test_arrays_that_contradict_themselves(tmp_path: Path) -> None:
    array = np.ones(3)
    contents = pickle.dumps({"a": array}, 2)
    assert contents.count(b"K\x03\x85") == 1
    assert "a numpy array of 4 × float64 with 24 bytes" in refusal(
        tmp_path, contents.replace(b"K\x03\x85", b"K\x04\x85"), opener=open_plain_pickle
    )


def test_storages_within_a_pickle_are_checked(tmp_path: Path) -> None:
    load = named("torch.storage", "_load_from_bytes")

    def within(inside: bytes) -> bytes:
        return whole(table({"w": tensor(load + row(b"B" + struct.pack("<I", len(inside)) + inside) + b"R", [1], [1])}))

    good = legacy_file(whole(legacy_storage("k", 1)), [("k", 1, floats(2))])
    assert open_plain_pickle(written(tmp_path, within(good), "a.pkl")).numpy("w").tolist() == [2]
    assert "within the storage 'k'" in refusal(tmp_path, within(good[:-1]), TruncatedFile, open_plain_pickle)
    assert "1 byte after the storage within the pickle" in refusal(
        tmp_path, within(good + b"x"), opener=open_plain_pickle
    )
    other = legacy_file(whole(number(1)), [])
    assert "torch.storage._load_from_bytes of an object that is not a storage" in refusal(
        tmp_path, within(other), opener=open_plain_pickle
    )
    # One within another: the inner one is not read.
    nested = legacy_file(whole(load + row(b"C" + bytes([len(other)]) + other) + b"R"), [])
    assert "of an object that is not a storage" in refusal(tmp_path, within(nested), opener=open_plain_pickle)


def test_storages_that_lie_nowhere_are_no_tensors(tmp_path: Path) -> None:
    contents = whole(table({"n": number(1), "w": tensor(storage("0", 1), [1], [1])}))
    assert "torch._utils._rebuild_tensor_v2 of a Reduced instead of a storage" in refusal(
        tmp_path, contents, opener=open_plain_pickle
    )


def test_through_the_front_door(tmp_path: Path) -> None:
    things = {"w": torch.ones(2)}
    for contents, kind in ((saved(things, legacy=True), "torch legacy"), (pickle.dumps(things), "pickle")):
        source: Source = tp.of(written(tmp_path, contents, "any.name")).source
        assert source.format == kind
        assert source.numpy("w").tolist() == [1, 1]


def test_meta_tensors_in_a_pickle(tmp_path: Path) -> None:
    source = open_plain_pickle(written(tmp_path, pickle.dumps({"m": torch.empty(2, device="meta")}), "a.pkl"))
    with pytest.raises(NotReadable, match="'m': It is a meta tensor"):
        source.numpy("m")
