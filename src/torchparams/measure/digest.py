"""Digests of tensors and of sets of them, and what they tell: which tensors are there more than once."""

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
    Report,
    Row,
    Table,
    Text,
    cut,
    human_bytes,
    human_shape,
    plural,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.engines.base import Engine, Progress
    from torchparams.info import ParameterInfo
    from torchparams.measure.lost import Lost
    from torchparams.sources.base import Source


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: in which source, under which name."""

    source: str
    name: str


@dataclass(frozen=True, slots=True)
class SameContent:
    """Tensors of the same dtype, shape and elements.

    Attributes:
        digest: Of each of them.
        dtype: Their element type.
        shape: Their shape.
        nbytes: Bytes of one of them.
        copies: For each copy of the bytes, the places that share it: a tied tensor is one copy with several places.
    """

    digest: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    copies: tuple[tuple[Place, ...], ...]

    @property
    def extra_bytes(self) -> int:
        """Bytes that all copies but one take."""
        return self.nbytes * (len(self.copies) - 1)

    def to_json(self) -> dict[str, Any]:
        """The group, with its places by copy."""
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
    """What `digest` finds out.

    Attributes:
        source: What the source is called.
        format: Its format.
        tensors: Name → tensor and digest, in the source's order.
        digest: The digest of the set: 64 hexadecimal digits.
        left_out: State that belongs to the source and is not part of the digest.
        lost: What casts within rows lost, of a source that is not written yet: name → losses.
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
        """The tensors that are there more than once, the most costly first."""
        return same_content([self])

    def table_rows(self) -> list[TensorDigest]:
        """The tensors, in order."""
        return list(self.tensors.values())

    def manifest(self) -> dict[str, Any]:
        """What `write` writes: `format`, `version`, `source`, `digest` and `tensors`."""
        return document_of(self.source, self.digest, self.tensors.values())

    def write(self, path: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write the manifest to a file, as a whole or not at all; an earlier manifest is replaced.

        Returns:
            A sentence on what the new file could not take over from the earlier one, if there is such.

        Raises:
            WriteError: Writing failed, or something that is no manifest is there.
        """
        return write_manifest(self.manifest(), os.fspath(path))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Digests:
        """The digests in a manifest.

        Raises:
            SourceError: The file cannot be read.
            FileFormatError: It is no manifest, or contradicts itself.
            LimitExceeded: It is longer than `limits.MANIFEST_BYTES`.
        """
        source, tensors, made = read_manifest(os.fspath(path))
        return cls(source, "manifest", tensors, made)

    def to_json(self) -> dict[str, Any]:
        """The manifest, with `same_content` and `left_out` beside it."""
        return {
            **self.manifest(),
            "same_content": [group.to_json() for group in self.same_content],
            "left_out": [each.to_json() for each in self.left_out],
        }

    def report(self, limit: int | None = None) -> Report:
        """The tensors with their digests, then the set's, then what is there more than once.

        Args:
            limit: Most rows of a table; None for all.
        """
        return Report((*self._listing(limit), *_same_parts(self.same_content, limit, several=False)))

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

    def _shown(self) -> Report:
        return self.report(ROWS_SHOWN)


@dataclass(frozen=True, repr=False)
class Duplicates(Result):
    """What `duplicates` finds out.

    Attributes:
        sources: The digests of each source, under labels that differ.
        same_content: The tensors that are there more than once, in one source or in several; the most costly first.
    """

    sources: tuple[Digests, ...]
    same_content: tuple[SameContent, ...]

    @property
    def extra_bytes(self) -> int:
        """Bytes that would be free if every tensor were there once."""
        return sum(group.extra_bytes for group in self.same_content)

    def to_json(self) -> dict[str, Any]:
        """The manifests of the `sources`, `same_content` and `extra_bytes`."""
        return {
            "sources": [digests.manifest() for digests in self.sources],
            "same_content": [group.to_json() for group in self.same_content],
            "extra_bytes": self.extra_bytes,
        }

    def report(self, limit: int | None = None) -> Report:
        """Each source's tensors with their digests, then what is there more than once.

        Args:
            limit: Most rows of a table; None for all.
        """
        parts: list[Text | Table] = []
        for digests in self.sources:
            parts += [*([Text("")] if parts else []), *digests._listing(limit)]
        found = _same_parts(self.same_content, limit, several=len(self.sources) > 1)
        return Report((*parts, *(found or [Text(""), Text("No two tensors are the same.", "dim")])))

    def _shown(self) -> Report:
        return self.report(ROWS_SHOWN)


@paused_gc()  # some objects for each tensor, and no cycles
def digest(
    x: object,
    selector: object = None,
    *,
    strict: bool = True,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Digests:
    """A digest of every tensor and one of them all: equal for the same weights, whatever holds them.

    Of a live model, buffers belong to it as they do to its state dict, those that are registered with
    `persistent=False` left out: the digest of a model is that of the file its state dict was saved to. A `Parameters`
    is taken as it stands. Of a quantised parameter, the tensors that it is stored in are digested. The bytes that a
    digest is made of are described in `torchparams.measure.hashing`.

    Args:
        x: Anything that has parameters.
        selector: Only these; None for all.
        strict: Refuse a selector of which any union branch hits nothing.
        engine: What reads; unless given, the threads of this process, which map files block by block. Whoever makes
            the file shorter meanwhile may end the process. A `torchparams.engines.ThreadEngine()` reads instead: it
            reports an error then.
        progress: Told bytes done and bytes in all.

    Raises:
        NoMatch: A branch of the selector hits nothing.
        NotReadable: A tensor has no values: it is lazy, on the meta device, sparse or quantised. Or a module of a live
            model keeps state outside its parameters and buffers, which a digest would not notice.
        SourceError: A file was written to while it was read.

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
            f"{in_words(beside)}; without that state, different models would have one digest",
            where=params.source.label,
            hint=f"{STATE_DICT_HINT}; or select what such modules do not hold",
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
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Duplicates:
    """Tensors that are there more than once, in one source or in several: tied ones and copies told apart.

    Args:
        xs: Anything that has parameters, each read as by `digest`.
        selector: Only these of each; None for all.
        strict: Refuse a selector of which any union branch hits nothing in one of them.
        engine: What reads, as for `digest`.
        progress: Told bytes done and bytes in all, of one source after the other.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> a, b = np.arange(3), np.arange(3)
    >>> [group.extra_bytes for group in tp.duplicates({"embed": a, "head": a}, {"embed": b}).same_content]
    [24]
    """
    found: list[Digests] = []
    labels: dict[str, int] = {}
    for x in xs:
        made = digest(x, selector, strict=strict, engine=engine, progress=progress)
        count = labels[made.source] = labels.get(made.source, 0) + 1
        label = made.source if count == 1 else f"{made.source} ({count})"
        found.append(replace(made, source=label))
    return Duplicates(tuple(found), same_content(found))


def same_content(sources: Sequence[Digests]) -> tuple[SameContent, ...]:
    """The tensors of sources that are there more than once, the most costly first."""
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


# --- which tensors ---------------------------------------------------------------------------


def chosen(x: object, selector: object, *, strict: bool) -> Parameters:
    """The table that is digested of `x`: of tensors as they are stored.

    What a state dict does not hold is left out, unless it is a table already.
    """
    params = of(x, buffers=True)
    if not isinstance(x, Parameters) and not all(info.persistent for info in params.infos.values()):
        params = params.filter(lambda info: info.persistent)
    return stored(params if selector is None else params.select(selector, strict=strict))


class _Memory:
    """Tells which tensors are the same bytes in the same place."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: dict[str, Any] = {}
        self._where: str | None = None

    def of(self, info: ParameterInfo) -> str | None:
        """Equal for the same bytes; None where it is not known.

        It is a text, as a file could choose numbers of which Python's hashes collide.
        """
        if not info.nbytes:
            return None
        view = info.storage
        # The step along a dimension of one element means nothing.
        pairs = () if view is None else zip(info.shape or (), view.stride, strict=True)
        steps = tuple(step for size, step in pairs if size > 1)
        if info.location is not None:
            return f"{self._file(info.location.file)} {info.location.start} {steps}"
        if view is not None:
            if self._where is None:  # no file for what is in memory, which has one address for all sources
                self._where = "".join(f"{self._file(path)}" for path in self._source.files)
            return f"{self._where} {view.key} {view.offset * info.dtype.bits} {steps}"
        return None

    def _file(self, path: str) -> Any:
        # A file has several names: links, and paths from different directories.
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
    """The section on what is there more than once; nothing where there is no such thing."""
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
