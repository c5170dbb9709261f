"""State dicts that each rank saved in its own file, as one table."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

import torchparams as tp
from torchparams.dtypes import DType
from torchparams.errors import FileFormatError, SourceError, TorchParamsError, UnknownName
from torchparams.sources.torchfile.nodes import Global, Reduced, TensorRef, unpickled
from torchparams.sources.training._placements import Unplaced, _joined, _mesh, _place

if TYPE_CHECKING:
    from pathlib import Path

    from torchparams.sources.training._placements import Runs


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["sharded", "dtensor"])
def test_it_is_the_full_state_dict(training: Path, kind: str, world: int) -> None:
    ours, full = tp.of(training / f"{kind}-{world}"), training / "net.pt"
    assert tp.digest(ours).digest == tp.digest(full).digest
    assert tp.diff(full, ours).same
    whole = ours.metadata.get("(whole)")
    if world > 1:
        assert whole == "3 tensors that every rank holds whole; those of the first rank are listed"


def test_a_mesh_of_two_dimensions(training: Path) -> None:
    ours, full = tp.of(f"{training}/grid-4#model"), tp.of(training / "full.pt")
    for name in ours.names:
        np.testing.assert_array_equal(ours.numpy(name), full.numpy("layers.0.weight" if name == "strided" else name))
    assert len(ours.names) == 6


def test_parts(training: Path) -> None:
    text = str(tp.ls(training / "grid-4"))
    assert f"{training}/grid-4#model (6 tensors), {training}/grid-4#optim\n" in text
    assert "  epoch = 3\n" in text
    assert tp.of(f"{training}/grid-4#optim").names == ["state.bias"]
    assert tp.of(f"{training}/grid-4#optim.state").names == ["bias"]
    assert "layers.0.weight" in tp.of(f"{training}/sharded-2#model").names
    with pytest.raises(UnknownName, match="No tensor is below 'head2'"):
        tp.of(f"{training}/sharded-2#head2")


def test_a_source_is_copied_to_other_processes(training: Path) -> None:
    params = tp.of(training / "sharded-2")
    rows = [params.source.row(name) for name in params.names]
    again = pickle.loads(pickle.dumps(rows))
    assert [row.summary() for row in again] == [row.summary() for row in rows]
    assert tp.digest(pickle.loads(pickle.dumps(params.source))).digest == tp.digest(params).digest


def test_every_verb(training: Path, tmp_path: Path) -> None:
    ours = training / "dtensor-4"
    tp.convert(ours, tmp_path / "one.safetensors").run()
    assert tp.diff(training / "net.pt", tmp_path / "one.safetensors").same
    full = tp.stats(training / "net.pt")
    assert all(each.std == full[each.name].std for each in tp.stats(ours) if each.numel > 1)
    assert tp.verify(ours).ok


# --- placements ------------------------------------------------------------------------------


def placed(size: int, *cuts: tuple[object, int, int]) -> Runs:
    """The indexes that placements leave: each with the count of ranks and a coordinate."""
    runs: list[Runs] = [[(0, size)]]
    for placement, count, at in cuts:
        node = unpickled(pickle.dumps(placement, 2), "", 0).root
        _place(runs, node, count, at)
    return runs[0]


def indexes(size: int, count: int, at: int, factor: int) -> list[int]:
    """What `_StridedShard` does, with torch's own chunks."""
    found = []
    for piece in torch.arange(size).chunk(factor):
        parts = piece.chunk(count)
        found += parts[at].tolist() if at < len(parts) else []
    return found


@pytest.mark.parametrize("size", [0, 1, 5, 8, 13])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_strides_are_those_of_torch(size: int, count: int, factor: int) -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    for at in range(count):
        runs = placed(size, (_StridedShard(0, split_factor=factor), count, at))
        assert [index for start, stop in runs for index in range(start, stop)] == indexes(size, count, at, factor)
        chunks = torch.arange(size).chunk(count)
        runs = placed(size, (Shard(0), count, at), (Replicate(), 2, 1))
        assert [index for start, stop in runs for index in range(start, stop)] == (
            chunks[at].tolist() if at < len(chunks) else []
        )


