"""State dicts that each rank saved for itself: `model_world_size_4_rank_0.pt` and so on.

Sharded tensors (FSDP's `SHARDED_STATE_DICT`: ShardedTensor or DTensor) say where their part lies; they are joined. What
every rank holds whole is that of the first rank, which is also what FSDP's full state dict holds.
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
_DEPTH, _NODES = 8, 10_000  # of a value that is not a tensor
_MODEL = "model"


class Shard(NamedTuple):
    """A part of a tensor in the file of a rank.

    Attributes:
        box: Where it lies in the whole.
        rank: The rank.
        name: The name of the local tensor in that rank's source.
        inside: The part of the local tensor that it is.
    """

    box: Box
    rank: int
    name: str
    inside: Box


class Row:
    """A tensor of all ranks.

    Attributes:
        shape, dtype: Of the whole.
        shards: Its parts; None where a rank holds all of it.
        rank: The first rank that holds it.
    """

    def __init__(self, shape: tuple[int, ...] | None, dtype: DType, shards: list[Shard] | None, rank: int) -> None:
        self.shape, self.dtype, self.shards, self.rank = shape, dtype, shards, rank


def ranks_among(there: Sequence[str]) -> dict[str, dict[int, dict[int, str]]]:
    """Of the names in a directory, those of rank files: stem → world size → rank → name.

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
    """The source that reads the rank files in the directory `path`.

    Args:
        path: The directory.
        sets: What `ranks_among` found in it.
        inner: The stem of another set than `model` (`optim`), or what lies below a name.

    Raises:
        SourceError: There are several sets, and none is called `model`.
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
            hint=f"name one: {path}#{next(iter(sets))}",
        )
    names = _complete(path, stem, sets[stem])
    others = [each for each in sets if each != stem]
    with paused_gc():
        try:
            return RanksSource(path, names, inner, below, others)
        except UnknownName:
            if head != default:
                raise
        # `#model` is first what the files hold under that name, then the files of that name.
        return RanksSource(path, names, inner, rest or None, others)


def _complete(path: str, stem: str, worlds: Mapping[int, Mapping[int, str]]) -> list[str]:
    """The files of all ranks, in their order."""
    if len(worlds) > 1:
        said = listed([f"{len(ranks)} of {world}" for world, ranks in sorted(worlds.items())])
        raise FileFormatError(
            f"there are files of {stem} of different world sizes: {said}",
            where=path,
            hint="move those of one run into a directory of their own",
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
        raise FileFormatError(f"there are {len(ranks)} files of {world} ranks", where=path)
    return [ranks[rank] for rank in range(world)]


class RanksSource(PartedSource):
    """The state dicts of all ranks as one table.

    Args:
        path: The directory.
        names: The files, in the order of the ranks.
        inner: What follows `#` in the target.
        below: What of it lies within the files.
        others: The stems of other sets in the directory.
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
        if row.shards is None:  # what its own file says of it, which may be that it has no plain values
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
            found["(whole)"] = f"{plural(self._whole, 'tensor')} that ranks hold whole; listed are those of the first"
        return found


class _Rank:
    """What the file of one rank holds.

    Attributes:
        archive: The file.
        source: Its local tensors, by name.
        rows: Name → the tensor as this rank describes it.
        beside: Entries other than tensors.
        mappings: The dicts in it that hold others, of two levels.
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
                    f"{shorten(repr(name))} was cut for {found.world} ranks, and the files are those of {world}"
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
        """Name and node of every tensor; of other entries, a copy or a description."""
        root = self.archive.root
        if type(root) is not dict:
            raise self._error(f"a rank's file should hold a state dict, and holds {describe(root)}")
        left = [limits.PICKLE_OPERATIONS]
        budget = [_NODES]
        stack: list[tuple[str, int, Iterator[tuple[Any, Any]]]] = [("", 0, iter(root.items()))]
        while stack:
            prefix, depth, children = stack[-1]
            for key, node in children:
                left[0] -= 1
                name = f"{prefix}{component_of(key)}"
                if left[0] < 0 or len(name) > limits.NAME_LENGTH or depth > limits.NESTING:
                    raise LimitExceeded("parts of it are shared or nested beyond any state dict", where=self.path)
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
    """The tensors of all ranks; of each sharded one, all parts.

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
                    f"rank {rank.rank} holds {shorten(repr(name))} as {_said(row)}, and rank {known.rank} as "
                    f"{_said(known)}",
                    where=path,
                )
            if known.shards is not None and row.shards is not None:
                known.shards += row.shards
    for name, row in rows.items():
        if row.shards is None:
            continue
        # Ranks that hold the same part are replicas of it: the first is read.
        first = {str(shard.box): shard for shard in reversed(row.shards)}
        row.shards = sorted(first.values(), key=lambda shard: shard.box)
        wrong = fault(row.shape or (), [shard.box for shard in row.shards])
        if wrong is not None:
            raise FileFormatError(f"{shorten(repr(name))} {wrong}", where=path)
    return rows


def _said(row: Row) -> str:
    return f"{row.dtype} {list(row.shape or ())}{'' if row.shards is None else ', sharded'}"
