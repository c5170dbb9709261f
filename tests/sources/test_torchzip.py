from __future__ import annotations

import collections
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from torch_files import (
    assert_same,
    bits,
    floats,
    members_of,
    named,
    number,
    row,
    saved,
    storage,
    table,
    tensor,
    tensors_of,
    text,
    torch_zip,
    whole,
    written,
    zipped,
)
from torchparams import limits
from torchparams.errors import (
    FileFormatError,
    LimitExceeded,
    NotReadable,
    SizeMismatch,
    SourceError,
    TrailingBytes,
    TruncatedFile,
)
from torchparams.sources.torchfile.torchzip import TorchZipSource, open_torch_zip
from torchparams.testing import TORCH_DTYPES, Array, SourceTests, assert_identical

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ML_OR_NUMPY = set(TORCH_DTYPES)
SAVED_DTYPES = [  # every type that torch itself can save
    *TORCH_DTYPES,
    *("complex32", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
]


def refusal(
    tmp_path: Path, contents: bytes, kind: type[SourceError] = FileFormatError, inner: str | None = None
) -> str:
    """The message with which a file is refused, without its path."""
    path = written(tmp_path, contents)
    with pytest.raises(SourceError) as caught:
        open_torch_zip(path, inner)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(path)
    return str(caught.value).removeprefix(path).removeprefix(": ")


class TestTorchZip(SourceTests):
    dtypes = TORCH_DTYPES
    ties = strides = spans = metadata = True

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> TorchZipSource:
        torch.save(tensors_of(tensors, metadata), folder / "model.pt")
        return open_torch_zip(str(folder / "model.pt"))


class TestDeflated(SourceTests):
    """The same, compressed by another program, so that no bytes lie in the file as they are."""

    dtypes = TORCH_DTYPES
    ties = strides = metadata = True

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> TorchZipSource:
        members = members_of(saved(tensors_of(tensors, metadata)))
        return open_torch_zip(written(folder, zipped(members, deflate=True)))


class TestBigEndian(SourceTests):
    """The same, as a machine with the most significant byte first saves it."""

    dtypes = TORCH_DTYPES
    ties = strides = metadata = True

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> TorchZipSource:
        return open_torch_zip(written(folder, big_endian(tensors_of(tensors, metadata))))


def big_endian(things: dict[str, object]) -> bytes:
    members = members_of(saved(things))
    # torch numbers storages as it meets them; tensors that share one come to the same number.
    order: dict[int, int] = {}
    for thing in things.values():
        if isinstance(thing, torch.Tensor):
            key = thing.untyped_storage()._cdata
            if key in order:
                continue
            order[key] = len(order)
            size = thing.element_size() // (2 if thing.is_complex() else 1)
            name = f"archive/data/{order[key]}"
            raw = np.frombuffer(members[name], np.uint8)
            members[name] = raw.reshape(-1, size)[:, ::-1].tobytes() if raw.size else b""
    members["archive/byteorder"] = b"big"
    return zipped(members)


# --- against torch.load ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", SAVED_DTYPES)
def test_every_dtype_reads_as_torch_loads_it(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    raw = torch.arange(1, 97, dtype=torch.uint8)
    if dtype == "bool":
        raw = raw % 2
    made = raw.view(kind)
    things = {
        "vector": made,
        "scalar": made[1],
        "empty": made[:0],
        "view": made[2:5],
        "strided": made[: 4 * (len(made) // 4)].reshape(2, -1).t(),
        "expanded": made[3].expand(3, 2),
    }
    path = written(tmp_path, saved(things))
    theirs = torch.load(path)
    source = open_torch_zip(path)
    assert list(source.infos()) == list(things)
    for name, info in source.infos().items():
        assert info.dtype == dtype
        assert_same(source.tensor(name), theirs[name], name)
        assert info.storage is not None
        assert info.storage.offset == theirs[name].storage_offset()
        assert info.storage.stride == theirs[name].stride()
        assert info.storage.nbytes == theirs[name].untyped_storage().nbytes()
        if dtype in ML_OR_NUMPY:
            assert source.numpy(name).tobytes() == bits(theirs[name])
        else:
            with pytest.raises(NotReadable, match=f"{name}.*: numpy and ml_dtypes have no dtype for {dtype}"):
                source.numpy(name)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    things = {"w": torch.randn(3, 4), "nested": [torch.ones(2), {"x": torch.zeros(1)}], "n": 3}
    source = open_torch_zip(written(tmp_path, saved(things, protocol=protocol)))
    assert list(source.infos()) == ["w", "nested.0", "nested.1.x"]
    assert source.metadata == {"n": 3}
    assert_same(source.tensor("w"), things["w"])  # type: ignore[arg-type]  # it is that tensor


def test_a_checkpoint_with_its_optimizer(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "args": {"name": "run"}}
    path = written(tmp_path, saved(checkpoint), "run.ckpt")
    theirs = torch.load(path)
    source = open_torch_zip(path)
    names = [f"model.{name}" for name in theirs["model"]]
    names += [f"optimizer.state.{i}.{key}" for i, state in theirs["optimizer"]["state"].items() for key in state]
    assert list(source.infos()) == names
    assert_same(source.tensor("optimizer.state.0.exp_avg"), theirs["optimizer"]["state"][0]["exp_avg"])
    assert source.metadata["epoch"] == 7
    assert source.metadata["args"] == {"name": "run"}
    assert source.metadata["optimizer.param_groups"][0]["lr"] == 0.5

    inner = tp.of(f"{path}#model")
    assert inner.source.label == f"{path}#model"
    assert inner.names == list(theirs["model"])
    for name in inner:
        assert_same(inner[name], theirs["model"][name], name)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2, 3)
        self.head = torch.nn.Linear(2, 3, bias=False)
        self.head.weight = self.fc.weight
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("running", torch.ones(2))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("absent", None)
        self.mask = torch.ones(4)
        self.layers = torch.nn.ModuleList([torch.nn.BatchNorm1d(2), torch.nn.Identity()])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_lists_as_the_module(tmp_path: Path, legacy: bool) -> None:
    net = Net()
    params = tp.of(written(tmp_path, saved(net, legacy=legacy)))
    live = tp.of(net, buffers=True)
    assert sorted(params.names) == sorted(live.names)
    assert set(net.state_dict()) | {"scratch"} == {
        *params.names,
        *(n for i in params.infos.values() for n in i.aliases),
    }
    for name, info in params.infos.items():
        there = live.info(name)
        assert (info.kind, info.requires_grad, info.persistent) == (there.kind, there.requires_grad, there.persistent)
        assert (info.module or "").rpartition(".")[2] == (there.module or "").rpartition(".")[2]
        assert info.aliases == there.aliases
        assert torch.equal(params[name], live[name])
    assert params.metadata["(top)"] == f"a module of class {__name__}.Net, not built"
    assert params.metadata["mask"] == f"in no state_dict, an attribute of {__name__}.Net: a tensor, float32 4"


def test_no_class_of_the_file_is_needed(tmp_path: Path) -> None:
    contents = saved(Net()).replace(__name__.encode(), b"x" * len(__name__))
    assert zipfile.is_zipfile(written(tmp_path, contents))
    info = tp.of(written(tmp_path, contents)).info("frozen")
    assert info.module == "x" * len(__name__) + ".Net"


def test_parameters_and_flags(tmp_path: Path) -> None:
    things = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "plain": torch.ones(2),
        "leaf": torch.ones(2, requires_grad=True),
    }
    things["parameter"].note = "kept beside"  # type: ignore[attr-defined]  # any attribute, which is pickled as state
    infos = open_torch_zip(written(tmp_path, saved(things))).infos()
    assert [(info.kind, info.requires_grad) for info in infos.values()] == [
        ("parameter", True),
        ("parameter", False),
        ("tensor", None),
        ("tensor", True),
    ]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_conjugate_and_negative_views(tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, -3j, 0], dtype=torch.complex64)
    things = {
        "plain": values,
        "conj": values.conj(),
        "neg": values.clone().conj().imag,
        "half": torch.tensor([1, 2, 3, 4], dtype=torch.float16).view(torch.complex32).conj(),
    }
    path = written(tmp_path, saved(things))
    theirs = torch.load(path)
    source = open_torch_zip(path)
    for name in ("plain", "conj", "neg", "half"):
        assert_same(source.tensor(name), theirs[name], name)
        assert (source.span(name) is None) == (name != "plain")
    assert source.numpy("conj").tobytes() == bits(theirs["conj"])
    assert source.numpy("neg").tolist() == [-2, 3, 0]


def test_tensors_whose_values_cannot_be_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    things = {
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "wide": torch.quantize_per_tensor(torch.randn(5), 0.1, 0, torch.qint32),
        "packed": torch._empty_affine_quantized([5], scale=0.1, zero_point=0, dtype=torch.quint4x2),
        "meta": torch.empty(2, 3, device="meta"),
        "lazy": torch.nn.UninitializedParameter(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    contents = saved(things)
    recwarn.clear()
    source = open_torch_zip(written(tmp_path, contents))
    problems = {
        "sparse": "sparse (torch.sparse_coo)",
        "rows": "sparse (torch.sparse_csr)",
        "wide": "quantised (torch.per_tensor_affine)",
        "packed": "quantised (torch.per_tensor_affine)",
        "meta": "a meta tensor, which has a shape but no values",
        "lazy": "lazy: it has no shape and no values before its module first runs",
        "nested": "nested: rows of different lengths",
    }
    infos = source.infos()
    assert list(infos) == list(things)
    assert [infos[name].shape for name in list(things)[:6]] == [(3, 3), (3, 3), (5,), (5,), (2, 3), None]
    assert infos["packed"].nbytes == 3
    assert (infos["meta"].device, infos["sparse"].device) == ("meta", "file")
    assert (infos["lazy"].kind, infos["lazy"].requires_grad) == ("parameter", True)
    for name, problem in problems.items():
        assert source.span(name) is None
        for read in (source.numpy, source.tensor):
            with pytest.raises(NotReadable) as caught:
                read(name)
            assert str(caught.value) == f"{source.label}: '{name}': It is {problem}"


def test_tensor_subclasses(tmp_path: Path) -> None:
    contents = saved({"w": torch.ones(2).as_subclass(Marked), "p": torch.nn.Parameter(torch.ones(3))})
    source = open_torch_zip(written(tmp_path, contents))
    assert list(source.infos()) == ["w", "p"]
    assert source.numpy("w").tolist() == [1, 1]


class Marked(torch.Tensor):
    pass


def test_a_wrapper_is_one_tensor_and_its_parts_are_not_listed(tmp_path: Path) -> None:
    part = tensor(storage("0", 4), [4], [1])
    rebuild = named("torch._utils", "_rebuild_wrapper_subclass")
    dtype, device = named("torch", "float32"), named("torch", "device") + row(text("cpu")) + b"R"
    args = row(named("lib", "Sharded"), dtype, ints_(8), ints_(1), number(0), text("strided"), device, b"\x89")
    wrapped = named("torch._tensor", "_rebuild_from_type_v2") + row(
        rebuild, named("lib", "Sharded"), args, table({"_local": part, "_spec": text("x")})
    )
    path = written(tmp_path, torch_zip(whole(table({"w": wrapped + b"R"})), {"0": floats(1, 2, 3, 4)}))
    source = open_torch_zip(path)
    (info,) = source.infos().values()
    assert (info.name, info.shape, info.numel, info.layout) == ("w", (8,), 8, "Sharded")
    with pytest.raises(NotReadable, match=r"'w': It is a lib.Sharded, which keeps its values in other tensors"):
        source.numpy("w")
    assert open_torch_zip(path, "w._local").numpy("tensor").tolist() == [1, 2, 3, 4]
    assert list(open_torch_zip(path, "w").infos()) == ["tensor"]


def ints_(*values: int) -> bytes:
    return row(*map(number, values))


def test_arrays_in_a_checkpoint(tmp_path: Path) -> None:
    things: dict[str, Any] = {
        "small": np.arange(6, dtype=np.float64).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "foreign": np.arange(3, dtype=">i4"),
        "big": np.arange(5000, dtype=np.float32),
        "scalar": np.float32(1.5),
        "words": np.array(["a"]),
        "objects": np.array([None, 1]),
    }
    for protocol in (2, 4, 5):
        source = open_torch_zip(written(tmp_path, saved(things, protocol=protocol)))
        assert list(source.infos()) == ["small", "fortran", "foreign", "big"]
        for name in source.infos():
            expected = things[name]
            assert isinstance(expected, np.ndarray)
            assert_identical(source.numpy(name), expected.astype(expected.dtype.newbyteorder("=")))
        assert source.metadata == {
            "scalar": 1.5,
            "words": "a numpy array that is not numeric",
            "objects": "a numpy array that is not numeric",
        }
        span = source.span("big")
        assert (span is None) == (protocol == 2)  # which spells bytes as text
        if span is not None:
            with open(span.file, "rb") as file:
                assert file.read()[span.start : span.stop] == things["big"].tobytes()


def test_a_compressed_storage_is_inflated_once_while_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.arange(6.0)
    contents = zipped(members_of(saved({"a": base[:3], "b": base[3:]})), deflate=True)
    source = open_torch_zip(written(tmp_path, contents))
    info = source.infos()["a"]
    assert info.location is None
    assert info.storage is not None
    assert info.storage.nbytes == 24
    first = source.numpy("a")
    calls: list[object] = []
    monkeypatch.setattr(source, "_inflate", calls.append)
    assert source.numpy("b").tolist() == [3, 4, 5]
    assert np.shares_memory(first, source.numpy("a"))
    assert calls == []
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_a_script_lists_what_it_can(tmp_path: Path) -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(2, 3)
            self.register_buffer("b", torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x)
            return out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is on its way out; its files are not
        trace: Any = torch.jit.trace
        model = trace(Small(), torch.ones(1, 2), check_trace=False)
        torch.jit.save(model, str(tmp_path / "model.pt"))
    source = open_torch_zip(str(tmp_path / "model.pt"))
    assert sorted(source.infos()) == ["b", "fc.bias", "fc.weight"]
    assert source.infos()["fc.weight"].module == "torch.nn.modules.linear.Linear"
    assert_same(source.tensor("fc.weight"), model.state_dict()["fc.weight"])
    assert source.metadata["(torchscript)"].startswith("an archive of torch.jit.save: ")


# --- spans, CRCs -------------------------------------------------------------------------------------


def test_stored_crcs_are_those_of_the_members(tmp_path: Path) -> None:
    things = {"w": torch.randn(100), "v": torch.ones(3)}
    for contents in (saved(things), zipped(members_of(saved(things)), deflate=True)):
        path = written(tmp_path, contents)
        source = open_torch_zip(path)
        stored = source.stored_crcs()
        assert [crc.member for crc in stored] == list(members_of(contents))
        for crc in stored:
            plain = b"".join(source.member_chunks(crc.member))
            assert zlib.crc32(plain) == crc.crc
            lies = contents[crc.location.start : crc.location.stop]
            assert crc.location.file == path
            assert (zlib.decompress(lies, -15) if crc.compressed else lies) == plain
    with pytest.raises(FileFormatError, match="The zip has no member 'x'"):
        next(source.member_chunks("x"))


def test_crcs_that_nobody_computed_are_0(tmp_path: Path) -> None:
    how = torch.utils.serialization.config.save
    how.compute_crc32 = False
    try:
        contents = saved({"w": torch.ones(3)})
    finally:
        how.compute_crc32 = True
    source = open_torch_zip(written(tmp_path, contents))
    assert {crc.crc for crc in source.stored_crcs()} == {0}
    assert source.numpy("w").tolist() == [1, 1, 1]


# --- nothing of torch, and nothing that is not asked for ------------------------------------------------


def test_listing_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    path = written(tmp_path, saved({"w": torch.ones(2), "b": torch.ones(2).bfloat16()}))
    code = (
        "import sys, torchparams as tp\n"
        f"params = tp.of({path!r})\n"
        "assert params.names == ['w', 'b'] and repr(params)\n"
        "heavy = {'torch', 'numpy', 'rich', 'zipfile', 'pickle'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert params.numpy('b').tolist() == [1, 1]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"})


# --- broken checkpoints --------------------------------------------------------------------------------

ONE = tensor(storage("0", 4), [2, 2], [2, 1])


def test_the_hand_written_file_is_right(tmp_path: Path) -> None:
    path = written(tmp_path, torch_zip(whole(table({"w": ONE})), {"0": floats(1, 2, 3, 4)}, version=b"3\n"))
    assert open_torch_zip(path).numpy("w").tolist() == [[1, 2], [3, 4]]
    assert torch.load(path)["w"].tolist() == [[1, 2], [3, 4]]


def test_the_folder_is_found_under_any_name(tmp_path: Path) -> None:
    for folder in ("", "x/", "model best (1)/", "ü/"):
        members = {f"{folder}data.pkl": whole(table({"w": ONE})), f"{folder}data/0": floats(1, 2, 3, 4)}
        assert open_torch_zip(written(tmp_path, zipped(members))).numpy("w").tolist() == [[1, 2], [3, 4]]


def test_no_pickle(tmp_path: Path) -> None:
    said = refusal(tmp_path, zipped({"archive/data/0": b"", "archive/version": b"3"}))
    assert said == (
        "The zip is not a torch checkpoint: it has no data.pkl in its top folder. "
        "It holds archive/data/0, archive/version."
    )
    assert "It is empty" in refusal(tmp_path, zipped({}))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["a.npy", "b.npy"], "it is a numpy .npz archive"),
        (["[Content_Types].xml", "word/document.xml"], "it is an office document"),
        (["model.weights.h5", "config.json"], "it is a Keras model"),
        (["META-INF/MANIFEST.MF", "A.class"], "it is a Java archive"),
        (["m/archive_format", "m/models/model.json"], "it is a program of torch.export"),
        (["m/.data/version", "m/model/model.pkl"], "it is an archive of torch.package"),
        (["weights/model.safetensors"], "Unpack it, and open weights/model.safetensors"),
    ],
)
def test_other_zips_are_named(tmp_path: Path, names: list[str], what: str) -> None:
    assert what in refusal(tmp_path, zipped(dict.fromkeys(names, b"")))


