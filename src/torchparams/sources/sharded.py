"""A checkpoint in several files: an index with its shards, or a complete set of numbered shards.

The files form one table. Opening compares the index with the shards in both directions: every listed tensor must exist,
and every tensor must be listed.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
from contextlib import suppress
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import FileFormatError, LimitExceeded, SizeMismatch, SourceError
from torchparams.io.folders import among, entries
from torchparams.io.opened import bytes_of_file
from torchparams.io.paths import folder_of, is_url, join, name_of
from torchparams.io.strict_json import Object, as_object, describe, plain, quoted, strict
from torchparams.order import natural_key
from torchparams.sources._recognise import checkpoints_below, foreign_directory, weights_among
from torchparams.sources.base import NO_METADATA, Source
from torchparams.sources.opening import FORMATS, open_file, reopened
from torchparams.sources.training.recognise import training_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import torch

    from torchparams.encodings.base import Structure
    from torchparams.expressions.base import Expression
    from torchparams.info import Location, ParameterInfo
    from torchparams.sources.torchfile.verdict import Verdict

_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")  # model.safetensors.index.json, and with a variant: ….index.fp16.json
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.[^.]+)")
# Suffixes that are searched for in a directory. Other files, such as `.json` and `.pkl`, are rarely checkpoints.
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SHARD_FORMATS = tuple(fmt for fmt in FORMATS if fmt.name != "sharded index")  # an index of indexes could be endless
_SHARDS_AT_ONCE = 8  # remote shards whose headers are requested at once
_SHOWN = 6  # names of files or tensors in one message


def open_index(path: str, inner: str | None = None, label: str | None = None) -> ShardedSource:
    """Open the shards that the index `path` names.

    Args:
        path: The index: JSON with a `weight_map` from tensor to file name. The files are in the same directory.
        inner: Text after `#` in the target; must be None, because an index has no nested mappings.
        label: Name in tables and messages; by default, the path.

    Raises:
        SourceError: A file cannot be read, or `inner` is not None.
        FileFormatError: The index is invalid, a shard is missing or damaged, or the index and the shards disagree.
        LimitExceeded: The index is longer than `limits.INDEX_BYTES`.
    """
    if inner is not None:
        raise SourceError(
            f"sharded checkpoints have no nested mappings, so there is none at {inner!r}",
            where=label or path,
            hint=f"leave #{inner} out, or pass one of its shards",
        )
    weight_map, metadata = _read_index(path)
    folder = folder_of(path)
    names = list(dict.fromkeys(weight_map.values()))
    _check_presence(path, folder, names)
    shards = _open_each(folder, names)
    _check_agreement(path, weight_map, shards)
    order = ((shard, shards[shard].resolve(name)) for name, shard in weight_map.items())
    return ShardedSource(label or path, shards, order, index=path, metadata=metadata)


def open_directory(path: str, inner: str | None = None) -> Source:
    """Open the one checkpoint in the directory `path`.

    An index is used if there is exactly one. Otherwise, a complete set of numbered shards or a single file with a usual
    suffix is used if there is exactly one of these. Files that a trainer saves beside a model (optimizer, arguments,
    random states) are ignored. It never chooses between several checkpoints.

    Args:
        path: The directory.
        inner: Text after `#`, for a checkpoint that is one file.

    Raises:
        SourceError: The directory has no checkpoint, or several.
        FileFormatError: The checkpoint is damaged, or a shard is missing.
    """
    try:
        everything = entries(path)
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(error.strerror or str(error), where=path) from None
    there = sorted(name for name in everything if not name.startswith("."))
    files = [name for name in there if not everything[name]]
    found = [name for name in files if name.endswith(_SUFFIXES)]
    weights = weights_among(found)
    indexes = [name for name in files if _INDEX.fullmatch(name)]
    training = training_directory(path, everything, [*weights, *indexes], inner)
    if training is not None:
        return training
    if len(indexes) == 1:
        return open_index(join(path, indexes[0]), inner, label=path)
    if indexes:
        raise SourceError(
            f"{len(indexes)} checkpoints are in this directory: {_some(indexes)}",
            where=path,
            hint="pass the path of one index",
        )
    refused = foreign_directory(path, list(everything))
    if refused is not None:
        raise refused
    found = weights or found
    sets: dict[tuple[str, str, str], list[str]] = {}
    for name in found:
        match = _SHARD.fullmatch(name)
        if match:
            sets.setdefault((match["stem"], match["count"], match["suffix"]), []).append(name)
    single = [name for name in found if not _SHARD.fullmatch(name)]
    if len(sets) + len(single) == 1:
        if single:
            return open_file(join(path, single[0]), inner, formats=_SHARD_FORMATS)
        return _open_set(path, inner, *next(iter(sets.items())))
    if not found:
        below = [] if is_url(path) else checkpoints_below(path, there, _SUFFIXES)
        shown = [name + os.sep * everything[name] for name in there]
        raise SourceError(
            "there is no checkpoint in this directory",
            where=path,
            exists=f"there are {_some(shown)}" if shown else "it is empty",
            hint=f"did you mean {os.path.join(path, below[-1])}?"
            if below
            else f"a checkpoint is an .index.json with its shards, or a file that ends in {' '.join(_SUFFIXES)}",
        )
    names = single + [f"{s}-*-of-{count}{suffix}" for s, count, suffix in sets]
    raise SourceError(
        f"{len(names)} checkpoints are in this directory: {_some(sorted(names, key=natural_key))}",
        where=path,
        hint="choose one",
    )


class ShardedSource(Source):
    """Several files as one table.

    With an index, names are listed in the order of its `weight_map`; otherwise shard by shard. The `location` of an
    info names the shard.

    Args:
        label: Name in tables and messages.
        shards: File name → source of that file.
        order: File name and canonical name of every tensor, in the order of the listing. Repeated mentions of a tensor,
            by its aliases, are skipped.
        index: Path of the index, if there is one.
        metadata: The `metadata` of the index.
    """

    def __init__(
        self,
        label: str,
        shards: Mapping[str, Source],
        order: Iterable[tuple[str, str]],
        *,
        index: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.label = label
        kinds = {shard.format for shard in shards.values()}
        self.format = f"sharded {kinds.pop()}" if len(kinds) == 1 else "sharded"
        self._index = index
        self._shards = dict(shards)
        # Needed for every tensor, so it is computed once.
        of_shards = (path for shard in self._shards.values() for path in shard.files)
        self._files = (*([] if index is None else [index]), *of_shards)
        self._metadata = MappingProxyType(dict(metadata)) if metadata else NO_METADATA
        self._holder: dict[str, Source] = {}
        self._read: dict[int, Source] = {}
        infos: dict[str, ParameterInfo] = {}
        for file, name in order:
            info = shards[file].infos()[name]
            if info.storage is not None:  # each file numbers its own storages
                info = info._replace(storage=info.storage._replace(key=f"{file}/{info.storage.key}"))
            infos[name] = info
            self._holder[name] = shards[file]
        self._infos = MappingProxyType(infos)

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos of all shards."""
        return self._infos

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Values from the shard that holds the tensor."""
        return self._reading(name).numpy(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor from the shard that holds it."""
        return self._reading(name).tensor(name)

    def value(self, name: str) -> Any:
        """The value from the shard that holds it."""
        return self._reading(name).value(name)

    def span(self, name: str) -> Location | None:
        """Byte range in the shard that holds the tensor."""
        return self._holding(name).span(name)

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """The expression of the shard if it is computed; otherwise the row of this table."""
        computed = not self.shows_storage(name) and self._holding(name).row(name)
        return computed or super().row(name, info)

    def check_size(self, name: str) -> None:
        """Check the size in the shard that holds the tensor."""
        self._holding(name).check_size(name)

    def shows_storage(self, name: str) -> bool:
        """Whether the shard stores exactly these elements."""
        return self._holding(name).shows_storage(name)

    @property
    def structures(self) -> Sequence[Structure]:
        """Structures of all shards; the parts of one may lie in several shards."""
        found = {each.name: each for shard in self.shards.values() for each in shard.structures}
        return tuple(found.values())

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The `metadata` of the index, unchanged; `check_total_size` compares its `total_size`."""
        return self._metadata

    @property
    def verdict(self) -> Verdict | None:
        """What unpickling the shards would do besides building tensors."""
        found = [shard.verdict for shard in self._shards.values() if shard.verdict is not None]
        return reduce(or_, found) if found else None

    @property
    def files(self) -> tuple[str, ...]:
        """The index, if there is one, and the shards."""
        return self._files

    @property
    def shards(self) -> Mapping[str, Source]:
        """File name → source of that file."""
        return MappingProxyType(self._shards)

    def check_total_size(self) -> None:
        """Compare the `total_size` of the index with the bytes of the tensors.

        Nothing depends on this number, and indexes of valid checkpoints often keep an old one from before a conversion.
        So opening does not check it.

        Raises:
            SizeMismatch: The sizes differ.
            FileFormatError: The `total_size` is not an integer.
        """
        if "total_size" not in self._metadata:
            return
        stated = self._metadata["total_size"]
        where = self._index or self.label
        if type(stated) is not int:
            raise FileFormatError(f"its total_size is {describe(stated)}, not an integer", where=where)
        total = sum(info.nbytes for info in self._infos.values())
        if stated != total:
            raise SizeMismatch(f"its total_size is {stated}, but its tensors take {total} bytes", where=where)

    def check_unchanged(self) -> None:
        """Raise if a shard was changed after it was listed."""
        for shard in self._shards.values():
            shard.check_unchanged()

    # A copy opens the files itself.
    def __reduce__(self) -> tuple[Any, ...]:
        return reopened(self)

    def close(self) -> None:
        """Close the shards that were read; a run may call this after every tensor."""
        while self._read:
            with suppress(KeyError):  # another thread was faster
                self._read.popitem()[1].close()

    def _reading(self, name: str) -> Source:
        shard = self._holding(name)
        self._read[id(shard)] = shard
        return shard

    def _holding(self, name: str) -> Source:
        holder = self._holder.get(name)
        return self._holder[self.resolve(name)] if holder is None else holder


def _open_each(folder: str, names: list[str]) -> dict[str, Source]:
    """Open some files of a directory; remote files are requested several at a time."""
    paths = [join(folder, name) for name in names]
    if not is_url(folder):
        return {name: open_file(path, formats=_SHARD_FORMATS) for name, path in zip(names, paths, strict=True)}
    from torchparams.io.remote.file import until
    from torchparams.io.threads import each_of

    stop = threading.Event()

    def opening(path: str) -> Source:
        with until(stop.is_set):
            return open_file(path, formats=_SHARD_FORMATS)

    opened = each_of(paths, opening, _SHARDS_AT_ONCE, stop)
    return dict(zip(names, opened, strict=True))


# --- the index -------------------------------------------------------------------------------


def _read_index(path: str) -> tuple[dict[str, str], dict[str, Any]]:
    file = bytes_of_file(path)
    if file.size > limits.INDEX_BYTES:
        raise LimitExceeded(
            f"the index has {file.size} bytes; the limit is {limits.INDEX_BYTES}",
            where=path,
            hint="if you trust the file, raise torchparams.limits.INDEX_BYTES",
        )
    index = as_object(strict(file.read(0, file.size), "the index", path), "the index", path)
    if "weight_map" not in index:
        keys = [quoted(key) for key in index]
        raise FileFormatError(
            "a JSON file without a weight_map is not the index of a checkpoint",
            where=path,
            exists=f"its keys are {_some(keys)}" if keys else "it is an empty object",
        )
    weight_map = as_object(index["weight_map"], "its weight_map", path)
    checked: set[str] = set()
    for name, file_name in weight_map.items():
        if type(file_name) is not str:
            raise FileFormatError(
                f"the weight_map gives {quoted(name)} {describe(file_name)}, not a file name", where=path
            )
        if file_name not in checked:
            # Only the text is checked. Links are followed: a download cache keeps its files elsewhere.
            if not file_name or file_name in (".", "..") or re.search(r"[/\\\0]|^[A-Za-z]:", file_name):
                raise FileFormatError(
                    f"the weight_map puts {quoted(name)} into {quoted(file_name)}, "
                    "which is not the name of a file in the index's own directory",
                    where=path,
                )
            checked.add(file_name)
    metadata = index.get("metadata", Object())
    if type(metadata) is not Object:
        raise FileFormatError(f"its metadata is {describe(metadata)}, not an object", where=path)
    return weight_map, plain(metadata, "its metadata", path)


def _check_presence(path: str, folder: str, names: list[str]) -> None:
    present = set(among(folder, names))
    missing = [name for name in names if name not in present]
    if missing:
        broken = [name for name in missing if os.path.islink(os.path.join(folder, name))]
        what = "file that is" if len(missing) == 1 else "files that are"
        raise FileFormatError(
            f"the index names {len(missing)} {what} not there: {_some(map(quoted, missing))}",
            where=path,
            exists=f"{_some(map(quoted, broken))} is a broken link" if broken else None,
            hint=_stale(path, folder, names) if len(missing) == len(names) and not broken else None,
        )
    # A shard of the same set that the index does not name: its tensors would silently be missing.
    named = set(names)
    sets = {(m["stem"], m["count"], m["suffix"]) for m in map(_SHARD.fullmatch, names) if m}
    for name in sorted(_listed(folder)) if sets else ():
        match = _SHARD.fullmatch(name)
        if match and name not in named and (match["stem"], match["count"], match["suffix"]) in sets:
            raise FileFormatError(
                f"the index names no tensor in {quoted(name)}, which lies beside its shards",
                where=path,
                hint=_repair(folder),
            )


def _listed(folder: str) -> Iterable[str]:
    """Names in a directory; empty if a server does not list it."""
    if not is_url(folder):
        return os.listdir(folder or ".")
    from torchparams.io.remote.listing import entries_if_listed

    return entries_if_listed(folder) or ()


def _repair(folder: str) -> str:
    """The command that rebuilds an index from its shards."""
    return f"torchparams convert --repair-index {shlex.quote(folder or '.')} rebuilds it from the files"


def _stale(path: str, folder: str, names: list[str]) -> str | None:
    """Hint for an index without any of its shards: it may be left over beside a file that replaced them."""
    single = re.sub(r"\.index(\.[^.]+)?\.json$", "", name_of(path))
    if single in names or single not in among(folder, [single]):
        return None
    return f"{join(folder, single)} exists and may have replaced them; {_repair(folder)}"


def _check_agreement(path: str, weight_map: Mapping[str, str], shards: Mapping[str, Source]) -> None:
    holders: dict[str, list[str]] = {}
    for file, shard in shards.items():
        for info in shard.infos().values():
            for name in (info.name, *info.aliases):
                holders.setdefault(name, []).append(file)
    lost = [name for name, file in weight_map.items() if file not in holders.get(name, ())]
    if lost:
        name, file = lost[0], weight_map[lost[0]]
        raise FileFormatError(
            f"the index puts {quoted(name)} into {quoted(file)}, which does not hold it{_more(lost)}",
            where=path,
            exists=f"it is in {quoted(holders[name][0])}"
            if name in holders
            else f"{quoted(file)} holds {_tensors(shards[file])}",
            hint=_repair(os.path.dirname(path)),
        )
    unlisted = [name for name in holders if name not in weight_map]
    if unlisted:
        name = unlisted[0]
        raise FileFormatError(
            f"{quoted(holders[name][0])} holds {quoted(name)}, which the index does not list{_more(unlisted)}",
            where=path,
            hint=_repair(os.path.dirname(path)),
        )
    for name, files in holders.items():
        if len(files) > 1:
            other = next(file for file in files if file != weight_map[name])
            raise FileFormatError(
                f"the index puts {quoted(name)} into {quoted(weight_map[name])}, and {quoted(other)} holds it too",
                where=path,
            )


# --- a set of numbered shards ----------------------------------------------------------------


def _open_set(folder: str, inner: str | None, kind: tuple[str, str, str], names: list[str]) -> Source:
    stem, count, suffix = kind
    if int(count) != len(names) or [int(m["number"]) for m in map(_SHARD.fullmatch, names) if m] != list(
        range(1, len(names) + 1)
    ):
        there = set(names)
        # The count comes from the file name: it may be 99999.
        wanted = (f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1))
        missing = [name for name in wanted if name not in there]
        raise FileFormatError(
            f"{len(missing)} of {int(count)} shards are missing: {_some(map(quoted, missing))}"
            if missing
            else f"there are more than {int(count)} shards: {_some(map(quoted, names))}",
            where=folder,
        )
    if inner is not None and len(names) > 1:
        raise SourceError(
            f"a sharded checkpoint holds no nested mapping, so none at {inner!r}",
            where=folder,
            hint=f"leave #{inner} out, or choose one of its shards",
        )
    if len(names) == 1:
        return open_file(join(folder, names[0]), inner, formats=_SHARD_FORMATS)
    shards = _open_each(folder, names)
    order = [(file, name) for file, shard in shards.items() for name in shard.infos()]
    holders: dict[str, str] = {}
    for file, shard in shards.items():
        for info in shard.infos().values():
            for name in (info.name, *info.aliases):
                if name in holders:
                    raise FileFormatError(
                        f"{quoted(name)} is in {quoted(holders[name])} and in {quoted(file)}", where=folder
                    )
                holders[name] = file
    return ShardedSource(folder, shards, order)


def _more(names: list[str]) -> str:
    return f" ({len(names)} tensors are so)" if len(names) > 1 else ""


def _tensors(shard: Source) -> str:
    count = len(shard.infos())
    return "no tensors" if not count else "1 tensor" if count == 1 else f"{count} tensors"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
