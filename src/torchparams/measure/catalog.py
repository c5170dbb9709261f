"""One table of all parameters of many checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.engines.by_name import ready
from torchparams.errors import EngineError, OptionError, TorchParamsError
from torchparams.io.patterns import expanded
from torchparams.measure.catalog_files import Pieces, fingerprint
from torchparams.parameters import of
from torchparams.render.result import Result
from torchparams.render.tabular import Tabular
from torchparams.render.tree import Column, Row, Table, Text, Tree, cut, human_bytes, human_count, plural, printable

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torchparams.engines.base import Engine
    from torchparams.info import Location, ParameterInfo

COLUMNS: dict[str, Any] = {
    "file": str,
    "name": str,
    "shape": list[int],
    "dtype": str,
    "encoding": str,
    "numel": int,
    "nbytes": int,
    "location": {"file": str, "start": int, "stop": int},
    "digest": str,
    "mean": float,
    "std": float,
    "min": float,
    "max": float,
    "l2": float,
    "zeros": int,
    "nonfinite": int,
    "error": str,
}
"""Columns of the table. `digest` and the statistics are null unless they were asked for."""

STATISTICS = ("mean", "std", "min", "max", "l2", "zeros", "nonfinite")

BATCH = 64
"""Checkpoints whose rows are written together."""

ROWS = 50_000
"""Rows that are written at the latest."""

_SHOWN = 10


class CatalogRow(NamedTuple):
    """A parameter of a checkpoint; or a checkpoint that could not be read, with `error` and nothing else.

    Attributes:
        file: The target, as it was given or as a pattern gave it.
        name, shape, dtype, encoding, numel, nbytes, location: As in `ParameterInfo`.
        digest: Digest of the tensor, see `tp.digest`; None unless asked for.
        mean, std, min, max, l2, zeros, nonfinite: See `tp.stats`; None unless asked for.
        error: Reason why the checkpoint, or the values of the parameter, could not be read.
    """

    file: str
    name: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    encoding: str | None = None
    numel: int | None = None
    nbytes: int | None = None
    location: Location | None = None
    digest: str | None = None
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    l2: float | None = None
    zeros: int | None = None
    nonfinite: int | None = None
    error: str | None = None


@dataclass(frozen=True, repr=False)
class Catalog(Result, Tabular):
    """All parameters of many checkpoints, as one table; it prints as a summary.

    Attributes:
        path: The directory of Parquet files that holds the table; None if it is in memory.
        kept: The rows, if they are in memory.
        targets: Count of checkpoints in the table.
        skipped: Count of those that were there already, unchanged.
        tensors: Count of rows that this call added.
        numel: Count of elements of these.
        nbytes: Bytes of these.
        errors: Checkpoints that could not be read, and why.
    """

    columns = COLUMNS

    path: str | None
    kept: tuple[CatalogRow, ...]
    targets: int
    skipped: int
    tensors: int
    numel: int
    nbytes: int
    errors: Mapping[str, str]

    def table_rows(self) -> Sequence[Any]:
        """The rows; read from the files if they are not in memory."""
        return self.kept if self.path is None else Pieces(self.path).rows()

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The rows as an Arrow C stream, file by file."""
        if self.path is None:
            return super().__arrow_c_stream__(requested_schema)
        return Pieces(self.path).stream()

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON data; the rows are in the files."""
        return {
            "path": self.path,
            "targets": self.targets,
            "skipped": self.skipped,
            "tensors": self.tensors,
            "numel": self.numel,
            "nbytes": self.nbytes,
            "errors": dict(self.errors),
        }

    def tree(self) -> Tree:
        """How many checkpoints and tensors, and which could not be read."""
        parts: list[Text | Table] = [Text(printable(self.path or "catalog"), "title")]
        line = f"{plural(self.tensors, 'tensor')} · {human_count(self.numel)} parameters · {human_bytes(self.nbytes)}"
        if self.skipped:
            line = f"{self.skipped:,} were there already; added {line}"
        parts.append(Text(f"{plural(self.targets, 'checkpoint')} · {line}", "dim"))
        if self.errors:
            parts.append(Text(f"not read: {plural(len(self.errors), 'checkpoint')}", "warn"))
            columns = (Column("checkpoint", style="name", shrink=True), Column("reason", wraps=True))
            rows = [Row((file, printable(reason))) for file, reason in self.errors.items()]
            parts.append(Table(columns, cut(rows, _SHOWN)))
        return Tree(tuple(parts))


def catalog(
    targets: Iterable[str | os.PathLike[str]] | str,
    path: str | os.PathLike[str] | None = None,
    *,
    selector: object = None,
    digest: bool = False,
    stats: bool = False,
    engine: Engine | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Catalog:
    """List the parameters of many checkpoints in one table: a row for each parameter.

    With `path`, rows are written to a directory of Parquet files, a file for each batch of checkpoints, which is
    renamed into place when it is complete. A call that was interrupted is resumed by the same call: checkpoints that
    are in the directory and have not changed since are skipped, those that changed are read again. Memory does not grow
    with the number of checkpoints. A checkpoint that cannot be read is a row with the reason.

    Args:
        targets: Checkpoints, and patterns such as `run/step-*` or `s3://bucket/run/step-*`.
        path: The directory; None to keep the rows in memory.
        selector: Parameters to list; None for all. A checkpoint in which it matches nothing has no rows.
        digest: Add the digest of each tensor: all values are read.
        stats: Add mean, standard deviation, minimum, maximum, L2 norm, and counts of zeros and non-finite values.
        engine: Engine to run on, or its name (`ray`); by default, threads of this process.
        progress: Callback with checkpoints done and in total.

    Raises:
        SourceError: A pattern matches nothing.
        EngineError: The cluster cannot be reached, or its workers died.
        WriteError: `path` is not such a directory, or cannot be written.
        MissingDependency: pyarrow is not installed, and `path` is given.

    >>> import tempfile
    >>> import numpy as np
    >>> import torchparams as tp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (1, 2):
    ...         _ = tp.save({"w": np.full(3, step, np.float32)}, f"{folder}/step-{step}.safetensors")
    ...     found = tp.catalog(f"{folder}/step-*", stats=True)
    >>> [(row.name, row.mean) for row in found.table_rows()]
    [('w', 1.0), ('w', 2.0)]
    """
    given = [targets] if isinstance(targets, str) else [str(target) for target in targets]
    if not given:
        raise OptionError("no targets", hint="give checkpoints, or a pattern")
    names = list(dict.fromkeys(expanded(given)))
    engine = ready(engine)  # an engine that is not there is no error of a checkpoint
    asked = tuple(name for name, wanted in (("digest", digest), ("stats", stats)) if wanted)
    asked += () if selector is None else (f"selector {selector}",)
    pieces = None if path is None else Pieces(path, asked)
    there = {} if pieces is None else pieces.open(names)
    kept: list[CatalogRow] = []
    batch: list[CatalogRow] = []
    done: dict[str, str] = {}
    errors: dict[str, str] = {}
    tensors = numel = nbytes = skipped = 0
    for i, name in enumerate(names):
        mark = fingerprint(name)
        if name in there and there[name] == mark:
            skipped += 1
        else:
            rows = list(_rows(name, selector, digest, stats, engine))
            if len(rows) == 1 and rows[0].name is None:
                errors[name] = rows[0].error or ""
                mark = f"unread {mark}"  # it is tried again
            else:
                tensors += len(rows)
                numel += sum(row.numel or 0 for row in rows)
                nbytes += sum(row.nbytes or 0 for row in rows)
            batch += rows
            done[name] = mark
        if pieces is not None and done and (len(done) >= BATCH or len(batch) >= ROWS or i + 1 == len(names)):
            pieces.write(batch, done)
            batch, done = [], {}
        elif pieces is None:
            kept += batch
            batch = []
        if progress is not None:
            progress(i + 1, len(names))
    if pieces is not None and done:
        pieces.write(batch, done)
    return Catalog(
        None if pieces is None else pieces.path, tuple(kept), len(names), skipped, tensors, numel, nbytes, errors
    )


def _rows(file: str, selector: object, digest: bool, stats: bool, engine: Engine | None) -> Iterator[CatalogRow]:
    try:
        params = of(file)
        if selector is not None:
            params = params.select(selector, strict=False)
        infos = params.infos
        digests = _digests(params, engine) if digest else {}
        measured, unread = _statistics(params, engine) if stats else ({}, {})
        for info in infos.values():
            yield _row(file, info, digests.get(info.name), measured.get(info.name, {}), unread.get(info.name))
    except EngineError:
        raise
    except TorchParamsError as error:
        yield CatalogRow(file, error=printable(str(error).removeprefix(f"{file}: ")))


def _row(
    file: str, info: ParameterInfo, digest: str | None, numbers: Mapping[str, Any], error: str | None
) -> CatalogRow:
    dtype = None if info.dtype is None else str(info.dtype)
    return CatalogRow(
        file,
        info.name,
        info.shape,
        dtype,
        info.encoding,
        info.numel,
        info.nbytes,
        info.location,
        digest,
        error=error,
        **numbers,
    )


def _digests(params: Any, engine: Engine | None) -> dict[str, str]:
    from torchparams.measure.digest import digest

    return {name: tensor.digest for name, tensor in digest(params, engine=engine).tensors.items()}


def _statistics(params: Any, engine: Engine | None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    from torchparams.measure.stats import stats

    found = stats(params, engine=engine)
    numbers = {}
    for row in found:
        values = {key: getattr(row, key) for key in STATISTICS}
        numbers[row.name] = {
            key: value if key in ("zeros", "nonfinite") else nan if value is None else float(value)
            for key, value in values.items()
        }
    return numbers, {each.name: each.reason for each in found.unread}
