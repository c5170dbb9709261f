"""Compute digests of tensors and of whole sources, and find duplicate tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable
from torchparams.io.filebytes import paused_gc
from torchparams.left_out import STATE_DICT_HINT, LeftOut, in_words, left_out_lines
from torchparams.measure.hashing import COLUMNS, TensorDigest, encoded_as, set_digest, tensor_digests
from torchparams.measure.lost import lines
from torchparams.measure.manifest import document_of, read_manifest, write_manifest
from torchparams.parameters import Parameters, of, stored
from torchparams.render.result import Result
from torchparams.render.rows import ALIASES_SHOWN, ROWS_SHOWN
from torchparams.render.tabular import Tabular
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    human_bytes,
    human_shape,
    plural,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.engines.base import Engine, Progress
    from torchparams.info import ParameterInfo
    from torchparams.measure.lost import Lost
    from torchparams.sources.base import Source


@dataclass(frozen=True, slots=True)
class Place:
    """Source and name of a tensor."""

    source: str
    name: str


@dataclass(frozen=True, slots=True)
class SameContent:
    """Tensors with the same dtype, shape and elements.

    Attributes:
        digest: Digest of each tensor.
        dtype: Dtype of each.
        shape: Shape of each.
        nbytes: Bytes of one copy.
        copies: Tensors that share memory, for each copy of the bytes. A tied tensor is one copy with several names.
    """

    digest: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    copies: tuple[tuple[Place, ...], ...]

    @property
    def extra_bytes(self) -> int:
        """Bytes of all copies except one."""
        return self.nbytes * (len(self.copies) - 1)

    def to_json(self) -> dict[str, Any]:
        """The group as JSON data."""
        return {
            "digest": self.digest,
            "dtype": str(self.dtype),
            "shape": list(self.shape),
            "nbytes": self.nbytes,
            "extra_bytes": self.extra_bytes,
            "copies": [[{"source": at.source, "name": at.name} for at in copy] for copy in self.copies],
        }


@dataclass(frozen=True, repr=False)
class Digests(Result, Tabular):
    """Digests of a source, the result of `digest`.

    Attributes:
        source: Label of the source.
        format: Format of the source.
        tensors: Digest of each tensor by name, in source order.
        digest: Digest of the whole set: 64 hexadecimal digits.
        left_out: State of the source that is not part of the digest.
        lost: Losses of casts in a plan that is not written yet, by name.
    """

    columns = COLUMNS

    source: str
    format: str
    tensors: Mapping[str, TensorDigest]
    digest: str
    left_out: tuple[LeftOut, ...] = ()
    lost: Lost = field(default_factory=dict)

    @property
    def same_content(self) -> tuple[SameContent, ...]:
        """Duplicate tensors, largest extra size first."""
        return same_content([self])

    def table_rows(self) -> list[TensorDigest]:
        """Tensors in order."""
        return list(self.tensors.values())

    def manifest(self) -> dict[str, Any]:
        """Manifest that `write` writes: `format`, `version`, `source`, `digest` and `tensors`."""
        return document_of(self.source, self.digest, self.tensors.values())

    def write(self, path: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write the manifest to a file, atomically. An existing manifest is replaced.

        Returns:
            Sentences about file attributes that could not be kept from the old file.

        Raises:
            WriteError: Writing failed, or the existing file is not a manifest.
        """
        return write_manifest(self.manifest(), os.fspath(path))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Digests:
        """Read digests from a manifest.

        Raises:
            SourceError: The file cannot be read.
            FileFormatError: The file is not a manifest, or is inconsistent.
            LimitExceeded: The file is longer than `limits.MANIFEST_BYTES`.
        """
        source, tensors, made = read_manifest(os.fspath(path))
        return cls(source, "manifest", tensors, made)

    def to_json(self) -> dict[str, Any]:
        """The manifest, with `same_content` and `left_out`."""
        return {
            **self.manifest(),
            "same_content": [group.to_json() for group in self.same_content],
            "left_out": [each.to_json() for each in self.left_out],
        }

    def tree(self, limit: int | None = None) -> Tree:
        """Tree of the digests of the tensors, of the set, and of duplicates.

        Args:
            limit: Maximum number of rows per table; None for all.
        """
        return Tree((*self._listing(limit), *_same_parts(self.same_content, limit, several=False)))

    def _listing(self, limit: int | None) -> Iterator[Text | Table]:
        yield Text(printable(f"{self.source} ({self.format})"), "title")
        columns = (
            Column("name", style="name", shrink=True),
            Column("shape", drop=2),
            Column("dtype", style="dtype", drop=1),
            Column("digest", shrink=True, yields=True),
        )
        rows = [Row((_tied(t.names), human_shape(t.shape), str(t.dtype), t.digest)) for t in self.tensors.values()]
        yield Table(columns, cut(rows, limit, "tensors"))
        size = human_bytes(sum(t.nbytes for t in self.tensors.values()))
        yield Text(f"{plural(len(rows), 'tensor')} · {size} · digest of the set:", "dim")
        yield Text(self.digest)
        yield from left_out_lines(self.left_out)
        yield from lines(self.lost)

    def _shown(self) -> Tree:
        return self.tree(ROWS_SHOWN)