def test_a_sum_that_is_not_made_yet_is_refused() -> None:
    with pytest.raises(Unplaced, match=r"has the placement .*Partial"):
        placed(8, (Partial(), 2, 0))
    with pytest.raises(Unplaced, match="which is not supported"):
        placed(8, (Shard(3), 2, 0))
    assert _joined([(0, 2), (2, 5), (7, 8)]) == [(0, 5), (7, 8)]
    assert type(unpickled(pickle.dumps(Shard(0), 2), "", 0).root) is Reduced


# --- what is wrong ---------------------------------------------------------------------------


@pytest.fixture
def folder(training: Path, tmp_path: Path) -> Path:
    """The files of four ranks, to be damaged."""
    return shutil.copytree(training / "sharded-4", tmp_path / "ranks")


def message(folder: Path, error: type[TorchParamsError] = FileFormatError) -> str:
    """The one line that the directory is refused with."""
    with pytest.raises(error) as caught:
        tp.of(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{folder}/", "").replace(f"{folder}: ", "")


def file_of(rank: int, world: int = 4) -> str:
    return f"model_world_size_{world}_rank_{rank}.pt"


def test_a_missing_rank(folder: Path) -> None:
    (folder / file_of(2)).unlink()
    assert message(folder) == (
        "1 of 4 ranks are missing: rank 2. There are 3 files model_world_size_4_rank_*. "
        "Copy the files of all ranks into the directory."
    )


def test_two_world_sizes(folder: Path, training: Path) -> None:
    shutil.copy(training / "sharded-2" / file_of(0, 2), folder)
    assert message(folder).startswith("There are files of model with different world sizes: 1 of 2, 4 of 4. Move")


def test_a_rank_beyond_the_world(folder: Path) -> None:
    shutil.copy(folder / file_of(3), folder / file_of(4))
    assert message(folder) == "There are 5 files for 4 ranks"


def test_a_world_size_that_does_not_match(tmp_path: Path, training: Path) -> None:
    for kind in ("sharded", "dtensor"):
        folder = tmp_path / kind
        folder.mkdir()
        for rank in range(2):
            shutil.copy(training / f"{kind}-4" / file_of(rank), folder / file_of(rank, 2))
        assert message(folder) == (
            f"{file_of(0, 2)}: 'layers.0.weight' was sharded over 4 ranks, but there are files for 2"
        )


def test_files_in_each_others_place(folder: Path) -> None:
    """A rank that stands in for another leaves a hole; which files were exchanged does not matter."""
    shutil.copy(folder / file_of(1), folder / file_of(2))
    assert message(folder) == "'layers.0.weight' lacks the elements [4:6, 0:7]"


def test_dtensors_of_another_rank(tmp_path: Path, training: Path) -> None:
    folder = shutil.copytree(training / "dtensor-4", tmp_path / "dtensor")
    shutil.copy(folder / file_of(0), folder / file_of(3))
    assert message(folder).endswith("has a local part of shape [2, 7], where its placements give [1, 7]")


def test_parts_that_overlap(folder: Path) -> None:
    path = folder / file_of(1)
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w") as new:  # of its first tensor, the shard begins at row 2
        for name, data in members:
            new.writestr(name, data.replace(b"K\x02K\x00e", b"K\x01K\x00e", 1) if name.endswith(".pkl") else data)
    assert message(folder) == "'layers.0.weight' has two parts with the elements [1:2, 0:7]"


def test_ranks_that_disagree(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.zeros(5 + rank), "n": rank}, tmp_path / file_of(rank, 2))
    assert message(tmp_path) == "Rank 1 holds 'w' as float32 [6], but rank 0 as float32 [5]"


