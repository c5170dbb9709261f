"""Distributed checkpoints: what torch.distributed.checkpoint writes, as one table."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import torchparams as tp
from torchparams.dtypes import ALL
from torchparams.errors import FileFormatError, NotReadable, UnknownName
from torchparams.expressions.assembled import Assembled
from torchparams.testing import SourceTests, to_torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torchparams.sources.base import Source
    from torchparams.testing import Array

dcp: Any = checkpoint  # which does not declare what it exports
WORLDS = (1, 2, 4)
LAYOUTS = ("dcp", "files", "threads")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")


class TestDcp(SourceTests):
    dtypes = tuple(str(dtype) for dtype in ALL if dtype.numpy_name and dtype.torch_name and dtype.bits >= 8)
    spans = True
    located = False
    order = False

    def make(self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Source:
        dcp.save({name: to_torch(array) for name, array in tensors.items()}, checkpoint_id=folder, no_dist=True)
        return tp.of(folder).source


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_what_torch_joins(training: Path, tmp_path: Path, layout: str, world: int) -> None:
    folder = training / f"{layout}-{world}"
    dcp_to_torch_save(folder, tmp_path / "joined.pt")
    joined = tp.of(tmp_path / "joined.pt")
    ours = tp.of(folder)
    assert set(ours.names) == set(joined.names)
    assert tp.digest(ours).digest == tp.digest(joined).digest
    assert tp.diff(ours, joined).same
    assert tp.digest(f"{folder}#model").digest == tp.digest(training / "full.pt").digest
    assert dict(ours.metadata)["step"] == 7


@pytest.mark.parametrize("world", WORLDS)
def test_shards_in_safetensors_are_joined(training: Path, world: int) -> None:
    ours = tp.of(training / f"shards-{world}")
    assert tp.digest(ours).digest == tp.digest(training / "full.pt").digest
    assert "how many there should be" in ours.metadata["(shards)"]


def test_two_dimensions_and_replicas(training: Path) -> None:
    ours, full = tp.of(training / "square"), tp.of(training / "full.pt")
    for name in ours.names:
        np.testing.assert_array_equal(ours.numpy(name), full.numpy(name))
    assert [len(ours.source.row(name).operands) for name in ("layers.0.weight", "layers.1.weight")] == [4, 2]


def test_the_listing(training: Path) -> None:
    assert str(tp.ls(training / "dcp-4")).replace(f"{training}/", "") == (
        """dcp-4 (distributed checkpoint)
