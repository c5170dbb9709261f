"""Damaged and malicious distributed checkpoints: a one-line error, and no code runs."""

from __future__ import annotations

import pickle
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import torchparams as tp
from torchparams.errors import TorchParamsError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = "model.layers.0.weight"  # [13, 7] float32, in two chunks of rows: 7 and 6


@pytest.fixture
def folder(training: Path, tmp_path: Path) -> Path:
    """A checkpoint of two ranks, to be damaged."""
    return shutil.copytree(training / "dcp-2", tmp_path / "dcp")


def edited(folder: Path, change: Callable[[Any], None]) -> None:
    """Change what `.metadata` says."""
    path = folder / ".metadata"
    described = pickle.loads(path.read_bytes())
    change(described)
    path.write_bytes(pickle.dumps(described))


def message(folder: Path, use: Callable[[Path], object] = tp.of) -> str:
    """The one line that a checkpoint is refused with, without its path."""
    with pytest.raises(TorchParamsError) as caught:
        use(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text.replace(f"{folder}/", "").replace(f"{folder}: ", "")


def place_of(described: Any, name: str = NAME, number: int = 0) -> Any:
    """Where a chunk lies."""
    found = [value for key, value in described.storage_data.items() if key.fqn == name]
    return found[number]


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_pickle_that_is_no_metadata_runs_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    assert message(folder).startswith(".metadata: It holds io.open(")
    assert not (tmp_path / "harmed").exists()


def test_code_beside_the_tensors_is_named_and_not_run(folder: Path, tmp_path: Path) -> None:
    edited(folder, lambda described: setattr(described, "storage_meta", Harm(tmp_path / "harmed")))
    assert "the pickle calls io.open: do not unpickle" in str(tp.ls(folder))
    assert not tp.verify(folder).ok
    assert not (tmp_path / "harmed").exists()


def set_place(**changes: Any) -> Callable[[Any], None]:
    def change(described: Any) -> None:
        for key, value in changes.items():
            setattr(place_of(described), key, value)

    return change


def tensor(described: Any) -> Any:
    return described.state_dict_metadata[NAME]


def other_dtype(described: Any) -> None:
    tensor(described).properties.dtype = torch.float16


def box(number: int, offsets: list[int], sizes: list[int]) -> Callable[[Any], None]:
    def change(described: Any) -> None:
        tensor(described).chunks[number] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    return change


def lose_place(described: Any) -> None:
    key = next(key for key in described.storage_data if key.fqn == NAME and key.offset == torch.Size([7, 0]))
    del described.storage_data[key]


def lose_chunk(described: Any) -> None:
    tensor(described).chunks.pop()


def share(described: Any) -> None:
    first = place_of(described)
    other = place_of(described, "model.layers.1.weight")
    other.relative_path, other.offset, other.length = first.relative_path, first.offset, first.length


def nameless(described: Any) -> None:
    described.storage_data[MetadataIndex("ghost", [0])] = _StorageInfo("__0_0.distcp", 0, 10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_place(offset=10**9), f".metadata: '{NAME}' lies in bytes 1000000000 to"),
        (set_place(offset=-1), f".metadata: '{NAME}' lies at -1 and"),
        (set_place(length=2**70), f".metadata: '{NAME}' lies at"),
        (set_place(length=10), f".metadata: '{NAME}'[0:7, 0:7] takes 196 bytes as float32, but has 10 in __0_0.distcp"),
        (set_place(relative_path="../__0_0.distcp"), f".metadata: It puts '{NAME}' into '../__0_0.distcp', which"),
        (set_place(relative_path="/etc/passwd"), f".metadata: It puts '{NAME}' into '/etc/passwd', which is not"),
        (set_place(relative_path="a/../../b"), f".metadata: It puts '{NAME}' into 'a/../../b', which is not"),
        (set_place(relative_path="C:\\b"), f".metadata: It puts '{NAME}' into 'C:\\\\b', which is not"),
        (set_place(relative_path=""), f".metadata: It puts '{NAME}' into '', which is not"),
        (set_place(relative_path=3), f".metadata: '{NAME}' lies at"),
        (
            set_place(relative_path="__7_0.distcp"),
            f"__7_0.distcp, which holds '{NAME}', cannot be opened: No such file or directory. 2 .distcp files are "
            "there. The rank that writes it may not have finished; wait for it, or copy the whole directory.",
        ),
        (set_place(transform_descriptors=[1]), f".metadata: '{NAME}' was written through a list of 1 item"),
        (lose_place, f".metadata: It does not have the location of '{NAME}'[7:13, 0:7]"),
        (lose_chunk, f".metadata: '{NAME}' lacks the elements [7:13, 0:7]"),
        (box(1, [6, 0], [7, 7]), f".metadata: '{NAME}' has two parts with the elements [6:7, 0:7]"),
        (box(1, [8, 0], [5, 7]), f".metadata: '{NAME}' lacks the elements [7:8, 0:7]"),
        (box(1, [7, 0], [7, 7]), f".metadata: '{NAME}' has the shape [13, 7], but a part [7:14, 0:7] outside of it"),
        (box(1, [7], [6]), f".metadata: '{NAME}' has 2 dimensions, but a part has 1 offsets and 1 sizes"),
        (share, ".metadata: '"),
        (nameless, ".metadata: It has the location of 'ghost', but does not describe it"),
    ],
)  # fmt: skip
def test_what_metadata_says_is_held_against_the_files(folder: Path, change: Callable[[Any], None], said: str) -> None:
    edited(folder, change)
    assert message(folder).startswith(said)


