"""Statistics of every tensor, in one pass over the values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.engines.base import Task, Unread, readable_jobs
from torchparams.engines.sketches import SketchFold
from torchparams.engines.threads import ThreadEngine
from torchparams.errors import TorchParamsError
from torchparams.io.filebytes import paused_gc
from torchparams.measure.columns import Columns, Rows
from torchparams.measure.flags import flags_of
from torchparams.measure.grouping import GroupSums, groups_of
from torchparams.measure.numbers import sort_key
from torchparams.measure.stats_report import ROWS_SHOWN as ROWS_SHOWN
from torchparams.measure.stats_report import SORT_KEYS as SORT_KEYS
from torchparams.measure.stats_report import Stats as Stats
from torchparams.measure.tensor_stats import TensorStats, derive
from torchparams.parameters import of
from torchparams.records import Records
from torchparams.sketch import batch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.engines.base import Engine, Job, Progress
    from torchparams.info import ParameterInfo
    from torchparams.measure.lost import Lost
    from torchparams.sketch import Sketch

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
"""The quantiles that are taken unless others are asked for."""


def stats(
    x: object,
    selector: object = None,
    *,
    by: object = None,
    quantiles: Sequence[float] | None = None,
    sort: str | None = None,
    limit: int | None = ROWS_SHOWN,
    wide: bool = False,
    buffers: bool = False,
    strict: bool = True,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Statistics of every tensor, or of groups of them, in one pass over the values.

    Values are read block by block: memory is that of the rows, whatever the size of the source. A tensor without
    values (meta, sparse, quantised) is listed with the reason, and so are codes of an encoding that is not known, which
    stand beside their scales. Tied tensors count once.

    Args:
        x: Anything that has parameters: a model, a checkpoint's path, a mapping of tensors, a `Parameters`.
        selector: Which of them; None for all.
        by: A row for each `module`, `layer` (the name up to and including its first number) or `dtype`; or a selector
            or a list of them, with a row for all that each hits, and one for the rest. None for a row each.
        quantiles: Which to take, from 0 to 1; `QUANTILES` unless given. Those given are in the printed table too.
        sort: What to order rows by, `-` before it for descending; see `Stats.sorted`.
        limit: Most rows, flags and unread tensors that printing shows; None for all.
        wide: Print every column.
        buffers: Take a live model's buffers too.
        strict: Refuse selectors of which any union branch hits nothing.
        engine: What runs it; a `ThreadEngine` that maps files unless given.
        progress: Told bytes read and bytes in all.

    Raises:
        NoMatch: A selector's branch hits nothing.
        SelectorError: There is no such column to sort by.
        ValueError: A quantile is not from 0 to 1.
        SourceError: The source cannot be read.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> weights = {f"layers.{i}.fc.weight": np.full((2, 2), i, np.float32) for i in range(2)}
    >>> [(row.name, row.mean) for row in tp.stats(weights, by="layer")]
    [('layers.0', 0.0), ('layers.1', 1.0)]
    """
    wanted = QUANTILES if quantiles is None else tuple(map(float, quantiles))
    for q in wanted:
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is from 0 to 1, not {q:g}")
    if sort is not None:
        sort_key(SORT_KEYS, sort)  # before anything is read
    params = of(x, buffers=buffers)
    if selector is not None:
        params = params.select(selector, strict=strict)
    source = params.source
    with paused_gc():  # some objects for each tensor, and no cycles
        # Of a live model one reading, of which all that follows is made.
        records = params.records() if source.live else Records(params.infos.values())
        infos = dict(zip(records.names, records.infos, strict=True))
        grouped = None if by is None else groups_of(infos, by, strict=strict, where=source.label)
        members = None if grouped is None else grouped[1]
        coded = source.coded(records if params.selector is None else None)
        found = {name: Unread(name, each.reason) for name, each in coded.items() if name in infos and not each.numbers}
        readable = [info for name, info in infos.items() if name not in found] if found else infos.values()
        jobs, cannot = readable_jobs(source, readable, records.tensors)
        found.update((each.name, each) for each in cannot)
        rows, unread, groups, lost = _scan(infos, jobs, found, members, wanted, engine, progress)
        flags = tuple(flags_of(rows))
    made = Stats(
        label=source.label,
        format=source.format,
        selector=None if params.selector is None else str(params.selector),
        by=None if grouped is None else grouped[0],
        quantiles=wanted,
        rows=rows if groups is None else tuple(groups),
        flags=flags,
        unread=tuple(unread),
        infos=tuple(infos.values()),
        lost=lost,
        shown=() if quantiles is None else wanted,
        limit=limit,
        wide=wide,
        left_out=params.left_out,
        narrow=params.narrow,
    )
    return made if sort is None else made.sorted(sort)