name                                     shape         dtype     numel      size
model.layers.0.weight                    [13, 7]       float32      91     364 B
model.layers.1.weight                    [16, 8]       bfloat16    128     256 B
model.bias                               [5]           float32       5      20 B
model.steps                              [11]          int64        11      88 B
model.turned                             [6, 8]        float32      48     192 B
model.last                               [2, 4, 6, 6]  float32     288  1.12 KiB
model.none                               [0, 3]        float32       0       0 B
model.scale                              []            float32       1       4 B
optimizer.state.layers.0.weight.exp_avg  [13, 7]       float32      91     364 B
optimizer.state.layers.1.weight.exp_avg  [16, 8]       bfloat16    128     256 B
optimizer.state.bias.exp_avg             [5]           float32       5      20 B
optimizer.state.steps.exp_avg            [11]          int64        11      88 B
optimizer.state.turned.exp_avg           [6, 8]        float32      48     192 B
optimizer.state.last.exp_avg             [2, 4, 6, 6]  float32     288  1.12 KiB
optimizer.state.none.exp_avg             [0, 3]        float32       0       0 B
optimizer.state.scale.exp_avg            []            float32       1       4 B
16 tensors · 1.14 K parameters · 4.05 KiB
parts that can be listed separately: dcp-4#model (8 tensors), dcp-4#optimizer (8 tensors)
beside the tensors: 4 entries
  optimizer.lr = 0.1
  step = 7
  note.text = six
  note.nothing = None"""
    )


def test_parts(training: Path) -> None:
    model = tp.of(f"{training}/dcp-4#model")
    assert "layers.0.weight" in model.names
    state = tp.of(f"{training}/dcp-4#optimizer.state")
    assert "layers.0.weight.exp_avg" in state.names
    assert state.metadata == {}
    assert tp.of(f"{training}/dcp-4#optimizer").metadata == {"lr": 0.1}
    with pytest.raises(UnknownName) as caught:
        tp.of(f"{training}/dcp-4#mode")
    assert str(caught.value).endswith(
        "No tensor is below 'mode'. Its names begin with model, optimizer, step, note. Did you mean '#model'?"
    )


def test_listing_reads_no_chunk(training: Path, tmp_path: Path) -> None:
    """The table is that of `.metadata`: the files are asked for their size alone."""
    folder = shutil.copytree(training / "dcp-2", tmp_path / "holes")
    for file in folder.glob("*.distcp"):
        size = file.stat().st_size
        file.write_bytes(b"")
        os.truncate(file, size)
    assert len(tp.of(folder).infos) == 16
    with pytest.raises(FileFormatError, match="Not a torch checkpoint"):
        tp.stats(folder)


def test_rows_by_rows_are_copied_by_the_kernel(tmp_path: Path) -> None:
    """Chunks that follow each other in the tensor are byte ranges; columns are computed."""
    weights = torch.arange(60.0).reshape(10, 6)
    dcp.save({"w": weights}, checkpoint_id=tmp_path / "whole", no_dist=True)
    plan = tp.convert(tmp_path / "whole", tmp_path / "out.safetensors")
    assert plan.copied == 240


@pytest.mark.parametrize("source", ["dcp-4#model", "shards-4"])
def test_convert_writes_one_file_or_shards(training: Path, tmp_path: Path, source: str) -> None:
    full = torch.load(training / "full.pt")
    tp.convert(f"{training}/{source}", tmp_path / "one.safetensors").run()
    loaded = load_file(tmp_path / "one.safetensors")
    assert set(loaded) == set(full)
    assert all(torch.equal(loaded[name], full[name]) for name in full)
    tp.convert(f"{training}/{source}", tmp_path / "shards", "layers.**", max_shard_size=300).run()
    assert sorted(tp.of(tmp_path / "shards").names) == ["layers.0.weight", "layers.1.weight"]
    assert tp.diff(tmp_path / "shards", f"{training}/{source}", "layers.**").same


def test_two_steps_are_compared(training: Path, tmp_path: Path) -> None:
    changed = torch.load(training / "full.pt")
    changed["layers.0.weight"][12, 6] += 1
    dcp.save({"model": changed}, checkpoint_id=tmp_path / "step-2", no_dist=True)
    found = tp.diff(f"{training}/dcp-4#model", tmp_path / "step-2#model")
    assert [row.name for row in found.differing] == ["layers.0.weight"]


def test_statistics_are_those_of_the_whole(training: Path) -> None:
    ours, full = tp.stats(f"{training}/square"), tp.stats(training / "full.pt")
    for each in ours:
        assert (each.mean, each.std, each.min, each.max) == (
            full[each.name].mean, full[each.name].std, full[each.name].min, full[each.name].max
        )  # fmt: skip


def test_an_expression_of_many_chunks_needs_few_files(tmp_path: Path) -> None:
    """3,000 chunks in 300 files: the table pickles, and memory holds one block of one chunk."""
    weights = np.arange(3000 * 4, dtype=np.float32).reshape(3000, 4)
    source = scattered(tmp_path, weights, files=300)
    row = source.row("w")
    assert isinstance(row, Assembled)
    assert len(row.operands) == 3000
    np.testing.assert_array_equal(source.numpy("w"), weights)
    assert row.footprint < 64


def scattered(folder: Path, weights: Array, files: int) -> Source:
    """A checkpoint with a chunk for each row of a matrix, written without torch's process groups."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks, places = [], {}
    handles: dict[str, Any] = {f"__{n}_0.distcp": io.BytesIO() for n in range(files)}
    for number, row in enumerate(weights):
        name = f"__{number % files}_0.distcp"
        begin = handles[name].tell()
        torch.save(torch.from_numpy(row[None].copy()), part := io.BytesIO())
        handles[name].write(part.getvalue())
        offsets = torch.Size([number, 0])
        chunks.append(ChunkStorageMetadata(offsets, torch.Size([1, weights.shape[1]])))
        places[MetadataIndex("w", offsets, number)] = _StorageInfo(name, begin, handles[name].tell() - begin)
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(weights.shape), chunks)
    folder.joinpath(".metadata").write_bytes(pickle.dumps(Metadata({"w": tensor}, None, places)))
    for name, handle in handles.items():
        folder.joinpath(name).write_bytes(handle.getvalue())
    return tp.of(folder).source


def test_compressed_chunks_are_listed_and_refused(tmp_path: Path) -> None:
    """What an extension of the writer did to the bytes is named; the table needs none of them."""
    dcp.save({"w": torch.ones(3), "step": 1}, checkpoint_id=tmp_path, no_dist=True)
    path = tmp_path / ".metadata"
    described = pickle.loads(path.read_bytes())
    for place in described.storage_data.values():
        place.transform_descriptors = ["stream.zstd/1"]
    path.write_bytes(pickle.dumps(described))
    params = tp.of(tmp_path)
    assert params.infos["w"].shape == (3,)
    assert "written through stream.zstd/1" in params.metadata["step"]
    with pytest.raises(NotReadable) as caught:
        params.numpy("w")
    assert str(caught.value) == (
        f"{tmp_path}: w: Its bytes were written through stream.zstd/1, which is not supported. "
        "Save the checkpoint without extensions, or read it with torch.distributed.checkpoint."
    )
    assert [each.name for each in tp.stats(params).unread] == ["w"]


def test_verify_looks_at_every_part(training: Path, tmp_path: Path) -> None:
    """A part that is not what `.metadata` says fails; what is selected is read where it lies."""
    found = tp.verify(training / "dcp-4", selector="model.bias")
    assert found.ok
    said = {check.what: check.detail for check in found.checks}
    assert said["reading"] == "20 B read"
    assert said["checksums"].startswith("distributed checkpoint files have checksums that are not compared; only")
    folder = shutil.copytree(training / "dcp-4", tmp_path / "changed")
    described = pickle.loads((folder / ".metadata").read_bytes())
    described.state_dict_metadata["model.bias"].properties.dtype = torch.int32
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    found = tp.verify(folder)
    assert not found.ok
    assert "is float32 [2] in its file, but int32 [2] in .metadata" in str(found)
