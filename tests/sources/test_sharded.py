"""Checkpoints in several files."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from torchparams import limits
from torchparams.dtypes import ALL
from torchparams.errors import (
    FileFormatError,
    LimitExceeded,
    SizeMismatch,
    SourceError,
    TorchParamsError,
    TruncatedFile,
    UnknownName,
)
from torchparams.sources.sharded import ShardedSource, open_directory, open_index
from torchparams.testing import (
    SAFETENSORS_DTYPES,
    Array,
    SourceTests,
    assert_identical,
    safetensors_bytes,
    sample,
    to_torch,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torchparams.sources.base import Source

INDEX = "model.safetensors.index.json"


class TestIndexed(SourceTests):
    """Shards that take turns, so that the index's order is no shard's."""

    dtypes = SAFETENSORS_DTYPES
    torch_dtypes = tuple(str(dtype) for dtype in ALL if dtype.code and dtype.torch_name)
    spans = metadata = True

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> ShardedSource:
        weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            write(folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
        write_index(folder, weight_map, metadata=dict(metadata or {}))
        return open_index(str(folder / INDEX))


class TestNumbered(SourceTests):
    """Shards without an index, found by their directory."""

    dtypes = SAFETENSORS_DTYPES
    torch_dtypes = TestIndexed.torch_dtypes
    spans = True

    def make(self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Source:
        half = len(tensors) // 2
        items = list(tensors.items())
        write(folder / "model-00001-of-00002.safetensors", dict(items[:half]))
        write(folder / "model-00002-of-00002.safetensors", dict(items[half:]))
        return open_directory(str(folder))


class TestIndexedTorch(SourceTests):
    """Shards in torch's own format, with its ties."""

    dtypes = tuple(str(dtype) for dtype in ALL if dtype.numpy_name and dtype.torch_name)
    spans = ties = strides = True
    requires_grad = None

    def make(self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Source:
        made = {id(array): to_torch(array) for array in tensors.values()}
        # Tied tensors share a shard, as those who write shards take care that they do.
        shard = {key: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, key in enumerate(made)}
        weight_map = {name: shard[id(array)] for name, array in tensors.items()}
        for file in set(weight_map.values()):
            torch.save({n: made[id(a)] for n, a in tensors.items() if weight_map[n] == file}, folder / file)
        write_index(folder, weight_map, name="pytorch_model.bin.index.json")
        return tp.of(folder).source


def write(path: Path, tensors: Mapping[str, Array]) -> None:
    path.write_bytes(safetensors_bytes(tensors, {"format": "pt"}))


def write_index(folder: Path, weight_map: Any, name: str = INDEX, **more: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"weight_map": weight_map, **more}))
    return path


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    write(tmp_path / A, {"z": sample("float32", (2,), 1), "a": sample("float32", (3,), 2)})
    write(tmp_path / B, {"m": sample("int8", (4,), 3)})
    write_index(tmp_path, {"z": A, "m": B, "a": A}, metadata={"total_size": 24})
    return tmp_path


def refused(path: Path, error: type[TorchParamsError] = FileFormatError) -> str:
    """The message that the target is refused with, its own path left out."""
    with pytest.raises(TorchParamsError) as caught:
        tp.of(path)
    assert type(caught.value) is error
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


# --- one table -------------------------------------------------------------------------------


def test_a_directory_is_its_index(folder: Path) -> None:
    params = tp.of(folder)
    assert params.names == ["z", "m", "a"]
    assert params.source.label == str(folder)
    assert params.source.format == "sharded safetensors"
    assert params.source.files == tuple(str(folder / name) for name in (INDEX, A, B))
    assert dict(params.metadata) == {"total_size": 24}
    assert [
        (info.location.file, info.location.stop - info.location.start)
        for info in params.infos.values()
        if info.location
    ] == [
        (str(folder / A), 8),
        (str(folder / B), 4),
        (str(folder / A), 12),
    ]
    assert_identical(params.numpy("m"), sample("int8", (4,), 3))
    assert tp.of(folder / INDEX).names == params.names


def test_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for target in (".", INDEX, f"./{INDEX}"):
        params = tp.of(target)
        assert params.source.label == target
        assert params.numpy("m").shape == (4,)


