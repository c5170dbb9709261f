"""Measurements of all tensors of a target, for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams.engines.base import Unread
from torchparams.io.filebytes import paused_gc
from torchparams.measure.columns import Rows
from torchparams.measure.flags import flags_of
from torchparams.measure.scan import reading_of, scan
from torchparams.measure.stats import stats
from torchparams.page.measured import DETAILED, Measured, PageTask, Shape
from torchparams.page.pictures import Picture, PictureTask

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.engines.base import Engine, Progress
    from torchparams.info import ParameterInfo
    from torchparams.measure.flags import Flag
    from torchparams.measure.lost import Lost
    from torchparams.measure.tensor_stats import TensorStats
    from torchparams.parameters import Parameters


@dataclass
class Target:
    """Measurements of the tensors of one target.

    Attributes:
        params: The table.
        infos: Canonical name → record.
        detailed: Whether shapes were measured.
        quantiles: Quantiles of the rows.
        rows: Name → statistics.
        shapes: Name → shape of the distribution.
        kurtosis: Name → excess kurtosis.
        unread: Name → reason why the values cannot be read.
        flags: Flags, as of `stats`.
        lost: Losses of casts.
        gradients: Name → L2 norm of the gradient, for a live model after a backward pass.
    """

    params: Parameters
    infos: Mapping[str, ParameterInfo]
    detailed: bool
    quantiles: tuple[float, ...]
    rows: dict[str, TensorStats] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    kurtosis: dict[str, float] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    lost: Lost = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)


def measure(
    params: Parameters, *, detailed: bool | None = None, engine: Engine | None = None, progress: Progress | None = None
) -> Target:
    """Measure all tensors of a table in one pass over the values.

    Args:
        params: The table.
        detailed: Measure the shapes of distributions; None to do so for up to `DETAILED` tensors.
        engine: Engine to run on; by default, a `ThreadEngine` that memory-maps files.
        progress: Callback with the bytes read so far and in total.

    Raises:
        SourceError: The source cannot be read.
    """
    with paused_gc():  # many objects, no cycles
        # A live model is read once.
        records = reading_of(params)
        infos = dict(zip(records.names, records.infos, strict=True))
        fine = len(infos) <= DETAILED if detailed is None else detailed
        task = PageTask(detailed=fine)
        found = Target(params, infos, fine, task.quantiles)
        entries: dict[str, Any] = {}
        whole = params.selector is None
        for name, result, losses in scan(params.source, records, task, whole=whole, engine=engine, progress=progress):
            if isinstance(result, Unread):
                found.unread[name] = result.reason
            elif isinstance(result, Measured):
                entries[name] = result.row
                if result.shape is not None:
                    found.shapes[name] = result.shape
                found.kurtosis[name] = result.kurtosis
            else:
                entries[name] = result
            if losses is not None:
                found.lost[name] = losses
        rows = Rows(entries[name] for name in infos if name in entries)
        found.flags = tuple(flags_of(rows))
        found.rows = {row.name: row for row in rows}
        found.gradients = _gradients(params, engine)
    return found


def _gradients(params: Parameters, engine: Engine | None) -> dict[str, float]:
    """L2 norm of each gradient of a live model."""
    if params.source.format != "module":
        return {}
    from torchparams.train.gradients import gradients

    found = stats(gradients(params), quantiles=(), engine=engine)
    return {row.name: math.nan if row.nonfinite else row.l2 for row in found}


def pictures_of(params: Parameters, selector: object, *, strict: bool, engine: Engine | None) -> dict[str, Picture]:
    """Pictures of the selected tensors that can be read, by name.

    Raises:
        NoMatch: A branch of the selector matches nothing.
    """
    chosen = params.select(selector, strict=strict)
    found = scan(chosen.source, reading_of(chosen), PictureTask(), whole=False, engine=engine)
    return {name: made for name, made, _ in found if not isinstance(made, Unread) and made.rows and made.columns}