@dataclass(frozen=True, repr=False)
class Duplicates(Result):
    """Duplicate tensors, the result of `duplicates`.

    Attributes:
        sources: Digests of each source, under unique labels.
        same_content: Duplicate tensors, in one source or across sources; largest extra size first.
    """

    sources: tuple[Digests, ...]
    same_content: tuple[SameContent, ...]

    @property
    def extra_bytes(self) -> int:
        """Bytes of all copies except one of each tensor."""
        return sum(group.extra_bytes for group in self.same_content)

    def to_json(self) -> dict[str, Any]:
        """The manifests of the `sources`, with `same_content` and `extra_bytes`."""
        return {
            "sources": [digests.manifest() for digests in self.sources],
            "same_content": [group.to_json() for group in self.same_content],
            "extra_bytes": self.extra_bytes,
        }

    def tree(self, limit: int | None = None) -> Tree:
        """Tree of the digests of each source, and of duplicates.

        Args:
            limit: Maximum number of rows per table; None for all.
        """
        parts: list[Text | Table] = []
        for digests in self.sources:
            parts += [*([Text("")] if parts else []), *digests._listing(limit)]
        return Tree((*parts, *self.shared(limit).parts))

    def shared(self, limit: int | None = None) -> Tree:
        """Tree of duplicates alone."""
        found = _same_parts(self.same_content, limit, several=len(self.sources) > 1)
        return Tree(tuple(found or [Text(""), Text("No duplicate tensors.", "dim")]))

    def _shown(self) -> Tree:
        return self.tree(ROWS_SHOWN)