def test_links_out_of_the_directory_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blobs = tmp_path_factory.mktemp("blobs")
    for i, name in enumerate((A, B, INDEX)):
        (folder / name).rename(blobs / f"{i}")
        (folder / name).symlink_to(blobs / f"{i}")
    assert tp.of(folder).names == ["z", "m", "a"]


def test_variants_have_indexes_too(folder: Path) -> None:
    (folder / INDEX).rename(folder / "model.safetensors.index.fp16.json")
    assert tp.of(folder).names == ["z", "m", "a"]


def test_unknown_names(folder: Path) -> None:
    with pytest.raises(UnknownName, match=re.escape(f"{folder}: No parameter is named 'zz'")):
        tp.of(folder).source.numpy("zz")


def test_storages_of_two_shards_are_two(tmp_path: Path) -> None:
    files = {"a": "x.bin", "b": "y.bin"}
    for name, file in files.items():
        base = torch.zeros(4)
        torch.save({name: base[:2], f"{name}2": base[2:]}, tmp_path / file)
    write_index(tmp_path, {"a": "x.bin", "a2": "x.bin", "b": "y.bin", "b2": "y.bin"}, "w.index.json")
    keys = {name: info.storage.key for name, info in tp.of(tmp_path).infos.items() if info.storage}
    assert keys["a"] == keys["a2"] != keys["b"] == keys["b2"]


def test_a_tied_tensor_is_listed_once(tmp_path: Path) -> None:
    weight = torch.ones(2, 3)
    torch.save({"head": weight, "embed": weight}, tmp_path / "x.bin")
    torch.save({"norm": torch.ones(3)}, tmp_path / "y.bin")
    write_index(tmp_path, {"embed": "x.bin", "norm": "y.bin", "head": "x.bin"}, "w.index.json")
    params = tp.of(tmp_path)
    assert params.names == ["head", "norm"]
    assert params.info("embed").aliases == ("embed",)


def test_shards_of_different_formats(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {"a": sample("int8", (2,))})
    torch.save({"b": torch.ones(3)}, tmp_path / "y.bin")
    write_index(tmp_path, {"b": "y.bin", "a": "x.safetensors"}, "w.index.json")
    assert tp.of(tmp_path).names == ["b", "a"]
    assert tp.of(tmp_path).source.format == "sharded"


# --- a directory -----------------------------------------------------------------------------


def test_the_only_file(tmp_path: Path) -> None:
    write(tmp_path / "weights.safetensors", {"a": sample("int8", (2,))})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "._weights.safetensors").write_text("left by a file manager")
    assert tp.of(tmp_path).names == ["a"]
    assert tp.of(tmp_path).source.format == "safetensors"


def test_the_only_shard_of_one(tmp_path: Path) -> None:
    write(tmp_path / "model-00001-of-00001.safetensors", {"a": sample("int8", (2,))})
    assert tp.of(tmp_path).names == ["a"]


def test_a_mapping_inside_the_only_file(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "step": 3}, tmp_path / "last.ckpt")
    assert tp.of(f"{tmp_path}#model").names == ["w"]


def test_nothing_there(tmp_path: Path) -> None:
    hint = "A checkpoint is an .index.json with its shards, or a file that ends in .safetensors .pt .pth .bin .ckpt."
    assert refused(tmp_path, SourceError) == f"There is no checkpoint in this directory. It is empty. {hint}"
    (tmp_path / "unet").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path, SourceError) == (
        f"There is no checkpoint in this directory. There are config.json, unet/. {hint}"
    )


def test_several_are_not_chosen_from(folder: Path) -> None:
    write_index(folder, {}, "pytorch_model.bin.index.json")
    assert refused(folder, SourceError) == (
        f"2 checkpoints are in this directory: {INDEX}, pytorch_model.bin.index.json. Pass the path of one index."
    )
    for name in (INDEX, "pytorch_model.bin.index.json"):
        (folder / name).unlink()
    assert tp.of(folder).names == ["z", "a", "m"]
    torch.save({}, folder / "optimizer.pt")
    assert tp.of(folder).names == ["z", "a", "m"]
    torch.save({}, folder / "other.pt")
    assert refused(folder, SourceError) == (
        "2 checkpoints are in this directory: model-*-of-00002.safetensors, other.pt. Choose one."
    )


