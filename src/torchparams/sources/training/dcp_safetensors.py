"""Source of distributed checkpoints in safetensors files: `HuggingFaceStorageWriter(save_distributed=True)`.

Each rank writes a safetensors file with its shards. The metadata of its header has the offsets of each shard in its
tensor. The shapes of the tensors and the number of files are not recorded, so the shape of a tensor is the extent of
its shards.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, SourceError, shorten
from torchparams.expressions.assembled import Assembled, Chunk
from torchparams.expressions.tiling import Box, fault
from torchparams.io.opened import bytes_of_file
from torchparams.io.paths import join
from torchparams.io.strict_json import Object, as_object, describe, quoted, strict
from torchparams.render.tree import listed, plural
from torchparams.sources.safetensors import SafetensorsSource
from torchparams.sources.training.parted import PartedSource, parted_info, within

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.expressions.base import Expression

KEY = "DCP_SHARDING_INFO"
"""Metadata key of the offsets of the shards."""

_NAME = re.compile(r"shard-(?P<rank>\d{5})-model-\d{5}-of-\d{5}\.safetensors")


def shards_among(there: Sequence[str]) -> list[str]:
    """File names in a directory that have the form of shards, sorted.

    >>> shards_among(["config.json", "shard-00002-model-00001-of-00001.safetensors"])
    ['shard-00002-model-00001-of-00001.safetensors']
    """
    return sorted(name for name in there if _NAME.fullmatch(name))


def open_shards(path: str, names: Sequence[str], inner: str | None = None) -> ShardsSource:
    """Open the shards `names` in the directory `path`.

    Args:
        path: The directory.
        names: The files.
        inner: Include only tensors below this name, and remove it from their names.

    Raises:
        FileFormatError: A shard is missing or damaged, or the shards do not tile their tensors.
    """
    return ShardsSource(path, names, inner)


class ShardsSource(PartedSource):
    """A distributed checkpoint in safetensors files.

    Args:
        path: The directory.
        names: The files.
        inner: See `open_shards`.
    """

    format = "distributed safetensors"
    zips = False

    def __init__(self, path: str, names: Sequence[str], inner: str | None) -> None:
        self._shards = {name: SafetensorsSource(join(path, name)) for name in names}
        found: dict[str, list[tuple[Box, str]]] = {}
        for file, shard in self._shards.items():
            offsets = _offsets(shard)
            for name, info in shard.infos().items():
                found.setdefault(name, []).append((Box(offsets[name], info.shape or ()), file))
        self._boxes: dict[str, list[tuple[Box, str]]] = {}
        infos = []
        for name, short in within(path, inner, list(found), ()).items():
            boxes = self._boxes[short] = sorted(found[name], key=lambda pair: pair[0])
            shape = tuple(
                max(ends) for ends in zip(*(map(sum, zip(*box, strict=True)) for box, _ in boxes), strict=True)
            )
            dtypes = {str(self._shards[file].infos()[name].dtype) for _, file in boxes}
            if len(dtypes) > 1:
                raise FileFormatError(
                    f"the shards of {shorten(repr(name))} are of {listed(sorted(dtypes))}", where=path
                )
            wrong = fault(shape, [box for box, _ in boxes])
            if wrong is not None:
                raise FileFormatError(f"{shorten(repr(name))} {wrong}", where=path, exists=_ranks(names))
            dtype = self._shards[boxes[0][1]].infos()[name].dtype
            infos.append(parted_info(short, shape, dtype, prod(shape)))
        self._long = {short: name for name, short in within(path, inner, list(found), ()).items()}
        label = f"{path}#{inner}" if inner else path
        super().__init__(label, infos, [bytes_of_file(join(path, name)) for name in names])

    def _build(self, name: str) -> Expression:
        info = self._infos[name]
        chunks = [Chunk(box.offsets, self._shards[file].row(self._long[name])) for box, file in self._boxes[name]]
        return chunks[0].x if len(chunks) == 1 else Assembled(info.shape or (), info.dtype, chunks)

    def _entries(self) -> Mapping[str, Any]:
        return {"(shards)": f"{plural(len(self._shards), 'file')}, which do not say how many there should be"}


def _ranks(names: Sequence[str]) -> str:
    """Which shards exist. A rank without tensors writes no file, so a gap alone is not an error."""
    ranks = [match["rank"].lstrip("0") for match in map(_NAME.fullmatch, names) if match]
    return f"there are the shards {listed(list(dict.fromkeys(ranks)), 8)}"


def _offsets(shard: SafetensorsSource) -> dict[str, tuple[int, ...]]:
    """Offsets of each shard in its tensor, by name."""
    text = shard.metadata.get(KEY)
    if text is None:
        raise SourceError(
            f"its metadata lacks {KEY}, which has the offsets of its shards",
            where=shard.label,
            hint="pass the file itself to list its shards",
        )
    found = {}
    given = dict(as_object(strict(text.encode(), KEY, shard.label), KEY, shard.label))
    for name, info in shard.infos().items():
        entry = given.get(name)
        offsets = dict(entry).get("saved_offsets") if type(entry) is Object else None
        fits = type(offsets) is list and len(offsets) == len(info.shape or ())
        if not fits or not all(type(each) is int and 0 <= each < 1 << 62 for each in offsets or ()):
            raise FileFormatError(
                f"{KEY} gives {quoted(name)} {describe(entry if entry is None else offsets)}, not "
                f"{plural(len(info.shape or ()), 'offset')}",
                where=shard.label,
            )
        found[name] = tuple(offsets or ())
    return found