def test_a_tensor_of_one_rank(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({f"w{rank}": torch.full((2,), float(rank)), "n": rank}, tmp_path / file_of(rank, 2))
    params = tp.of(tmp_path)
    assert {name: params.numpy(name).tolist() for name in params.names} == {"w0": [0, 0], "w1": [1, 1]}
    assert params.metadata["n"] == 0


def test_a_rank_that_holds_something_else(folder: Path) -> None:
    torch.save([torch.zeros(2)], folder / file_of(1))
    assert message(folder) == f"{file_of(1)}: The file of a rank must contain a state dict, not a list of 1 item"


def test_a_file_that_is_cut(folder: Path) -> None:
    path = folder / file_of(1)
    path.write_bytes(path.read_bytes()[:-100])
    assert "The zip is cut off" in message(folder)


def test_sets_without_a_model(folder: Path) -> None:
    for rank in range(4):
        (folder / file_of(rank)).rename(folder / f"actor_world_size_4_rank_{rank}.pt")
        shutil.copy(folder / f"actor_world_size_4_rank_{rank}.pt", folder / f"critic_world_size_4_rank_{rank}.pt")
    assert message(folder, SourceError).startswith("The ranks wrote 2 kinds of files. Actor, critic. Choose one: ")
    assert "layers.0.weight" in tp.of(f"{folder}#critic").names


# --- meshes of other versions ----------------------------------------------------------------


def mesh_of(**state: object) -> Reduced:
    """A DeviceMesh with these attributes."""
    made = Reduced(Global("torch.distributed.device_mesh", "DeviceMesh"), ())
    made.state = state
    return made


def layout_of(**state: object) -> Reduced:
    made = Reduced(Global("torch.distributed._mesh_layout", "_MeshLayout"), ())
    made.state = state
    return made


ROOT = TensorRef(None, DType.of("int32"), 0, (2, 4), (4, 1))


@pytest.mark.parametrize(
    ("mesh", "shape", "coordinates"),
    [
        (mesh_of(mesh=ROOT, _flatten_mesh_list=tuple(range(8))), (2, 4), (1, 1)),
        (mesh_of(_layout=layout_of(shape=(2, 4), stride=(4, 1)), _flatten_rank_map=tuple(range(8))), (2, 4), (1, 1)),
        (mesh_of(_layout=layout_of(shape=(4,), stride=(1,)), _flatten_rank_map=tuple(range(8))), (4,), (1,)),
        (mesh_of(_layout=layout_of(shape=(2,), stride=(4,)), _flatten_rank_map=tuple(range(8))), (2,), (1,)),
        (mesh_of(_layout=layout_of(shape=((2, 4),), stride=((4, 1),)), _flatten_rank_map=tuple(range(8))), (8,), (5,)),
    ],
)
def test_the_coordinates_of_rank_5(mesh: Reduced, shape: tuple[int, ...], coordinates: tuple[int, ...]) -> None:
    """As torch 2.6, 2.9 and later versions pickle a mesh: the root's, and those of one or all of its dimensions."""
    assert _mesh(mesh, 5) == (shape, coordinates, 8)


@pytest.mark.parametrize(
    "mesh",
    [
        mesh_of(),
        mesh_of(mesh=ROOT),
        mesh_of(mesh=ROOT, _flatten_mesh_list=(0, 1)),
        mesh_of(_layout=layout_of(shape=(2, 4), stride=(4,)), _flatten_rank_map=tuple(range(8))),
        mesh_of(_layout=layout_of(shape=3, stride=4), _flatten_rank_map=tuple(range(8))),
        mesh_of(_layout=layout_of(shape=(2, 4), stride=(4, 1)), _flatten_rank_map=(0, 1)),
        mesh_of(_layout=3, _flatten_rank_map=tuple(range(8))),
    ],
)
def test_a_mesh_of_no_known_form_is_refused(mesh: Reduced) -> None:
    with pytest.raises(Unplaced, match="mesh"):
        _mesh(mesh, 5)