def test_two_pickles(tmp_path: Path) -> None:
    assert refusal(tmp_path, zipped({"a/data.pkl": b"", "b/data.pkl": b""})) == (
        "The zip holds 2 pickles: a/data.pkl, b/data.pkl; a checkpoint has one"
    )


def test_what_is_no_zip(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"not a checkpoint").startswith("Not a torch checkpoint: it starts with b'not a ch'")
    assert refusal(tmp_path, b"\x80", TruncatedFile) == "The file ends after 1 byte, within its first mark"
    assert refusal(tmp_path, b"PK", TruncatedFile) == "The file ends after 2 bytes, within its first mark"


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path, torch_zip(whole(table({"w": ONE})), {"1": b"", "2": b""})) == (
        "The zip lacks 'archive/data/0', the storage of a tensor. It holds 2 storages."
    )


def test_a_storage_of_another_size(tmp_path: Path) -> None:
    assert refusal(tmp_path, torch_zip(whole(table({"w": ONE})), {"0": bytes(12)}), SizeMismatch) == (
        "'archive/data/0' has 12 bytes, but its storage of 4 × float32 takes 16"
    )


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "said"),
    [
        (1, [2, 2], [2, 1], "It is a view of elements 1 to 4 of a storage of 4"),
        (0, [5], [1], "It is a view of elements 0 to 4 of a storage of 4"),
        (0, [2, 2], [3, 1], "It is a view of elements 0 to 4 of a storage of 4"),
        (1 << 62, [1], [1], f"It is a view of elements {1 << 62:,} to {1 << 62:,} of a storage of 4"),
        (0, [2], [1 << 62], f"It is a view of elements 0 to {1 << 62:,} of a storage of 4"),
        (0, [2], [-1], "It is a view with the negative stride -1"),
        (3, [2, 2], [-2, -1], "It is a view with the negative stride -2"),
        (0, [-2], [1], "A tensor of shape (-2)"),
        (0, [1 << 62, 4], [0, 0], f"A tensor of shape ({1 << 62}, 4): more elements than can be counted"),
    ],
)
def test_views_outside_their_storage(
    tmp_path: Path, offset: int, shape: list[int], stride: list[int], said: str
) -> None:
    pickled = whole(table({"w": tensor(storage("0", 4), shape, stride, offset)}))
    assert refusal(tmp_path, torch_zip(pickled, {"0": bytes(16)})) == f"'w': {said}"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (tensor(storage("0", 4), [2], [1, 1]), "a tensor of shape (2) with strides (1, 1) at offset 0"),
        (tensor(storage("0", 4), [2], [1], -1), "a tensor of shape (2) with strides (1) at offset -1"),
        (tensor(storage("0", 4), [1 << 63], [1]), f"a tensor of shape ({1 << 63}) with strides (1) at offset 0"),
        (tensor(b"N", [2], [1]), "torch._utils._rebuild_tensor_v2 of None instead of a storage"),
        (named("torch._utils", "_rebuild_tensor_v2") + b")R", "torch._utils._rebuild_tensor_v2 with 0 arguments"),
        (tensor(storage("0", 4), [1] * 65, [1] * 65), "a tensor of shape (1, 1, 1,"),
        (storage("0", 4, "Strange"), "a storage of the unknown class torch.StrangeStorage"),
        (storage("0", -1), "a storage of -1 elements"),
        (storage("0", 1 << 62), f"a storage of {1 << 62} elements"),
        (row(text("storage")) + b"Q", "a storage described by 1 values, not 5 or 6"),
    ],
)
def test_tensors_that_are_not_described(tmp_path: Path, value: bytes, said: str) -> None:
    refused = refusal(tmp_path, torch_zip(whole(table({"w": value})), {"0": bytes(16)}))
    assert refused.startswith(", archive/data.pkl: The pickle is broken at byte ")
    assert said in refused