def test_two_parts_share_no_bytes(folder: Path) -> None:
    edited(folder, share)
    assert "overlaps" in message(folder)


def test_a_chunk_is_what_metadata_says(folder: Path) -> None:
    """Listing believes a dtype and a shape that fit in; reading does not."""
    edited(folder, other_dtype)
    assert tp.of(folder).infos[NAME].dtype == "float16"
    assert message(folder, tp.stats).endswith(
        f"'{NAME}[0:7, 0:7]' is float32 [7, 7] in its file, but float16 [7, 7] in .metadata"
    )


def test_a_chunk_of_another_shape(folder: Path) -> None:
    def change(described: Any) -> None:
        described.state_dict_metadata[NAME].size = torch.Size([13, 6])
        for number, (at, size) in enumerate([(0, 7), (7, 6)]):
            box(number, [at, 0], [size, 6])(described)

    edited(folder, change)
    assert "is float32 [7, 7] in its file, but float32 [7, 6] in .metadata" in message(folder, tp.digest)


def test_a_place_in_the_middle_of_another_part(folder: Path) -> None:
    def change(described: Any) -> None:
        place = place_of(described)
        place.offset += 1
        place.length -= 1

    edited(folder, change)
    assert "it starts with b'K\\x03\\x04" in message(folder, tp.stats)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_metadata_that_is_cut(folder: Path, cut: int) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:cut])
    assert "cut off" in message(folder)


def test_bytes_after_the_pickle(folder: Path) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes() + b"ab")
    assert ".metadata: 2 bytes after the end of the pickle, at byte" in message(folder)


def test_a_file_that_is_cut(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-50])
    assert f"of __1_0.distcp, which has {path.stat().st_size:,}" in message(folder)


def test_a_file_that_changes_after_the_listing(folder: Path) -> None:
    params = tp.of(folder)
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes() + b"more")
    assert "changed after it was listed" in message(folder, lambda _: tp.stats(params))


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        ({"state_dict_metadata": {}}, "It holds a dict of 1 item instead of a Metadata"),
        (7, "It holds 7 instead of a Metadata"),
    ],
)
def test_other_pickles(folder: Path, pickled: object, said: str) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(pickled))
    assert message(folder).startswith(f".metadata: {said}")


@pytest.mark.parametrize("field", ["state_dict_metadata", "storage_data"])
@pytest.mark.parametrize("value", [None, 3, [1], {3: 4}, {"w": 5}])
def test_fields_of_other_kinds(folder: Path, field: str, value: object) -> None:
    edited(folder, lambda described: setattr(described, field, value))
    assert message(folder).startswith(".metadata: ")


def set_planner(described: Any, value: Any) -> None:
    described.planner_data = value


def test_a_planner_of_another_kind_costs_only_the_parts(folder: Path) -> None:
    values: list[Any] = [None, 3, {NAME: 3}, {NAME: ("model", 10**5000)}, {NAME: (("a",), [])}]
    for value in values:
        edited(folder, partial(set_planner, value=value))
        assert len(tp.of(folder).infos) == 16
        assert tp.of(folder).source.mappings == ()


def test_the_paths_of_an_optimizer_state(folder: Path) -> None:
    def load(folder: Path, inner: str = "") -> object:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return tp.load_optimizer_state(model, optimizer, f"{folder}{inner}")

    collide = {NAME: ("a",), "model.bias": ("a", "b")}
    values: list[tuple[Any, str]] = [
        (None, "The checkpoint holds no optimizer state"),
        ({NAME: ("a",), "model.bias": ("a",)}, "Two paths of .metadata collide at a"),
        (collide, "Two paths of .metadata collide at a.b"),
        (dict(reversed(collide.items())), "Two paths of .metadata collide at a"),
        ({NAME: tuple("a" * 1000)}, "The checkpoint holds no optimizer state"),
        ({NAME: ("state",), "step": ("param_groups",)}, "The optimizer state is malformed"),
        ({NAME: ("state",), "step": ("param_groups", 0, "params")}, "The optimizer state is malformed"),
        ({NAME: ("state", "w"), "step": ("param_groups", 0, "params", 0)}, "by position and has no names"),
        ({NAME: ("optimizers",), "step": ("x",)}, "The checkpoint holds no optimizer state"),
        ({NAME: ("param_groups.x.y",), "step": ("state.x.y.z",)}, "0 tensors fit, and nothing was changed"),
    ]
    for value, said in values:
        edited(folder, partial(set_planner, value=value))
        assert said in message(folder, load), value