def test_an_incomplete_set(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / A).unlink()
    assert refused(folder) == f"1 of 2 shards are missing: '{A}'"
    (folder / B).rename(folder / "model-00002-of-99999.safetensors")
    assert refused(folder).startswith("99998 of 99999 shards are missing: 'model-00001-of-99999.safetensors', ")
    assert refused(folder).endswith(" and 99992 more")


def test_a_set_with_too_many(folder: Path) -> None:
    (folder / INDEX).unlink()
    write(folder / "model-00003-of-00002.safetensors", {})
    assert refused(folder).startswith(f"There are more than 2 shards: '{A}', '{B}', 'model-00003")


def test_a_set_with_a_tensor_twice(folder: Path) -> None:
    (folder / INDEX).unlink()
    write(folder / B, {"a": sample("int8", (2,))})
    assert refused(folder) == f"'a' is in '{A}' and in '{B}'"


def test_nothing_is_nested_in_shards(folder: Path) -> None:
    for target in (folder, folder / INDEX):
        with pytest.raises(SourceError, match=re.escape(f"{target}: Sharded checkpoints have no nested mappings")):
            tp.of(f"{target}#model")
    (folder / INDEX).unlink()
    with pytest.raises(SourceError, match="holds no nested mapping, so none at 'model'"):
        tp.of(f"{folder}#model")


# --- the index and its shards ----------------------------------------------------------------


def test_a_missing_shard(folder: Path) -> None:
    (folder / B).unlink()
    assert refused(folder / INDEX) == f"The index names 1 file that is not there: '{B}'"
    (folder / A).unlink()
    assert refused(folder / INDEX) == f"The index names 2 files that are not there: '{A}', '{B}'"


def test_a_link_that_leads_nowhere(folder: Path) -> None:
    (folder / B).unlink()
    (folder / B).symlink_to(folder / "gone")
    assert refused(folder / INDEX) == (f"The index names 1 file that is not there: '{B}'. '{B}' is a broken link.")


def repairs(folder: Path) -> str:
    return f"torchparams convert --repair-index {folder} rebuilds it from the files."


def test_a_missing_tensor(folder: Path) -> None:
    write_index(folder, {"z": A, "m": B, "a": A, "b": A})
    assert refused(folder / INDEX) == (
        f"The index puts 'b' into '{A}', which does not hold it. '{A}' holds 2 tensors. {repairs(folder)}"
    )
    write_index(folder, {"z": A, "m": A, "a": A, "b": B})
    assert refused(folder / INDEX) == (
        f"The index puts 'm' into '{A}', which does not hold it (2 tensors are so). It is in '{B}'. {repairs(folder)}"
    )


def test_a_tensor_that_is_not_listed(folder: Path) -> None:
    write_index(folder, {"z": A, "m": B})
    assert refused(folder / INDEX) == f"'{A}' holds 'a', which the index does not list. {repairs(folder)}"


def test_a_tensor_in_two_shards(folder: Path) -> None:
    write(folder / B, {"m": sample("int8", (4,)), "a": sample("int8", (4,))})
    assert refused(folder / INDEX) == f"The index puts 'a' into '{A}', and '{B}' holds it too"


def test_a_shard_that_is_not_named(folder: Path) -> None:
    write_index(folder, {"z": A, "a": A})
    assert refused(folder / INDEX) == (
        f"The index names no tensor in '{B}', which lies beside its shards. {repairs(folder)}"
    )


def test_a_damaged_shard(folder: Path) -> None:
    os.truncate(folder / B, 20)
    with pytest.raises(TruncatedFile, match=re.escape(f"{folder / B}: The file ends at byte 20, within the header")):
        tp.of(folder)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x.safetensors", "/etc/passwd", "sub/x.safetensors", "a\\b", "..\\x", "C:x", "a\0b", "./x"],
)
def test_a_path_outside_the_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x.safetensors", {"a": sample("int8", (2,))})
    inside = tmp_path / "inside"
    inside.mkdir()
    text = refused(write_index(inside, {"a": name}))
    assert text.startswith("The weight_map puts 'a' into '")
    assert text.endswith("', which is not the name of a file in the index's own directory")