def test_expanded_tensors_are_listed_and_materialised_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = 1 << 40
    things = {
        "huge": tensor(storage("0", 1), [huge], [0]),
        "vast": tensor(storage("0", 1), [1 << 62], [0]),
        "odd": tensor(storage("0", 1), [1, 1], [1 << 62, 0]),
    }
    source = open_torch_zip(written(tmp_path, torch_zip(whole(table(things)), {"0": floats(2)})))
    assert source.infos()["huge"].numel == huge
    for ask in (source.numpy, source.tensor, source.span, source.check_size):
        with pytest.raises(LimitExceeded, match="'huge' has 1,099,511,627,776 elements, which are a view of 4 bytes"):
            ask("huge")
    assert source.numpy("odd").tolist() == [[2]]
    monkeypatch.setattr(limits, "EXPANDED_ELEMENTS", 1 << 63)
    assert source.numpy("huge")[huge - 1] == 2  # a view costs nothing
    assert source.tensor("huge").shape == (huge,)
    assert source.span("huge") is None
    with pytest.raises(LimitExceeded, match="It is an expanded tensor of more bytes than an array can have"):
        source.numpy("vast")

    turned = torch.tensor([1j], dtype=torch.complex64).conj()
    path = written(tmp_path, saved({"w": turned.expand(20)}))
    monkeypatch.setattr(limits, "EXPANDED_ELEMENTS", 12)
    assert open_torch_zip(path).numpy("w").tolist() == [-1j] * 20
    monkeypatch.setattr(limits, "EXPANDED_ELEMENTS", 11)
    with pytest.raises(LimitExceeded) as caught:
        open_torch_zip(path).numpy("w")
    assert str(caught.value) == (
        f"{path}: 'w' has 20 elements, which are a view of 8 bytes. "
        "If you trust the file, raise torchparams.limits.EXPANDED_ELEMENTS."
    )


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_the_byte_order_is_one_of_two(tmp_path: Path) -> None:
    pickled = whole(table({"w": ONE}))
    values = {"0": struct.pack(">4f", 1, 2, 3, 4)}
    source = open_torch_zip(written(tmp_path, torch_zip(pickled, values, byteorder=b"big")))
    assert source.numpy("w").tolist() == [[1, 2], [3, 4]]
    assert source.span("w") is None
    assert source.infos()["w"].location is not None
    assert refusal(tmp_path, torch_zip(pickled, values, byteorder=b"middle")) == (
        "archive/byteorder is b'middle', neither 'little' nor 'big'"
    )
    assert refusal(tmp_path, torch_zip(pickled, values, byteorder=bytes(99))) == (
        "archive/byteorder is too long, neither 'little' nor 'big'"
    )
    halves = saved({"h": torch.ones(2, dtype=torch.complex32)})
    swapped = zipped({**members_of(halves), "archive/byteorder": b"big"})
    with pytest.raises(NotReadable, match="'h': Big-endian complex32 is not supported"):
        open_torch_zip(written(tmp_path, swapped)).tensor("h")