@paused_gc()  # many objects, no cycles
def digest(
    x: object,
    selector: object = None,
    *,
    strict: bool = True,
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Digests:
    """Compute a digest of every tensor, and of all together: equal weights give equal digests in every format.

    A live model is read like its state dict, including persistent buffers: its digest equals that of a file saved from
    its state dict. A `Parameters` is read as it is. For a quantised parameter, the stored tensors are digested.
    `torchparams.measure.hashing` describes the exact bytes.

    Of sharded parameters, all their ranks make the call: the lowest fetches the elements in messages, a few megabytes
    at a time, and every rank gets the digests (six collectives).

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`.
        selector: Tensors to include; None for all.
        strict: Raise if any branch of a selector matches nothing.
        engine: Engine to run on, or its name (`ray`); by default, threads that memory-map files. If another program
            truncates a mapped file, the process may be killed; `torchparams.engines.ThreadEngine()` reads instead, and
            raises an error.
        progress: Callback with the bytes read so far and in total.

    Raises:
        NoMatch: A branch of the selector matches nothing.
        NotReadable: A tensor has no values: it is lazy, on the meta device, sparse or quantised. Or a module of a live
            model keeps state outside its parameters and buffers, which the digest would miss.
        SourceError: A file changed while it was read.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> weights = {"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
    >>> tp.digest(weights).tensors["fc.bias"].digest[:16]
    '43e81dd040c64abf'
    >>> tp.digest(weights).digest == tp.digest(dict(reversed(weights.items()))).digest
    True
    """
    params = chosen(x, selector, strict=strict)
    beside = params.left_out
    if any(each.live for each in beside):
        raise NotReadable(
            f"{in_words(beside)}; different models could have the same digest without it",
            where=params.source.label,
            hint=f"{STATE_DICT_HINT}; or select tensors outside these modules",
        )
    infos = params.infos
    hashed, lost = tensor_digests(params.source, infos.values(), engine=engine, progress=progress)
    memory = _Memory(params.source)
    tensors: dict[str, TensorDigest] = {}
    for name, info in infos.items():
        dtype, shape = encoded_as(info)
        tensors[name] = TensorDigest(name, dtype, shape, info.nbytes, hashed[name], info.aliases, memory.of(info))
    pairs = ((name, tensor.digest) for tensor in tensors.values() for name in tensor.names)
    return Digests(params.source.label, params.source.format, tensors, set_digest(pairs), beside, lost)


def duplicates(
    *xs: object,
    selector: object = None,
    strict: bool = True,
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Duplicates:
    """Find duplicate tensors in one or more sources. Tied tensors are told apart from copies.

    Of sharded parameters, all their ranks make the call, as for `digest`.

    Args:
        xs: Models, checkpoints or mappings of tensors, read as in `digest`.
        selector: Tensors to include; None for all.
        strict: Raise if any branch of a selector matches nothing in one of the sources.
        engine: Engine to run on; see `digest`.
        progress: Callback with the bytes read so far and in total, for each source in turn.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> a, b = np.arange(3), np.arange(3)
    >>> [group.extra_bytes for group in tp.duplicates({"embed": a, "head": a}, {"embed": b}).same_content]
    [24]
    """
    return duplicates_among(digest(x, selector, strict=strict, engine=engine, progress=progress) for x in xs)


def duplicates_among(digests: Iterable[Digests]) -> Duplicates:
    """Duplicate tensors among digests that are there already."""
    found: list[Digests] = []
    labels: dict[str, int] = {}
    for made in digests:
        count = labels[made.source] = labels.get(made.source, 0) + 1
        label = made.source if count == 1 else f"{made.source} ({count})"
        found.append(replace(made, source=label))
    return Duplicates(tuple(found), same_content(found))


def same_content(sources: Sequence[Digests]) -> tuple[SameContent, ...]:
    """Duplicate tensors of sources, largest extra size first."""
    groups: dict[str, list[tuple[str, TensorDigest]]] = {}
    for digests in sources:
        for tensor in digests.tensors.values():
            groups.setdefault(tensor.digest, []).append((digests.source, tensor))
    made = []
    for group in groups.values():
        if len(group) == 1 and not group[0][1].aliases:
            continue
        copies: dict[str | int, list[Place]] = {}
        for number, (label, tensor) in enumerate(group):
            key = number if tensor.memory is None else tensor.memory
            copies.setdefault(key, []).extend(Place(label, name) for name in tensor.names)
        first = group[0][1]
        places = tuple(map(tuple, copies.values()))
        made.append(SameContent(first.digest, first.dtype, first.shape, first.nbytes, places))
    return tuple(sorted(made, key=lambda same: -same.extra_bytes))


# --- selection -------------------------------------------------------------------------------


def chosen(x: object, selector: object, *, strict: bool) -> Parameters:
    """Table to digest: tensors as stored.

    Tensors outside the state dict are excluded, unless `x` is a `Parameters`.
    """
    params = of(x, buffers=True)
    if not isinstance(x, Parameters) and not all(info.persistent for info in params.infos.values()):
        params = params.filter(lambda info: info.persistent)
    return stored(params if selector is None else params.select(selector, strict=strict))


class _Memory:
    """Identifies tensors that share the same bytes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: dict[str, Any] = {}
        self._where: str | None = None

    def of(self, info: ParameterInfo) -> str | None:
        """Key that is equal for the same bytes; None if unknown.

        A text rather than numbers: a hostile file could choose numbers whose hashes collide.
        """
        if not info.nbytes:
            return None
        view = info.storage
        # The stride of a dimension of size 1 has no meaning.
        pairs = () if view is None else zip(info.shape or (), view.stride, strict=True)
        steps = tuple(step for size, step in pairs if size > 1)
        if info.location is not None:
            return f"{self._file(info.location.file)} {info.location.start} {steps}"
        if view is not None:
            if self._where is None:  # memory has no file, and one address space for all sources
                self._where = "".join(f"{self._file(path)}" for path in self._source.files)
            return f"{self._where} {view.key} {view.offset * info.dtype.bits} {steps}"
        return None

    def _file(self, path: str) -> Any:
        # One file can have several paths.
        if path not in self._files:
            try:
                about = os.stat(path)
                self._files[path] = (about.st_dev, about.st_ino)
            except OSError:
                self._files[path] = path
        return self._files[path]


# --- print -----------------------------------------------------------------------------------


def _tied(names: Sequence[str]) -> str:
    more = len(names) - 1 - ALIASES_SHOWN
    return " = ".join((*names[: 1 + ALIASES_SHOWN], *([f"… {more:,} more"] if more > 0 else [])))


def _same_parts(groups: Sequence[SameContent], limit: int | None, *, several: bool) -> list[Text | Table]:
    """Section on duplicates; empty if there are none."""
    if not groups:
        return []
    rows = []
    for group in groups:
        copies, places = len(group.copies), sum(map(len, group.copies))
        extra = Cell(human_bytes(group.extra_bytes), "warn" if group.extra_bytes else "dim")
        head = f"{human_shape(group.shape)} {group.dtype}, {human_bytes(group.nbytes)}"
        rows.append(Row((head, f"{places:,}", f"{copies:,}", extra)))
        rows += [Row((_tied([_place(at, several) for at in copy]), "", "", ""), depth=1) for copy in group.copies]
    columns = (
        Column("same content", style="name", shrink=True),
        Column("names", right=True, style="number"),
        Column("copies", right=True, style="number"),
        Column("extra", right=True),
    )
    extra_bytes = sum(group.extra_bytes for group in groups)
    total = f"{plural(len(groups), 'tensor')} under several names; copies cost {human_bytes(extra_bytes)}"
    return [Text(""), Table(columns, cut(rows, limit, "rows"), tree=True), Text(total, "dim")]


def _place(at: Place, several: bool) -> str:
    return f"{at.source}: {at.name}" if several else at.name
