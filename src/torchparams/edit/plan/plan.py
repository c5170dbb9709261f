"""Plans: outputs checked as a whole (names, shapes, dtypes, sizes, losses) before any byte is written."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.edit.plan.layout import Output, View, parse_bytes
from torchparams.edit.plan.written import Written, remarks
from torchparams.edit.write import safetensors_out, torchzip_out
from torchparams.edit.write.directory import check_directory
from torchparams.errors import OptionError, PlanError, SourceError, shorten
from torchparams.expressions.base import Stored
from torchparams.expressions.operations import Cast
from torchparams.io.packing import contiguous
from torchparams.io.write import STEM, check_target, free_or_raise
from torchparams.render.result import Result
from torchparams.render.tree import (
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
    from collections.abc import Iterable, Mapping

    from torchparams.edit.plan.layout import FileLayout
    from torchparams.engines.base import Engine, Progress
    from torchparams.expressions.base import Readable
    from torchparams.sources.base import Source

MEMORY = 256 << 20
"""Default memory limit for tensors while a plan runs, in bytes."""

SAFETENSORS, TORCH_ZIP, VIEW = "safetensors", "torch zip", "view"
_SUFFIXES = {".safetensors": SAFETENSORS, **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), TORCH_ZIP)}
_ROWS_SHOWN = 40


class Plan(Result):
    """A set of output tensors, and the file or directory to write them to.

    Creating a plan checks everything that needs no tensor values; only `run` writes. `print(plan)` shows it. Every verb
    that reads accepts a plan: `torchparams.stats(plan)` gives the statistics of the file before it is written. Without
    a path, a plan is only a view.

    Args:
        outputs: Output tensors, in target order.
        path: Target: a file with the suffix `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt`; or a directory, for
            safetensors in one file or in shards. None for a view.
        format: `safetensors` or `torch zip`; by default, follows the suffix of the path.
        views: Other tensors over the bytes of outputs; torch zip only.
        metadata: Metadata for a safetensors file.
        max_shard_size: Maximum bytes of tensors per file, a number or a text such as `5GB`; directories only.
        memory: Memory limit for tensors during the run, in bytes.
        overwrite: Replace an existing target, once the new one is complete. A symbolic link is replaced, not its
            target.
        allow_overflow: Allow casts that turn finite values into infinity.
        dropped: Entries of the sources that are not written, each with the reason; to show.
        notes: Notes to show.
        index_metadata: Metadata for the index of a sharded checkpoint.
        config_json: Text of a `config.json` to write into the directory, or None.

    Attributes:
        files: Layout of each file of the target.
        sources: Sources of all tensors.

    Raises:
        PlanError: Two outputs have the same name; the format cannot store an output; the target exists or is a source;
            the disk or memory is too small.

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
        self.sources: tuple[Readable, ...] = tuple(sources.values())
        self.fingerprint = self._look()
        self.check()

    # --- checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the target against the current state of the disk.

        Raises:
            PlanError: The target exists and may not be replaced, is a source, or does not fit on the disk.
            SourceError: A source changed after the plan was made.
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
                raise PlanError(
                    f"it is {kind}, but the plan writes {other}", where=target, hint="choose another target"
                )
            if not is_directory and os.path.exists(target) and not os.path.isfile(target):
                raise PlanError("it is neither a file nor a directory", where=target, hint="choose another target")
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
            raise PlanError("directory not found", where=folder, hint=f"make it first: mkdir -p {folder}")
        free_or_raise(folder, self.file_bytes, target)

    def check_sources(self) -> None:
        """Raise if a source changed after the plan was made.

        Raises:
            SourceError: The size or modification time of a file changed.
        """
        before = self.fingerprint
        for (path, *was), (_, *now) in zip(before, self._look(), strict=True):
            if was != now:
                raise SourceError(
                    "the file changed after the plan was made",
                    where=path,
                    hint="open the file again, and make a new plan",
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
            return  # dangling symbolic link
        for path, _, _ in self.fingerprint:
            place = os.path.dirname(path) or "." if self.is_directory else path
            if os.path.exists(place) and os.path.samefile(place, self.path):
                raise PlanError(
                    "the target is a source" if not self.is_directory else "the target directory contains a source",
                    where=self.path,
                    hint="write elsewhere; or, to replace it once the new one is complete, "
                    "pass overwrite=True (--force)",
                )

    def _check_names(self) -> None:
        seen: set[str] = set()
        for name in [entry.name for entry in self.outputs] + [view.name for view in self.views]:
            if name in seen:
                raise PlanError(
                    f"two tensors would have the name {shorten(repr(name))}", where=self.path, hint="rename one"
                )
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
            assert not self.views  # callers create views only for formats that support them
            for key, value in self.metadata.items():
                if not isinstance(key, str) or not isinstance(value, str):
                    raise PlanError(
                        f"safetensors metadata must be text, but {key!r} is {shorten(repr(value))}",
                        where=self.path,
                    )
        elif self.metadata and not self.is_view:
            raise PlanError("a torch file cannot store metadata", where=self.path, hint="write a .safetensors file")

    def _check_memory(self) -> None:
        for output in self.outputs:
            held = sum(part.resident for part in output.expression.walk())
            if held > self.memory:
                raise PlanError(
                    f"it needs {human_bytes(held)} of memory; the limit is {human_bytes(self.memory)}",
                    where=shorten(repr(output.name)),
                    hint="raise the limit: memory=… (--memory)",
                )

    def _lay_out(self) -> tuple[tuple[FileLayout, ...], bytes | None]:
        if self.is_view:
            if self.max_shard_size is not None:
                raise PlanError("max_shard_size needs a directory as path", hint="pass path='out/'")
            return (), None
        name = os.path.basename(self.path)
        if self.format == TORCH_ZIP:
            if self.max_shard_size is not None:
                raise PlanError(
                    "only safetensors can be written in shards", where=self.path, hint="pass a directory: out/"
                )
            return (torchzip_out.lay_out(name, self.outputs, self.views),), None
        if not self.is_directory:
            if self.max_shard_size is not None:
                raise PlanError(
                    "shards need a directory, but the path names a file",
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

    # --- properties and output ----------------------------------------------------------------------

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
        """Bytes copied unchanged from file to file."""
        return sum(o.expression.nbytes for o in self.outputs if o.expression.spans() is not None)

    def tree(self, *, limit: int | None = _ROWS_SHOWN) -> Tree:
        """The plan as a tree.

        Args:
            limit: Maximum number of tensors shown; None for all.
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
                printable(f"plan: {self.path} ({self.format})" if self.path else "plan: a view, without a path"),
                "title",
            ),
            Table(columns, cut(rows, limit, "tensors")),
            Text(
                f"{plural(count, 'tensor')} · {human_bytes(self.file_bytes or self.nbytes)}{files}"
                + (f" · {human_bytes(copied)} copied unchanged" if copied else "")
                + (f" · {human_bytes(self.nbytes - copied)} computed" if copied < self.nbytes else ""),
                "dim",
            ),
        ]
        return Tree((*parts, *remarks(self.dropped, self.notes)))

    def _origin(self, output: Output) -> str:
        x = output.expression
        if not isinstance(x, Stored) or x.info.name != output.name:
            return x.summary()
        return "unchanged" if len(self.sources) == 1 else f"unchanged from {x.source.label}"

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data."""
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
        """All casts, each with the output that contains it."""
        return [(output, x) for output in self.outputs for x in output.expression.walk() if isinstance(x, Cast)]

    # --- a source ----------------------------------------------------------------------------------

    def __torchparams_source__(self) -> Source:
        """The outputs as a source: the future content of the file."""
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

    def run(self, progress: Progress | None = None, *, engine: Engine | str | None = None) -> Written:
        """Write the target completely, or leave it unchanged.

        Where tensors are sharded, all ranks that keep them call it: the lowest writes, and fetches the parts of the
        others block by block, in messages (four collectives; six more where a part of the ranks has tensors of its
        own). Every rank gets the same result.

        Args:
            progress: Callback with the bytes written so far and in total.
            engine: `ray`, `ray:ADDRESS` or a `RayEngine`: each worker writes a shard of a directory, and the index is
                put in place here, last. By default, the threads of this process write.

        Returns:
            A summary: files, time, and losses of casts.

        Raises:
            OptionError: The engine cannot write this plan.
            PlanError: The target changed, or finite values would become infinite.
            SourceError: A source cannot be read, or changed during the run.
            WriteError: Writing failed. The target is unchanged.
            RanksError: A rank does not make the call, or fails in it.
        """
        if self.is_view:
            raise PlanError("the plan has no path to write to", hint="pass path=… when making the plan")
        from torchparams.engines.by_name import named
        from torchparams.expressions.sharded import shards_in

        chosen = named(engine)
        shards = [shard for output in self.outputs for shard in shards_in(output.expression)]
        if shards:
            if chosen is not None:
                raise OptionError("sharded tensors are written by their ranks", hint="leave the engine out")
            from torchparams.edit.write.together import execute_together

            return execute_together(self, shards, progress)
        from torchparams.edit.write.execute import execute

        if chosen is None:
            return execute(self, progress)
        from torchparams.edit.write.on_workers import writer

        return execute(self, progress, writer(self, chosen))


def kind_of(target: str | os.PathLike[str] | None, format: str | None) -> tuple[bool, str]:
    """Whether a target is a directory, and its format; `VIEW` without a target."""
    spelled = {"safetensors": SAFETENSORS, "torch zip": TORCH_ZIP, "torch": TORCH_ZIP, None: None}
    if format not in spelled:
        raise PlanError(f"`format` must be 'safetensors' or 'torch zip', not {format!r}")
    if target is None:
        if format is not None:
            raise PlanError(f"format={format!r} needs a path to write to", hint="pass path=…")
        return False, VIEW
    path = os.fspath(target)
    if not path:
        raise PlanError("the target path is empty")
    wanted = spelled[format]
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1]
    if path.endswith(("/", os.sep)) or os.path.isdir(path) or (not suffix and not os.path.exists(path)):
        if wanted == TORCH_ZIP:
            raise PlanError("a torch zip is a file, but the path names a directory", where=path, hint="end it in .pt")
        return True, SAFETENSORS
    if wanted is not None:
        return False, wanted
    if suffix not in _SUFFIXES:
        raise PlanError(
            f"the suffix {suffix!r} does not name a format" if suffix else "the path has no suffix that names a format",
            where=path,
            exists=f"known suffixes are {' '.join(_SUFFIXES)}",
            hint=None if re.search(r"[\0]", path) else f"for a directory of safetensors, write {path}/",
        )
    return False, _SUFFIXES[suffix]