def test_bytes_after_the_pickle(tmp_path: Path) -> None:
    said = refusal(tmp_path, torch_zip(whole(table({})) + b"abc"), TrailingBytes)
    assert said.startswith(", archive/data.pkl: 3 bytes after the end of the pickle, at byte ")


def test_pickles_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICKLE_BYTES", 100)
    assert refusal(tmp_path, torch_zip(bytes(101)), LimitExceeded) == (
        ", archive/data.pkl: The pickle has 101 bytes; the limit is 100. "
        "If you trust the file, raise torchparams.limits.PICKLE_BYTES."
    )


def test_a_small_file_does_not_inflate_to_a_large_pickle(tmp_path: Path) -> None:
    bomb = zipped({"archive/data.pkl": whole(b"N0" * (20 << 20) + b"N")}, deflate=True)
    assert len(bomb) < 100_000
    assert "archive/data.pkl: It inflates from" in refusal(tmp_path, bomb, LimitExceeded)


def test_inflating_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = zipped(members_of(saved({"w": torch.zeros(1000)})), deflate=True)
    source = open_torch_zip(written(tmp_path, contents))
    monkeypatch.setattr(limits, "INFLATED_BYTES", 3999)
    with pytest.raises(LimitExceeded, match=r"archive/data/0: It inflates from .* to 4,000 bytes; the limit is 3,999"):
        source.numpy("w")


