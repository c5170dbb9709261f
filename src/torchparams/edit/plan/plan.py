"""What is to be written, checked whole before a byte is: every name, shape, type and size, and what gets lost."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.edit.plan.layout import Output, View, parse_bytes
from torchparams.edit.plan.written import Written, remarks
from torchparams.edit.write import safetensors_out, torchzip_out
from torchparams.edit.write.directory import check_directory
from torchparams.errors import PlanError, SourceError, shorten
from torchparams.expressions.base import Stored
from torchparams.expressions.operations import Cast
from torchparams.io.packing import contiguous
from torchparams.io.write import STEM, check_target, free_or_raise
from torchparams.render.result import Result
from torchparams.render.tree import (
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
    from collections.abc import Iterable, Mapping

    from torchparams.edit.plan.layout import FileLayout
    from torchparams.engines.base import Progress
    from torchparams.sources.base import Source

MEMORY = 256 << 20
"""Bytes of memory that running a plan may take for tensors, unless told otherwise."""

SAFETENSORS, TORCH_ZIP, VIEW = "safetensors", "torch zip", "view"
_SUFFIXES = {".safetensors": SAFETENSORS, **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), TORCH_ZIP)}
_ROWS_SHOWN = 40


class Plan(Result):
    """Tensors that are computed from those of sources, and the file or directory that they will be written to.

    Making one checks everything that can be known without reading values; nothing is written before `run`. Printing it
    shows it. Every verb that reads takes a plan as it takes a file: `torchparams.stats(plan)` are the statistics that
    the file will have. Without a path it is a view only.

    Args:
        outputs: The tensors, in the order in which the target lists them.
        path: The target: a file that ends in `.safetensors`, or in `.pt`, `.pth`, `.bin` or `.ckpt`; or a directory,
            for safetensors in one file or in shards. None for a view only.
        format: `safetensors` or `torch zip`; what the path's suffix says unless given.
        views: Further names of bytes that are among the outputs; only for a torch zip.
        metadata: What a safetensors file says beside its tensors.
        max_shard_size: Most bytes of tensors in one file, as a number or as `5GB`; only for a directory.
        memory: Bytes of memory that tensors may take while it runs.
        overwrite: Replace what is there, once the new is complete; of a link, that is the link alone.
        allow_overflow: Accept casts under which finite values become infinite.
        dropped: What of the sources is not written, and why: for printing.
        notes: What else there is to say.
        index_metadata: What the index of a set of shards says beside the names.
        config_json: The `config.json` that a directory gets, as text; None for none.

    Attributes:
        files: How each file of the target is laid out.
        sources: The sources of all tensors.

    Raises:
        PlanError: Two outputs have one name; the format cannot hold one of them; something is at the target, or the
            target is a source; it does not fit the disk or the memory.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.expressions.operations import Linear
    >>> from torchparams.testing import MemorySource
    >>> a, b = (MemorySource({"w": np.full(3, value, np.float32)}) for value in (1, 3))
    >>> plan = Plan([Output("w", Linear([Stored(a, "w"), Stored(b, "w")], [0.5, 0.5]))], "/tmp/mean.safetensors")
    >>> [(output.name, output.expression.summary()) for output in plan.outputs], plan.nbytes
    ([('w', '[0.5, 0.5]·w')], 12)
    """

    def __init__(
        self,
        outputs: Iterable[Output],
        path: str | os.PathLike[str] | None = None,
        *,
        format: str | None = None,
        views: Iterable[View] = (),
        metadata: Mapping[str, Any] | None = None,
        max_shard_size: int | str | None = None,
        memory: int | str = MEMORY,
        overwrite: bool = False,
        allow_overflow: bool = False,
        dropped: Iterable[tuple[str, str]] = (),
        notes: Iterable[str] = (),
        index_metadata: Mapping[str, Any] | None = None,
        config_json: str | None = None,
    ) -> None:
        self.outputs = tuple(outputs)
        self.views = tuple(views)
        self.path = "" if path is None else os.fspath(path)
        self.is_view = path is None
        self.is_directory, self.format = kind_of(path, format)
        self.metadata = dict(metadata or {})
        self.index_metadata = dict(index_metadata or {})
        self.config_json = config_json
        self.max_shard_size = None if max_shard_size is None else parse_bytes(max_shard_size)
        self.memory = parse_bytes(memory)
        self.overwrite = overwrite
        self.allow_overflow = allow_overflow
        self.dropped = tuple(dropped)
        self.notes = tuple(notes)
        self._check_names()
        self._check_memory()
        self.files, self.index = self._lay_out()
        sources = {id(leaf.source): leaf.source for output in self.outputs for leaf in output.expression.leaves()}
        self.sources: tuple[Source, ...] = tuple(sources.values())
        self.fingerprint = self._look()
        self.check()

    # --- checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Hold the target against the disk as it is now.

        Raises:
            PlanError: Something is there that may not be replaced, it is a source, or there is no room.
            SourceError: A source was written to since the plan was made.
        """
        self.check_sources()
        if self.is_view:
            return
        target = self.path.rstrip("/" + os.sep) or self.path
        check_target(target)
        if os.path.lexists(target):
            is_directory = os.path.isdir(target)
            if is_directory != self.is_directory:
                kind, other = ("a directory", "a file") if is_directory else ("a file", "a directory")
                raise PlanError(f"it is {kind}, and {other} is to be written", where=target, hint="name another target")
            if not is_directory and os.path.exists(target) and not os.path.isfile(target):
                raise PlanError("it is neither a file nor a directory", where=target, hint="name another target")
            if not self.overwrite:
                self._refuse_source()
            if self.is_directory:
                check_directory(target, self.overwrite)
            elif not self.overwrite:
                raise PlanError(
                    "it exists already",
                    where=target,
                    hint="to replace it once the new one is complete, pass overwrite=True (--force)",
                )
        folder = target if os.path.isdir(target) else os.path.dirname(target) or "."
        if not os.path.isdir(folder):
            raise PlanError("there is no such directory", where=folder, hint=f"make it first: mkdir -p {folder}")
        free_or_raise(folder, self.file_bytes, target)

    def check_sources(self) -> None:
        """Refuse to go on where a source was written to.

        Raises:
            SourceError: Its size or its time of modification is another than when the plan was made.
        """
        before = self.fingerprint
        for (path, *was), (_, *now) in zip(before, self._look(), strict=True):
            if was != now:
                raise SourceError(
                    "the file was written to since the plan was made",
                    where=path,
                    hint="open it anew, and make the plan again",
                )

    def _look(self) -> tuple[tuple[str, int, int], ...]:
        found: list[tuple[str, int, int]] = []
        for source in self.sources:
            try:
                found += source.fingerprint()
            except OSError as error:
                raise SourceError(error.strerror or str(error), where=error.filename or source.label) from None
        return tuple(found)

    def _refuse_source(self) -> None:
        if not os.path.exists(self.path):
            return  # a link that leads nowhere
        for path, _, _ in self.fingerprint:
            place = os.path.dirname(path) or "." if self.is_directory else path
            if os.path.exists(place) and os.path.samefile(place, self.path):
                raise PlanError(
                    "the target is a source" if not self.is_directory else "the target is the directory of a source",
                    where=self.path,
                    hint="write elsewhere; or, to replace it once the new one is complete, "
                    "pass overwrite=True (--force)",
                )

    def _check_names(self) -> None:
        seen: set[str] = set()
        for name in [entry.name for entry in self.outputs] + [view.name for view in self.views]:
            if name in seen:
                raise PlanError(f"two tensors would be named {shorten(repr(name))}", where=self.path, hint="rename one")
            if not name:
                raise PlanError("a tensor would have an empty name", where=self.path, hint="rename it")
            if len(name) > limits.NAME_LENGTH:
                raise PlanError(
                    f"the name {shorten(repr(name))} has {len(name):,} characters; the limit is {limits.NAME_LENGTH:,}",
                    where=self.path,
                    hint="rename it, or raise torchparams.limits.NAME_LENGTH",
                )
            seen.add(name)
        if self.format == SAFETENSORS:
            assert not self.views  # whoever makes a plan knows what the format can express
            for key, value in self.metadata.items():
                if not isinstance(key, str) or not isinstance(value, str):
                    raise PlanError(
                        f"the metadata of a safetensors file is text, and {key!r} is {shorten(repr(value))}",
                        where=self.path,
                    )
        elif self.metadata and not self.is_view:
            raise PlanError(
                "a torch file of tensors holds no metadata", where=self.path, hint="write a .safetensors file"
            )

    def _check_memory(self) -> None:
        for output in self.outputs:
            held = sum(part.resident for part in output.expression.walk())
            if held > self.memory:
                raise PlanError(
                    f"it takes {human_bytes(held)} in memory, and the ceiling is {human_bytes(self.memory)}",
                    where=shorten(repr(output.name)),
                    hint="raise it: memory=… (--memory)",
                )

    def _lay_out(self) -> tuple[tuple[FileLayout, ...], bytes | None]:
        if self.is_view:
            if self.max_shard_size is not None:
                raise PlanError("max_shard_size is for a directory, and the plan has no path", hint="pass path='out/'")
            return (), None
        name = os.path.basename(self.path)
        if self.format == TORCH_ZIP:
            if self.max_shard_size is not None:
                raise PlanError(
                    "only safetensors are written in shards here", where=self.path, hint="name a directory: out/"
                )
            return (torchzip_out.lay_out(name, self.outputs, self.views),), None
        if not self.is_directory:
            if self.max_shard_size is not None:
                raise PlanError(
                    "shards and their index are a directory, and this names a file",
                    where=self.path,
                    hint=f"write {self.path.removesuffix('.safetensors')}/",
                )
            return (safetensors_out.lay_out(name, self.outputs, self.metadata),), None
        shards = safetensors_out.in_shards(self.outputs, self.max_shard_size)
        if len(shards) == 1:
            return (safetensors_out.lay_out(f"{STEM}.safetensors", shards[0], self.metadata),), None
        names = [safetensors_out.shard_name(number + 1, len(shards)) for number in range(len(shards))]
        files = tuple(
            safetensors_out.lay_out(file, shard, self.metadata) for file, shard in zip(names, shards, strict=True)
        )
        places = {output.name: file for file, shard in zip(names, shards, strict=True) for output in shard}
        return files, safetensors_out.index_of(places, self.nbytes, self.index_metadata)

    # --- what it says ------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.expression.nbytes for output in self.outputs)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files) + len(self.index or b"")

    @property
    def copied(self) -> int:
        """Bytes that go from file to file as they are."""
        return sum(o.expression.nbytes for o in self.outputs if o.expression.spans() is not None)

    def report(self, *, limit: int | None = _ROWS_SHOWN) -> Report:
        """The plan as a report.

        Args:
            limit: Most tensors shown; None for all.
        """
        columns = (
            Column("name", style="name", shrink=True),
            Column("shape", drop=2),
            Column("dtype", style="dtype"),
            Column("size", right=True, drop=1),
            Column("from", shrink=True, yields=True),
        )
        rows = [
            Row((o.name, human_shape(o.expression.shape), str(o.expression.dtype), human_bytes(o.expression.nbytes),
                 self._origin(o)))
            for o in self.outputs
        ]  # fmt: skip
        rows += [Row((v.name, human_shape(v.shape), str(v.dtype), "", f"shares {v.base}")) for v in self.views]
        count = len(self.outputs) + len(self.views)
        files = f" in {plural(len(self.files), 'file')}" if len(self.files) > 1 else ""
        copied = self.copied
        parts: list[Text | Table] = [
            Text(
                printable(f"plan: {self.path} ({self.format})" if self.path else "plan: a view, with no path"), "title"
            ),
            Table(columns, cut(rows, limit, "tensors")),
            Text(
                f"{plural(count, 'tensor')} · {human_bytes(self.file_bytes or self.nbytes)}{files}"
                + (f" · {human_bytes(copied)} copied as they are" if copied else "")
                + (f" · {human_bytes(self.nbytes - copied)} computed" if copied < self.nbytes else ""),
                "dim",
            ),
        ]
        return Report((*parts, *remarks(self.dropped, self.notes)))

    def _origin(self, output: Output) -> str:
        x = output.expression
        if not isinstance(x, Stored) or x.info.name != output.name:
            return x.summary()
        return "as it is" if len(self.sources) == 1 else f"as it is in {x.source.label}"

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON takes it."""
        places = {name: file.name for file in self.files for name in file.offsets}
        return {
            "path": self.path or None,
            "format": self.format,
            "nbytes": self.nbytes,
            "file_bytes": self.file_bytes,
            "copied_bytes": self.copied,
            "files": [{"name": file.name, "nbytes": file.size} for file in self.files],
            "tensors": [
                {
                    "name": output.name,
                    "shape": list(output.expression.shape),
                    "dtype": str(output.expression.dtype),
                    "nbytes": output.expression.nbytes,
                    "file": places.get(output.name),
                    "from": output.expression.to_json(),
                }
                for output in self.outputs
            ],
            "views": [
                {
                    "name": view.name,
                    "base": view.base,
                    "dtype": str(view.dtype),
                    "shape": list(view.shape),
                    "offset": view.offset,
                    "stride": list(view.stride),
                }
                for view in self.views
            ],
            "metadata": self.metadata,
            "dropped": [{"name": name, "why": why} for name, why in self.dropped],
            "notes": list(self.notes),
        }

    def _title(self) -> str:
        return f"Plan of {self.path}"

    def casts(self) -> list[tuple[Output, Cast]]:
        """Every cast in it, with the output that it is a part of."""
        return [(output, x) for output in self.outputs for x in output.expression.walk() if isinstance(x, Cast)]

    # --- a source ----------------------------------------------------------------------------------

    def __torchparams_source__(self) -> Source:
        """The tensors as a source: what the file will hold."""
        from torchparams.expressions.strided import Strided
        from torchparams.sources.view import ViewSource

        rows = {output.name: output.expression for output in self.outputs}
        aliases: dict[str, tuple[str, ...]] = {}
        for view in self.views:
            base = rows[view.base]
            whole = (base.dtype, base.shape, 0, contiguous(base.shape))
            if (view.dtype, view.shape, view.offset, view.stride) == whole:
                aliases[view.base] = (*aliases.get(view.base, ()), view.name)
            else:
                rows[view.name] = Strided(base, view.dtype, view.shape, view.offset, view.stride)
        label = f"plan of {self.path}" if self.path else "plan"
        return ViewSource(rows.items(), label=label, aliases=aliases, metadata=self.metadata)

    # --- run ---------------------------------------------------------------------------------------

    def run(self, progress: Progress | None = None) -> Written:
        """Write it: all of it, or nothing.

        Args:
            progress: Told bytes of tensors that are written so far, and of all of them.

        Returns:
            What was written, how long it took, and what casts lost.

        Raises:
            PlanError: The target is not as it was; or finite values would become infinite.
            SourceError: A source was written to while it was read, or cannot be read.
            WriteError: The disk said no. The target is as it was.
        """
        if self.is_view:
            raise PlanError("the plan has no path to write to", hint="make it with path=…")
        from torchparams.edit.write.execute import execute

        return execute(self, progress)


def kind_of(target: str | os.PathLike[str] | None, format: str | None) -> tuple[bool, str]:
    """Whether a target is a directory, and its format; that of no target is `VIEW`."""
    spelled = {"safetensors": SAFETENSORS, "torch zip": TORCH_ZIP, "torch": TORCH_ZIP, None: None}
    if format not in spelled:
        raise PlanError(f"no format is called {format!r}", exists="there are 'safetensors' and 'torch zip'")
    if target is None:
        if format is not None:
            raise PlanError(f"format={format!r} needs a path to write to", hint="pass path=…")
        return False, VIEW
    path = os.fspath(target)
    if not path:
        raise PlanError("a target has a name, and this is an empty text")
    wanted = spelled[format]
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1]
    if path.endswith(("/", os.sep)) or os.path.isdir(path) or (not suffix and not os.path.exists(path)):
        if wanted == TORCH_ZIP:
            raise PlanError("a torch zip is a file, and this names a directory", where=path, hint="end it in .pt")
        return True, SAFETENSORS
    if wanted is not None:
        return False, wanted
    if suffix not in _SUFFIXES:
        raise PlanError(
            f"the suffix {suffix!r} says no format" if suffix else "it has no suffix that says its format",
            where=path,
            exists=f"known are {' '.join(_SUFFIXES)}",
            hint=None if re.search(r"[\0]", path) else f"for a directory of safetensors, write {path}/",
        )
    return False, _SUFFIXES[suffix]
