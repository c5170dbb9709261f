"""Rebuild the index of a sharded checkpoint from the headers of its shards."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.edit.write.safetensors_out import index_of
from torchparams.errors import FileFormatError, PlanError, SourceError
from torchparams.io import system as _system
from torchparams.io.write import replace_file, telling
from torchparams.render.result import Result
from torchparams.render.tree import Text, Tree, human_bytes, listed, plural, printable
from torchparams.sources.opening import FORMATS, open_file

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.[^.]+)")
_INDEX = re.compile(r"(.*)\.index(?:\.[^.]+)?\.json")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_SHOWN = 5


@dataclass(frozen=True, repr=False)
class IndexRepair(Result):
    """Result of `repair_index`.

    Attributes:
        path: Path of the index.
        shards: Number of shards.
        tensors: Number of tensor names in the shards.
        total_size: Bytes of all tensors.
        changes: Changes to the index. Empty if it was already right; it is then not rewritten.
        beside: Checkpoint files in the directory that the index does not name.
    """

    path: str
    shards: int
    tensors: int
    total_size: int
    changes: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def tree(self) -> Tree:
        """Tree of the changes, one per line."""
        parts = [
            Text(
                printable(
                    f"{self.path}: {plural(self.tensors, 'tensor')} in {plural(self.shards, 'shard')}, "
                    f"{human_bytes(self.total_size)}"
                ),
                "title",
            )
        ]
        parts += [Text(printable(change)) for change in self.changes] or [Text("the index is correct", "good")]
        if self.beside:
            what = plural(len(self.beside), "file lies", "files lie")
            parts.append(Text(printable(f"{what} not named in the index: {listed(self.beside)}"), "warn"))
        single = os.path.basename(self.path).partition(".index.")[0]
        if single in self.beside:
            parts.append(
                Text(printable(f"some loaders prefer {single} to the shards: remove it if it is stale"), "warn")
            )
        return Tree(tuple(parts))

    def to_json(self) -> dict[str, Any]:
        """The repair as JSON data."""
        return {
            "path": self.path,
            "shards": self.shards,
            "tensors": self.tensors,
            "total_size": self.total_size,
            "changes": list(self.changes),
            "beside": list(self.beside),
        }


def repair_index(path: str | os.PathLike[str], *, dry_run: bool = False) -> IndexRepair:
    """Rebuild the index of the shards in a directory from their headers.

    The shards are the numbered set in the directory; if there are several sets, the one that the index names. Without
    numbered shards, they are the files that the index names, or the single file that replaced them.

    This repairs missing or misplaced tensors, a missing or malformed index, and a wrong `total_size`. Other index
    metadata is kept. A missing shard cannot be rebuilt, and is an error.

    Args:
        path: The directory.
        dry_run: Report the changes without writing.

    Raises:
        SourceError: There are no shards, or shards of several checkpoints.
        FileFormatError: A shard is missing or damaged, or two shards hold the same name.
        WriteError: Writing failed. The old index is unchanged.

    >>> import numpy as np, os, tempfile
    >>> import torchparams as tp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     weights = {name: np.zeros(4, np.float32) for name in "ab"}
    ...     _ = tp.convert(weights, f"{folder}/", max_shard_size=16).run()
    ...     os.remove(f"{folder}/model.safetensors.index.json")
    ...     tp.repair_index(folder).changes
    ('there was no index',)
    """
    folder = os.fspath(path)
    if not os.path.isdir(folder):
        raise PlanError("repairing an index needs the directory of the shards", where=folder, hint="pass the directory")
    place, names = _shards(folder)
    weight_map: dict[str, str] = {}
    total = 0
    for file in names:
        source = open_file(os.path.join(folder, file), formats=tuple(f for f in FORMATS if f.name != "sharded index"))
        for info in source.infos().values():
            total += info.nbytes
            for name in (info.name, *info.aliases):
                if name in weight_map:
                    raise FileFormatError(f"{name!r} is in both {weight_map[name]!r} and {file!r}", where=folder)
                weight_map[name] = file
        source.close()
    old, problem = _read(place)
    changes = [problem] if problem else _changes(old, weight_map, total)
    metadata = old.get("metadata") if isinstance(old.get("metadata"), dict) else None
    if changes and not dry_run:
        with telling(place):
            replace_file(place, index_of(weight_map, total, metadata or {}))
            _system.sync_directory(folder)
    beside = tuple(name for name in sorted(os.listdir(folder)) if name.endswith(_suffix(names)) and name not in names)
    return IndexRepair(place, len(names), len(weight_map), total, tuple(changes), beside)


def _suffix(names: list[str]) -> str:
    return os.path.splitext(names[0])[1]


def _shards(folder: str) -> tuple[str, list[str]]:
    """Path of the index, and the files that it covers."""
    files = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))
    indexes = [name for name in files if _INDEX.fullmatch(name)]
    named = set(_named(os.path.join(folder, indexes[0]))) if len(indexes) == 1 else set()
    sets: dict[tuple[str, str, str], list[str]] = {}
    for name in files:
        match = _SHARD.fullmatch(name)
        if match and match["suffix"] in _SUFFIXES:
            sets.setdefault((match["stem"], match["count"], match["suffix"]), []).append(name)
    if len(sets) > 1 and sum(not named.isdisjoint(names) for names in sets.values()) == 1:
        sets = {key: names for key, names in sets.items() if not named.isdisjoint(names)}
    if not sets and len(indexes) == 1:
        single = _INDEX.sub(r"\1", indexes[0])
        found = [name for name in files if name in named] or [name for name in files if name == single]
        if found:
            return os.path.join(folder, indexes[0]), found
    if len(sets) != 1:
        shown = [f"{stem}-*-of-{count}{suffix}" for stem, count, suffix in sorted(sets)]
        raise SourceError(
            f"there are shards of {len(sets)} checkpoints" if sets else "there are no numbered shards",
            where=folder,
            exists=", ".join(shown) or None,
            hint="move all but one to another directory"
            if sets
            else "shard names look like model-00001-of-00002.safetensors",
        )
    ((stem, count, suffix), names) = next(iter(sets.items()))
    there = set(names)
    missing = [
        name
        for name in (f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1))
        if name not in there
    ]
    if missing or len(names) != int(count):
        raise FileFormatError(
            f"{len(missing)} of {int(count)} shards are missing: {', '.join(missing[:_SHOWN])}"
            + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""),
            where=folder,
            hint="copy or download the missing shards again",
        )
    return os.path.join(folder, f"{stem}{suffix}.index.json"), names


def _named(path: str) -> list[str]:
    """Files that an index names."""
    weight_map = _read(path)[0].get("weight_map")
    return [file for file in weight_map.values() if isinstance(file, str)] if isinstance(weight_map, dict) else []


def _read(path: str) -> tuple[dict[str, Any], str]:
    """Read an index: its content, and the problem with the file as a whole, if any."""
    try:
        if os.path.getsize(path) > limits.INDEX_BYTES:
            return {}, "the index was too long"
        with open(path, "rb") as file:
            index = json.loads(file.read())
    except FileNotFoundError:
        return {}, "there was no index"
    except OSError as error:
        raise SourceError(error.strerror or str(error), where=path) from None
    except (ValueError, RecursionError):
        return {}, "the index was not JSON"
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        return index if isinstance(index, dict) else {}, "the index had no weight_map"
    return index, ""


def _changes(old: Mapping[str, Any], weight_map: Mapping[str, str], total: int) -> list[str]:
    was = old["weight_map"]
    lists = {
        "added": [name for name in weight_map if name not in was],
        "removed, as no shard holds them": [name for name in was if name not in weight_map],
        "moved to the shard that holds them": [n for n, file in weight_map.items() if n in was and was[n] != file],
    }
    changes = [
        f"{plural(len(names), 'tensor')} {what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
        for what, names in lists.items()
        if names
    ]
    metadata = old.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != total:
        changes.append(f"total_size: {total}; it was {'missing' if stated is None else stated}")
    return changes