def test_two_views_that_share_memory_are_two_entries(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    things = {"a": base[:6], "b": base[6:], "again": base[:6], "shaped": base[:6].reshape(2, 3)}
    source = open_torch_zip(written(tmp_path, saved(things)))
    assert {name: info.aliases for name, info in source.infos().items()} == {
        "a": ("again",),
        "b": (),
        "shaped": (),
    }
    keys = {info.storage.key for info in source.infos().values() if info.storage}
    assert keys == {"0"}
    assert source.numpy("again").tolist() == source.numpy("a").tolist()
    assert source.span("again") == source.span("a")


def test_an_ordered_dict_with_attributes(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    assert isinstance(state, collections.OrderedDict)
    assert hasattr(state, "_metadata")
    assert list(open_torch_zip(written(tmp_path, saved(state))).infos()) == ["weight", "bias"]


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, saved({"w": torch.ones(2)}))
    source = open_torch_zip(path)
    written(tmp_path, saved({"w": torch.ones(2000)}))
    with pytest.raises(SourceError, match="The file changed after it was listed"):
        source.tensor("w")


def test_through_the_front_door(tmp_path: Path) -> None:
    for name in ("a.pt", "a.pth", "a.bin", "a.ckpt", "a.weights", "a"):
        path = written(tmp_path, saved({"w": torch.ones(2)}), name)
        assert tp.of(path).source.format == "torch zip"
