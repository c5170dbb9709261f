"""Torch files written without torch, read by torch, Python's zip reader and this library."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from bit_patterns import NUMERIC
from torchparams.dtypes import DType
from torchparams.edit.plan.layout import Output, View
from torchparams.edit.plan.plan import Plan
from torchparams.edit.write import torchzip_out
from torchparams.expressions.base import Stored
from torchparams.testing import MemorySource, sample, to_torch

if TYPE_CHECKING:
    from pathlib import Path

Array = np.ndarray[Any, Any]
TORCH = [name for name in NUMERIC if DType.of(name).torch_name]


def written(folder: Path, arrays: dict[str, Array], views: list[View] | None = None) -> Path:
    source = MemorySource(arrays)
    path = folder / "out.pt"
    Plan([Output(name, Stored(source, name)) for name in arrays], path, views=views or (), overwrite=True).run()
    return path


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_every_type(name: str, mmap: bool, tmp_path: Path) -> None:
    arrays = {f"{'x'.join(map(str, shape))}.w": sample(name, shape) for shape in ((), (0,), (3,), (2, 3, 4), (2, 0))}
    loaded = torch.load(written(tmp_path, arrays), weights_only=True, mmap=mmap)
    assert type(loaded).__name__ == "OrderedDict"
    assert list(loaded) == list(arrays)
    for key, array in arrays.items():
        assert loaded[key].dtype == DType.of(name).torch
        assert tuple(loaded[key].shape) == array.shape
        assert loaded[key].is_contiguous()
        assert not loaded[key].requires_grad
        assert bits(loaded[key]) == bits(to_torch(array))


def test_every_member_is_in_order(tmp_path: Path) -> None:
    arrays = {f"layer.{i}": sample("float32", (i, 3)) for i in range(5)}
    path = written(tmp_path, arrays)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            *("archive/data.pkl", "archive/byteorder"),
            *(f"archive/data/{i}" for i in range(5)),
            "archive/version",
        ]
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
    for info in tp.of(str(path)).infos.values():
        assert info.location is not None
        assert info.location.start % 64 == 0
    assert tp.verify(str(path)).ok


def test_views_share_what_they_share(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    f32 = DType.of("float32")
    views = [
        View("same", "w", f32, (4, 6), 0, (6, 1)),
        View("transposed", "w", f32, (6, 4), 0, (1, 6)),
        View("row", "w", f32, (6,), 12, (1,)),
        View("bits", "w", DType.of("int32"), (4, 6), 0, (6, 1)),
        View("halves", "w", DType.of("bfloat16"), (2,), 3, (1,)),
    ]
    loaded = torch.load(written(tmp_path, {"w": base}, views), weights_only=True)
    w = torch.from_numpy(base)
    assert {t.untyped_storage().data_ptr() for t in loaded.values()} == {loaded["w"].untyped_storage().data_ptr()}
    assert torch.equal(loaded["same"], w)
    assert torch.equal(loaded["transposed"], w.T)
    assert torch.equal(loaded["row"], w[2])
    assert torch.equal(loaded["bits"], w.view(torch.int32))
    assert torch.equal(loaded["halves"], w.view(torch.bfloat16).reshape(-1)[3:5])
    table = tp.of(str(tmp_path / "out.pt"))
    assert table.info("w").aliases == ("same",)


def test_a_model_loads_it(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    path = tmp_path / "model.pt"
    tp.save(model, path)
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    other.load_state_dict(torch.load(path, weights_only=True))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def test_names_of_any_characters(tmp_path: Path) -> None:
    arrays = {name: sample("int8", (2,)) for name in ("ä.weight", "日本.w", "a b", "x" * 300, "q'\"\\", "\n")}
    assert list(torch.load(written(tmp_path, arrays), weights_only=True)) == list(arrays)


def test_more_globals_and_texts_than_a_byte_counts(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full(1, i, np.int16) for i in range(700)}
    loaded = torch.load(written(tmp_path, arrays), weights_only=True)
    assert [int(loaded[name]) for name in arrays] == list(range(700))


def test_numbers_of_every_length() -> None:
    import pickle

    numbers = [0, 1, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1]
    for count in range(6):
        writer = torchzip_out._Pickle()
        writer.numbers(numbers[:count] if count else [])
        assert pickle.loads(bytes(writer.out) + b".") == tuple(numbers[:count])
    for number in numbers:
        writer = torchzip_out._Pickle()
        writer.number(number)
        assert pickle.loads(bytes(writer.out) + b".") == number


@pytest.mark.parametrize(("far", "many"), [(1000, 1 << 16), (200, 1 << 16), (1 << 32, 6), (1000, 6), (0, 0)])
def test_the_fields_of_zip64(far: int, many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A reader takes the wide fields wherever the narrow ones are full, however small the numbers are.
    monkeypatch.setattr(torchzip_out, "_LIMIT_32", far)
    monkeypatch.setattr(torchzip_out, "_LIMIT_16", many)
    arrays = {f"layer.{i}": sample("float32", (20 * i, 3)) for i in range(5)}
    path = written(tmp_path, arrays)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == 8
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        for name, array in arrays.items():
            assert bits(loaded[name]) == array.tobytes()
    assert tp.of(str(path)).numpy("layer.4").tobytes() == arrays["layer.4"].tobytes()


def test_writing_imports_no_torch(tmp_path: Path) -> None:
    written(tmp_path, {"w": sample("bfloat16", (3, 4))})
    code = (
        "import json, sys; import torchparams as tp; tp.convert(sys.argv[1], sys.argv[2]).run();"
        "tp.convert(sys.argv[1], sys.argv[3]).run();"
        "print(json.dumps([m for m in ('torch', 'numpy') if m in sys.modules]))"
    )
    argv = [sys.executable, "-c", code, tmp_path / "out.pt", tmp_path / "a.safetensors", tmp_path / "b.pt"]
    ran = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
    assert bits(torch.load(tmp_path / "b.pt", weights_only=True)["w"]) == bits(
        torch.load(tmp_path / "out.pt", weights_only=True)["w"]
    )
