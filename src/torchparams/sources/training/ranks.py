"""Source of state dicts that each rank saved in a file of its own: `model_world_size_4_rank_0.pt` and so on.

Sharded tensors (FSDP's `SHARDED_STATE_DICT`: ShardedTensor or DTensor) record their position, and the parts are joined.
A tensor that every rank holds whole is read from the first rank, as in FSDP's full state dict.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams import limits
from torchparams.errors import FileFormatError, LimitExceeded, SourceError, UnknownName, shorten
from torchparams.expressions.assembled import Assembled, Chunk
from torchparams.expressions.operations import Slice
from torchparams.expressions.tiling import Box, fault
from torchparams.io.filebytes import paused_gc
from torchparams.io.opened import bytes_of_file
from torchparams.io.paths import join
from torchparams.render.tree import listed, plural
from torchparams.sources.torchfile.archive import Archive
from torchparams.sources.torchfile.nodes import TensorRef, component_of, describe, plain_copy
from torchparams.sources.torchfile.torchzip import ChosenSource
from torchparams.sources.training._placements import Unplaced, placed
from torchparams.sources.training.parted import PartedSource, parted_info, within

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression
    from torchparams.info import ParameterInfo
    from torchparams.io.filebytes import FileBytes

_NAME = re.compile(r"(?P<stem>.+?)_world_size_(?P<world>\d{1,7})_rank_(?P<rank>\d{1,7})\.(?:pt|pth|bin)")
_DEPTH, _NODES = 8, 10_000  # limits for a value that is not a tensor
_MODEL = "model"


class Shard(NamedTuple):
    """A part of a tensor in the file of one rank.

    Attributes:
        box: Its position in the whole tensor.
        rank: The rank.
        name: Name of the local tensor in the source of that rank.
        inside: Its position in the local tensor.
    """

    box: Box
    rank: int
    name: str
    inside: Box


class Row:
    """A tensor of all ranks.

    Attributes:
        shape, dtype: Shape and dtype of the whole tensor.
        shards: Its parts; None if a rank holds all of it.
        rank: First rank that holds it.
    """

    def __init__(self, shape: tuple[int, ...] | None, dtype: DType, shards: list[Shard] | None, rank: int) -> None:
        self.shape, self.dtype, self.shards, self.rank = shape, dtype, shards, rank


def ranks_among(there: Sequence[str]) -> dict[str, dict[int, dict[int, str]]]:
    """Find the rank files among names in a directory: stem → world size → rank → name.

    >>> ranks_among(["config.json", "model_world_size_2_rank_0.pt"])
    {'model': {2: {0: 'model_world_size_2_rank_0.pt'}}}
    """
    found: dict[str, dict[int, dict[int, str]]] = {}
    for name in sorted(there):
        match = _NAME.fullmatch(name)
        if match:
            found.setdefault(match["stem"], {}).setdefault(int(match["world"]), {})[int(match["rank"])] = name
    return found


def open_ranks(path: str, sets: Mapping[str, Mapping[int, Mapping[int, str]]], inner: str | None = None) -> RanksSource:
    """Open the rank files in the directory `path`.

    Args:
        path: The directory.
        sets: Result of `ranks_among` for it.
        inner: Stem of a set other than `model`, such as `optim`, or a name in the files.

    Raises:
        SourceError: There are several sets, but none is called `model`.
        FileFormatError: A rank is missing, a file is damaged, or the shards do not tile their tensors.
    """
    head, _, rest = (inner or "").partition(".")
    default = _MODEL if _MODEL in sets else next(iter(sets)) if len(sets) == 1 else None
    stem, below = (head, rest or None) if head in sets and head != default else (default, inner)
    if stem is None:
        raise SourceError(
            f"the ranks wrote {len(sets)} kinds of files",
            where=path,
            exists=listed(list(sets), 8),
            hint=f"choose one: {path}#{next(iter(sets))}",
        )
    names = _complete(path, stem, sets[stem])
    others = [each for each in sets if each != stem]
    with paused_gc():
        try:
            return RanksSource(path, names, inner, below, others)
        except UnknownName:
            if head != default:
                raise
        # `#model` is first looked up in the files, then among the stems of the files.
        return RanksSource(path, names, inner, rest or None, others)


def _complete(path: str, stem: str, worlds: Mapping[int, Mapping[int, str]]) -> list[str]:
    """Files of all ranks, in order."""
    if len(worlds) > 1:
        said = listed([f"{len(ranks)} of {world}" for world, ranks in sorted(worlds.items())])
        raise FileFormatError(
            f"there are files of {stem} with different world sizes: {said}",
            where=path,
            hint="move the files of one run into a separate directory",
        )
    ((world, ranks),) = worlds.items()
    missing = [rank for rank in range(min(world, len(ranks) + 9)) if rank not in ranks]
    if missing:
        raise FileFormatError(
            f"{world - len(ranks)} of {world} ranks are missing: rank {listed(list(map(str, missing)), 8)}",
            where=path,
            exists=f"there are {plural(len(ranks), 'file')} {stem}_world_size_{world}_rank_*",
            hint="copy the files of all ranks into the directory",
        )
    if len(ranks) > world:
        raise FileFormatError(f"there are {len(ranks)} files for {world} ranks", where=path)
    return [ranks[rank] for rank in range(world)]


class RanksSource(PartedSource):
    """The state dicts of all ranks as one table.

    Args:
        path: The directory.
        names: The files, in the order of ranks.
        inner: Text after `#` in the target.
        below: The part of it that is a name in the files.
        others: Stems of other sets in the directory.
    """

    format = "rank files"

    def __init__(
        self, path: str, names: Sequence[str], inner: str | None, below: str | None, others: Sequence[str]
    ) -> None:
        self._ranks: list[ChosenSource] = []
        files, imported = [], []
        tables: list[_Rank] = []
        for rank, name in enumerate(names):
            file = bytes_of_file(join(path, name))
            table = _Rank(file, rank, len(names))
            files.append(file)
            imported += table.archive.machine.imported
            tables.append(table)
            self._ranks.append(table.source)
        rows = _joined(tables, path)
        short = within(path, below, list(rows), tables[0].beside)
        self._table = {short[name]: rows[name] for name in short}
        self._long = {shown: name for name, shown in short.items()}
        prefix = f"{below}." if below else ""
        self._values = {
            name.removeprefix(prefix): value for name, value in tables[0].beside.items() if name.startswith(prefix)
        }
        self._whole = sum(row.shards is None for row in self._table.values())
        mappings = [name.removeprefix(prefix) for name in tables[0].mappings if name.startswith(prefix)]
        super().__init__(
            f"{path}#{inner}" if inner else path,
            [self._info(name, row) for name, row in self._table.items()],
            files,
            imported=imported,
            mappings=[*mappings, *([] if inner else others)],
        )

    def _info(self, name: str, row: Row) -> ParameterInfo:
        if row.shards is None:  # use the info of its file, because it may have no plain values
            found = self._ranks[row.rank].infos()[self._long[name]]
            if found.layout is not None:
                return found
        return parted_info(name, row.shape or (), row.dtype, prod(row.shape or ()))

    def _build(self, name: str) -> Expression:
        row = self._table[name]
        if row.shards is None:
            return self._ranks[row.rank].row(self._long[name])
        chunks = []
        for shard in row.shards:
            x = self._ranks[shard.rank].row(shard.name)
            for dim, (at, size) in enumerate(zip(*shard.inside, strict=True)):
                if size != x.shape[dim]:
                    x = Slice(x, dim, at, at + size)
            chunks.append(Chunk(shard.box.offsets, x))
        return chunks[0].x if len(chunks) == 1 else Assembled(row.shape or (), row.dtype, chunks)

    def _entries(self) -> Mapping[str, Any]:
        found = dict(self._values)
        if self._whole and len(self._ranks) > 1:
            found["(whole)"] = (
                f"{plural(self._whole, 'tensor')} that every rank holds whole; those of the first rank are listed"
            )
        return found


class _Rank:
    """Contents of the file of one rank.

    Attributes:
        archive: The file.
        source: Local tensors, by name.
        rows: Tensors as described by this rank, by name.
        beside: Entries that are not tensors.
        mappings: Dicts in it that hold others, from two levels.
    """

    def __init__(self, file: FileBytes, rank: int, world: int) -> None:
        self.path, self.rank = file.path, rank
        self.archive = Archive(file)
        self.rows: dict[str, Row] = {}
        self.beside: dict[str, Any] = {}
        self.mappings: list[str] = []
        tensors: dict[str, TensorRef] = {}
        for name, node in self._walk():
            if type(node) is not TensorRef:
                self.beside[name] = node
                continue
            try:
                found = placed(node, rank)
            except Unplaced as error:
                raise self._error(f"{shorten(repr(name))} {error}") from None
            if found is None:
                tensors[name] = node
                self.rows[name] = Row(node.shape, node.dtype, None, rank)
                continue
            if found.world not in (None, world):
                raise self._error(
                    f"{shorten(repr(name))} was sharded over {found.world} ranks, but there are files for {world}"
                )
            shards = []
            for piece in found.pieces:
                local = f"{name}{piece.box}"
                tensors[local] = piece.local
                shards.append(Shard(piece.box, rank, local, piece.inside))
            dtype = found.pieces[0].local.dtype if found.pieces else node.dtype
            self.rows[name] = Row(found.shape, dtype, shards, rank)
        self.source = ChosenSource(self.archive, tensors, (_rank_again, (file.path, rank, world)))

    def _error(self, what: str) -> FileFormatError:
        return FileFormatError(what, where=self.path)

    def _walk(self) -> Iterator[tuple[str, Any]]:
        """Yield name and node of every tensor; for other entries, a copy or a description."""
        root = self.archive.root
        if type(root) is not dict:
            raise self._error(f"the file of a rank must contain a state dict, not {describe(root)}")
        left = [limits.PICKLE_OPERATIONS]
        budget = [_NODES]
        stack: list[tuple[str, int, Iterator[tuple[Any, Any]]]] = [("", 0, iter(root.items()))]
        while stack:
            prefix, depth, children = stack[-1]
            for key, node in children:
                left[0] -= 1
                name = f"{prefix}{component_of(key)}"
                if left[0] < 0 or len(name) > limits.NAME_LENGTH or depth > limits.NESTING:
                    raise LimitExceeded(
                        "its contents are shared or nested too deeply for a state dict", where=self.path
                    )
                if type(node) is dict and node:
                    if depth < 2:
                        self.mappings.append(name)
                    stack.append((f"{name}.", depth + 1, iter(node.items())))
                    break
                if type(node) is TensorRef:
                    yield name, node
                elif budget[0] > 0:
                    copied = plain_copy(node, _DEPTH, budget)
                    yield name, copied if budget[0] >= 0 else describe(node)
                else:
                    yield name, describe(node)
            else:
                stack.pop()


def _rank_again(path: str, rank: int, world: int) -> ChosenSource:
    return _Rank(bytes_of_file(path), rank, world).source


def _joined(ranks: Sequence[_Rank], path: str) -> dict[str, Row]:
    """Tensors of all ranks, with all parts of sharded ones.

    Raises:
        FileFormatError: The ranks disagree, or parts are missing or overlap.
    """
    rows: dict[str, Row] = {}
    for rank in ranks:
        for name, row in rank.rows.items():
            known = rows.setdefault(name, row)
            if known is row:
                continue
            same = known.shape == row.shape and known.dtype == row.dtype
            if not same or (known.shards is None) is not (row.shards is None):
                raise FileFormatError(
                    f"rank {rank.rank} holds {shorten(repr(name))} as {_said(row)}, but rank {known.rank} as "
                    f"{_said(known)}",
                    where=path,
                )
            if known.shards is not None and row.shards is not None:
                known.shards += row.shards
    for name, row in rows.items():
        if row.shards is None:
            continue
        # Ranks that hold the same part are replicas; the first is read.
        first = {str(shard.box): shard for shard in reversed(row.shards)}
        row.shards = sorted(first.values(), key=lambda shard: shard.box)
        wrong = fault(row.shape or (), [shard.box for shard in row.shards])
        if wrong is not None:
            raise FileFormatError(f"{shorten(repr(name))} {wrong}", where=path)
    return rows


def _said(row: Row) -> str:
    return f"{row.dtype} {list(row.shape or ())}{'' if row.shards is None else ', sharded'}"
