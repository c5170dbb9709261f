"""Compute statistics of tensors in one pass over the values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.engines.base import Task, Unread
from torchparams.engines.sketches import SketchFold
from torchparams.errors import TorchParamsError
from torchparams.io.filebytes import paused_gc
from torchparams.measure.columns import Columns, Rows
from torchparams.measure.flags import flags_of
from torchparams.measure.grouping import GroupSums, groups_of
from torchparams.measure.numbers import sort_key
from torchparams.measure.scan import reading_of, scan
from torchparams.measure.stats_tree import ROWS_SHOWN as ROWS_SHOWN
from torchparams.measure.stats_tree import SORT_KEYS as SORT_KEYS
from torchparams.measure.stats_tree import Stats as Stats
from torchparams.measure.tensor_stats import TensorStats, derive
from torchparams.parameters import of
from torchparams.sketch import batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.engines.base import Engine, Job, Progress
    from torchparams.expressions.casts import Losses
    from torchparams.info import ParameterInfo
    from torchparams.measure.lost import Lost
    from torchparams.sketch import Sketch

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
"""Default quantiles."""


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
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Compute statistics of tensors, or of groups of tensors, in one pass over the values.

    Values are read block by block; memory does not depend on the size of the source. A tensor without values (meta,
    sparse, quantised), or with codes of an unknown encoding, is listed as unread, with the reason. Tied tensors count
    once.

    Of sharded parameters, all their ranks make the call: each reads its own parts, and they gather twice (four
    collectives, for any number of tensors). Every rank gets the statistics of the whole.

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`.
        selector: Tensors to measure; None for all.
        by: Grouping: `module`, `layer` (the name up to its first number), `dtype`, a selector, or a list of selectors
            (one row for the matches of each, one for the rest). None for one row per tensor.
        quantiles: Quantiles from 0 to 1, also shown in the table; `QUANTILES` by default, not shown.
        sort: Column to sort by, with a leading `-` for descending; see `Stats.sorted`.
        limit: Maximum number of printed rows, flags and unread tensors; None for all.
        wide: Print all columns.
        buffers: Include the buffers of a live model.
        strict: Raise if any branch of a selector matches nothing.
        engine: Engine to run on, or its name (`ray`, `ray:ADDRESS`); by default, threads that memory-map files.
        progress: Callback with the bytes read so far and in total.

    Raises:
        NoMatch: A branch of a selector matches nothing.
        SelectorError: There is no column to sort by of that name.
        ValueError: A quantile is not between 0 and 1.
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
            raise ValueError(f"a quantile must be between 0 and 1, not {q:g}")
    if sort is not None:
        sort_key(SORT_KEYS, sort)  # fail before reading
    params = of(x, buffers=buffers)
    if selector is not None:
        params = params.select(selector, strict=strict)
    source = params.source
    with paused_gc():  # many objects, no cycles
        reading = reading_of(params)
        infos = dict(zip(reading.names, reading.infos, strict=True))
        grouped = None if by is None else groups_of(infos, by, strict=strict, where=source.label)
        members = None if grouped is None else grouped[1]
        found = scan(
            source,
            reading,
            StatsTask(wanted, keep=members is not None),
            whole=params.selector is None,
            ordered=False,
            engine=engine,
            progress=progress,
        )
        rows, unread, groups, lost = _gathered(found, infos, members, wanted)
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
    """Parse comma-separated quantiles.

    Raises:
        TorchParamsError: A part is not a number between 0 and 1.

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
                f"quantiles must be numbers between 0 and 1, not {part.strip()!r}", hint="write 0.01,0.5,0.99"
            )
    return found


def _gathered(
    results: Iterable[tuple[str, Any, Losses | None]],
    infos: Mapping[str, ParameterInfo],
    groups: Mapping[str, Sequence[str]] | None,
    quantiles: Sequence[float],
) -> tuple[Rows, list[Unread], list[TensorStats] | None, Lost]:
    """Rows of tensors, unread tensors, rows of groups, and losses of casts."""

    def of_group(sketch: Sketch, name: str, members: list[ParameterInfo]) -> TensorStats:
        types = {info.dtype for info in members}
        numel = sum(info.numel for info in members)
        dtype = types.pop() if len(types) == 1 else None
        return derive(sketch, quantiles, name=name, numel=numel, dtype=dtype, tensors=len(members))

    sums = None if groups is None else GroupSums(groups, infos, of_group)
    found: dict[str, TensorStats | tuple[Columns, int] | Unread] = {}
    lost: Lost = {}
    for name, result, losses in results:
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
    return rows, unread, None if sums is None else sums.rows, {name: lost[name] for name in infos if name in lost}


class _Row(NamedTuple):
    """Row of a tensor, and its sketch if groups need it."""

    row: TensorStats
    sketch: Sketch | None


class StatsTask(Task["Sketch", "_Row | tuple[Columns, int]"]):
    """Task that computes the statistics of each tensor; small tensors go into columns.

    Args:
        quantiles: Quantiles to compute.
        keep: Keep the sketches, for groups.
    """

    def __init__(self, quantiles: Sequence[float], *, keep: bool = False) -> None:
        self.quantiles, self.keep = tuple(quantiles), keep

    def begin(self, job: Job) -> SketchFold:
        """Start an empty sketch."""
        return SketchFold(job.dtype)

    def combine(self, job: Job, parts: Sequence[Sketch]) -> _Row:
        """Row derived from the merged sketches; runs on the reading threads."""
        sketch = parts[0] if len(parts) == 1 else parts[0].merge(parts)
        (row,) = job.rows
        made = derive(sketch, self.quantiles, name=job.key, numel=row.numel, shape=row.shape, dtype=row.dtype)
        return _Row(made, sketch if self.keep else None)

    def takes(self, job: Job) -> bool:
        """Whether the tensor is small, and its sketch is not needed."""
        row = job.rows[0]
        return not self.keep and batch.takes(row.dtype, row.numel)

    def many(self, jobs: Sequence[Job], buffer: memoryview | None, starts: Sequence[int]) -> list[tuple[Columns, int]]:
        """Rows of small tensors, in columns of one dtype each."""
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