def test_an_index_of_indexes(tmp_path: Path) -> None:
    path = write_index(tmp_path, {"a": INDEX})
    with pytest.raises(FileFormatError, match="Unknown checkpoint format"):
        tp.of(path)


def test_a_shard_that_is_a_directory_or_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "p")
    assert refused(write_index(tmp_path, {"a": "d", "b": "p"})) == (
        "The index names 2 files that are not there: 'd', 'p'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "byte 1: The index is not JSON: "),
        ("{}", "A JSON file without a weight_map is not the index of a checkpoint. It is an empty object."),
        (
            '{"model_type":"x","a":1}',
            "A JSON file without a weight_map is not the index of a checkpoint. Its keys are 'model_type', 'a'.",
        ),
        ('{"weight_map":[]}', "Its weight_map is an array, not an object"),
        ('{"weight_map":null}', "Its weight_map is null, not an object"),
        ('{"weight_map":{"a":1}}', "The weight_map gives 'a' the number 1, not a file name"),
        ('{"weight_map":{"a":null}}', "The weight_map gives 'a' null, not a file name"),
        ('{"weight_map":{"a":["x"]}}', "The weight_map gives 'a' an array, not a file name"),
        ('{"weight_map":{"a":"x","a":"y"}}', "Its weight_map has the key 'a' twice"),
        ('{"weight_map":{},"weight_map":{}}', "The index has the key 'weight_map' twice"),
        ('{"weight_map":{},"metadata":[]}', "Its metadata is an array, not an object"),
        ('{"weight_map":{},"metadata":{"a":1,"a":2}}', "Its metadata has the key 'a' twice"),
        ('{"weight_map":{},"metadata":{"a":[{"b":1,"b":2}]}}', "An object in its metadata has the key 'b' twice"),
        ('{"weight_map":{},"metadata":{"a":NaN}}', "The index has NaN, which JSON does not allow"),
        ('{"weight_map":{"\\ud800":"x"}}', "The index has the text '\\ud800' with a lone surrogate"),
        ('{"weight_map":' * 5_000, "The index is nested too deeply"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / INDEX
    path.write_text(text)
    with pytest.raises(FileFormatError) as caught:
        tp.of(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).removeprefix(str(path)).lstrip(",: ").startswith(message)


def test_an_index_that_is_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INDEX_BYTES", 10)
    size = (folder / INDEX).stat().st_size
    assert refused(folder / INDEX, LimitExceeded).startswith(f"The index has {size} bytes; the limit is 10")


def test_the_total_size(folder: Path) -> None:
    def opened() -> ShardedSource:
        return open_index(str(folder / INDEX))

    opened().check_total_size()
    write_index(folder, {"z": A, "m": B, "a": A})
    opened().check_total_size()
    for stated, error, message in [
        (25, SizeMismatch, "Its total_size is 25, but its tensors take 24 bytes"),
        ("24", FileFormatError, "Its total_size is the text '24', not an integer"),
        (24.0, FileFormatError, "Its total_size is the number 24.0, not an integer"),
        (True, FileFormatError, "Its total_size is true, not an integer"),
    ]:
        write_index(folder, {"z": A, "m": B, "a": A}, metadata={"total_size": stated})
        source = opened()  # nothing is read by it, so a wrong one is no reason to read nothing
        with pytest.raises(error) as caught:
            source.check_total_size()
        assert str(caught.value) == f"{folder / INDEX}: {message}"


def test_many_names_are_opened_in_one_pass(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": np.zeros(1, np.uint8) for i in range(3000)}
    items = list(tensors.items())
    write(tmp_path / A, dict(items[::2]))
    write(tmp_path / B, dict(items[1::2]))
    write_index(tmp_path, {name: (A, B)[i % 2] for i, name in enumerate(tensors)})
    assert tp.of(tmp_path).names == list(tensors)


def test_digits_of_other_scripts_number_no_shards(tmp_path: Path) -> None:
    wide = {"１": 1, "２": 2}  # full-width digits, which int() takes
    for digit, number in wide.items():
        write(tmp_path / f"model-0000{digit}-of-0000２.safetensors", {f"w{number}": sample("int8", (2,))})
    assert refused(tmp_path, SourceError).startswith("2 checkpoints are in this directory")
