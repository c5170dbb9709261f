"""Rebuilding an index."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from torchparams.errors import FileFormatError, PlanError, SourceError

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {name: np.full(4, i, np.float32) for i, name in enumerate("abc")}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    tp.convert(WEIGHTS, folder, max_shard_size=16).run()
    return folder


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def test_one_that_is_right_is_left_alone(shards: Path) -> None:
    before = index_of(shards).stat()
    repair = tp.repair_index(shards)
    assert (repair.changes, repair.shards, repair.tensors, repair.total_size) == ((), 3, 3, 48)
    assert index_of(shards).stat().st_mtime_ns == before.st_mtime_ns
    assert str(repair) == f"{index_of(shards)}: 3 tensors in 3 shards, 48 B\nthe index is correct"


def without(name: str) -> Any:
    def change(index: dict[str, Any]) -> None:
        del index["weight_map"][name]

    return change


def moved(index: dict[str, Any]) -> None:
    index["weight_map"]["a"] = "model-00002-of-00003.safetensors"


def invented(index: dict[str, Any]) -> None:
    index["weight_map"]["z"] = "model-00002-of-00003.safetensors"


def wrong_size(index: dict[str, Any]) -> None:
    index["metadata"]["total_size"] = 7


def no_map(index: dict[str, Any]) -> None:
    del index["weight_map"]


def no_metadata(index: dict[str, Any]) -> None:
    index["metadata"] = [1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("b"), "1 tensor added: b"),
        (moved, "1 tensor moved to the shard that holds them: a"),
        (invented, "1 tensor removed, as no shard holds them: z"),
        (wrong_size, "total_size: 48; it was 7"),
        (no_map, "the index had no weight_map"),
        (no_metadata, "total_size: 48; it was missing"),
    ],
)
def test_what_comes_right(change: Any, said: str, shards: Path) -> None:
    before = index_of(shards).read_bytes()
    index = json.loads(before)
    index["metadata"]["note"] = "kept"
    change(index)
    index_of(shards).write_text(json.dumps(index))
    assert tp.repair_index(shards, dry_run=True).changes == (said,)
    assert index_of(shards).read_text() == json.dumps(index)
    repair = tp.repair_index(shards)
    assert repair.changes == (said,)
    assert repair.to_json()["changes"] == [said]
    assert tp.of(shards).names == list(WEIGHTS)
    made = json.loads(index_of(shards).read_bytes())
    assert made["metadata"] == {"total_size": 48} | ({"note": "kept"} if change is not no_metadata else {})
    assert made["weight_map"] == json.loads(before)["weight_map"]


@pytest.mark.parametrize(
    ("contents", "said"),
    [(None, "there was no index"), (b"{", "the index was not JSON"), (b"[]", "the index had no weight_map")],
)
def test_one_that_is_nothing(contents: bytes | None, said: str, shards: Path) -> None:
    index_of(shards).unlink()
    if contents is not None:
        index_of(shards).write_bytes(contents)
    assert tp.repair_index(shards).changes == (said,)
    assert tp.of(shards).names == list(WEIGHTS)


def test_shards_of_torch_files(tmp_path: Path) -> None:
    w = torch.ones(2)
    torch.save({"a": w, "tied": w}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": w}, tmp_path / "pytorch_model-00002-of-00002.bin")
    repair = tp.repair_index(tmp_path)
    assert repair.path == str(tmp_path / "pytorch_model.bin.index.json")
    assert (repair.tensors, repair.total_size) == (3, 16)
    assert tp.of(tmp_path).names == ["a", "b"]


def test_what_cannot_be_repaired(shards: Path, tmp_path: Path) -> None:
    def message(error: type[Exception], path: Path) -> str:
        with pytest.raises(error) as caught:
            tp.repair_index(path)
        return str(caught.value)

    assert message(PlanError, tmp_path / "no") == (
        f"{tmp_path}/no: Repairing an index needs the directory of the shards. Pass the directory."
    )
    assert message(SourceError, tmp_path) == (
        f"{tmp_path}: There are no numbered shards. Shard names look like model-00001-of-00002.safetensors."
    )
    (shards / "model-00002-of-00003.safetensors").rename(shards / "kept")
    assert message(FileFormatError, shards) == (
        f"{shards}: 1 of 3 shards are missing: model-00002-of-00003.safetensors. "
        "Copy or download the missing shards again."
    )
    (shards / "model-00002-of-00003.safetensors").write_bytes(
        (shards / "model-00001-of-00003.safetensors").read_bytes()
    )
    assert message(FileFormatError, shards) == (
        f"{shards}: 'a' is in both 'model-00001-of-00003.safetensors' and 'model-00002-of-00003.safetensors'"
    )
    (shards / "model-00001-of-00007.safetensors").write_bytes(b"")
    index_of(shards).unlink()
    assert message(SourceError, shards) == (
        f"{shards}: There are shards of 2 checkpoints. model-*-of-00003.safetensors, model-*-of-00007.safetensors. "
        "Move all but one to another directory."
    )


def test_a_single_file_that_is_left_over_is_named(shards: Path) -> None:
    tp.convert({"old": np.zeros(1)}, str(shards / "model.safetensors")).run()
    repair = tp.repair_index(shards)
    assert repair.beside == ("model.safetensors",)
    assert "some loaders prefer model.safetensors to the shards" in str(repair)
    assert repair.to_json()["beside"] == ["model.safetensors"]


def test_the_index_of_a_single_file_comes_right(tmp_path: Path) -> None:
    tp.convert({"a": np.zeros(2), "b": np.zeros(2)}, str(tmp_path / "model.safetensors")).run()
    for file in ("model.safetensors", "model-00001-of-00002.safetensors"):
        index = {"weight_map": {"a": file, "gone": file}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FileFormatError) as caught:
            tp.of(tmp_path)
        assert f"torchparams convert --repair-index {tmp_path} rebuilds it from the files" in str(caught.value)
        assert tp.repair_index(tmp_path).tensors == 2
        assert tp.of(tmp_path).names == ["a", "b"]


def test_of_two_sets_the_index_says_which(shards: Path) -> None:
    tp.convert({"z": np.zeros(1)}, str(shards / "model-00001-of-00001.safetensors")).run()
    repair = tp.repair_index(shards)
    assert not repair.changes and "model-00001-of-00001.safetensors" in repair.beside


def test_what_a_stale_index_proposes_works(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][next(iter(index["weight_map"]))]
    path.write_text(json.dumps(index))
    with pytest.raises(FileFormatError) as caught:
        tp.of(shards)
    words = shlex.split(str(caught.value).partition("torchparams ")[2].partition(" rebuilds")[0])
    assert command(capsys, *words).status == 0
    assert len(tp.of(shards)) == len(index["weight_map"]) + 1