def numbers_in(text: str) -> list[float]:
    """The numbers in a text, between commas.

    Raises:
        TorchParamsError: Something there is no number from 0 to 1.

    >>> numbers_in("0.01, 0.5")
    [0.01, 0.5]
    """
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(math.nan)
        if not 0 <= found[-1] <= 1:
            raise TorchParamsError(
                f"quantiles are numbers from 0 to 1, and {part.strip()!r} is not one", hint="write 0.01,0.5,0.99"
            )
    return found


def _scan(
    infos: Mapping[str, ParameterInfo],
    jobs: Sequence[Job],
    unreadable: Mapping[str, Unread],
    groups: Mapping[str, Sequence[str]] | None,
    quantiles: Sequence[float],
    engine: Engine | None,
    progress: Progress | None,
) -> tuple[Rows, list[Unread], list[TensorStats] | None, Lost]:
    """Rows of tensors, those that could not be read, rows of groups, and what casts lost."""

    def of_group(sketch: Sketch, name: str, members: list[ParameterInfo]) -> TensorStats:
        types = {info.dtype for info in members}
        numel = sum(info.numel for info in members)
        dtype = types.pop() if len(types) == 1 else None
        return derive(sketch, quantiles, name=name, numel=numel, dtype=dtype, tensors=len(members))

    sums = None if groups is None else GroupSums(groups, infos, of_group)
    engine = engine or ThreadEngine(mapped=True)  # counting is about as fast as copying
    found: dict[str, TensorStats | tuple[Columns, int] | Unread] = dict(unreadable)
    lost: Lost = {}
    for job, result, losses in engine.run(jobs, StatsTask(quantiles, keep=sums is not None), progress=progress):
        name = job.key
        if isinstance(result, _Row):
            found[name] = result.row
            if sums is not None:
                sums.add(name, result.sketch)
        else:
            found[name] = result
        if losses is not None:
            lost[name] = losses
    for each in found.values():
        if sums is not None and isinstance(each, Unread):
            sums.add(each.name, None)
    entries = [found[name] for name in infos]
    rows = Rows(each for each in entries if not isinstance(each, Unread))
    unread = [each for each in entries if isinstance(each, Unread)]
    return rows, unread, None if sums is None else sums.rows, lost


class _Row(NamedTuple):
    """The row of a tensor, and its sketch where that is kept."""

    row: TensorStats
    sketch: Sketch | None


class StatsTask(Task["Sketch", "_Row | tuple[Columns, int]"]):
    """The task that makes a row of statistics for every tensor; of small ones, a place in columns.

    Args:
        quantiles: The quantiles that rows have.
        keep: Give the sketches too, for groups.
    """

    def __init__(self, quantiles: Sequence[float], *, keep: bool = False) -> None:
        self.quantiles, self.keep = tuple(quantiles), keep

    def begin(self, job: Job) -> SketchFold:
        """Count from nothing."""
        return SketchFold(job.dtype)

    def combine(self, job: Job, parts: Sequence[Sketch]) -> _Row:
        """The row, derived from the sketch of all parts; on the threads that read."""
        sketch = parts[0] if len(parts) == 1 else parts[0].merge(parts)
        (row,) = job.rows
        made = derive(sketch, self.quantiles, name=job.key, numel=row.numel, shape=row.shape, dtype=row.dtype)
        return _Row(made, sketch if self.keep else None)

    def takes(self, job: Job) -> bool:
        """Whether it is small, and no sketch of it is wanted."""
        row = job.rows[0]
        return not self.keep and batch.takes(row.dtype, row.numel)

    def many(self, jobs: Sequence[Job], buffer: memoryview | None, starts: Sequence[int]) -> list[tuple[Columns, int]]:
        """The rows, in columns of one dtype each."""
        types: dict[DType, list[int]] = {}
        for i, job in enumerate(jobs):
            types.setdefault(job.rows[0].dtype, []).append(i)
        found: list[Any] = [None] * len(jobs)
        for dtype, which in types.items():
            these, at = [jobs[i] for i in which], [starts[i] for i in which]
            numels = [job.rows[0].numel for job in these]
            columns = Columns(these, batch.measure(dtype, buffer, at, numels, self.quantiles), self.quantiles)
            for place, i in enumerate(which):
                found[i] = columns, place
        return found
