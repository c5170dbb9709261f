"""Data of the page over steps: the numbers of a history as columns of steps × tensors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.page import payload
from torchparams.page.columns import packed, reals
from torchparams.page.findings import of_record
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.engines.base import Engine
    from torchparams.record.history_tree import History

    Array = np.ndarray[Any, Any]

COLUMNS = ("weight_norm", "std", "max_abs", "zeros", "nonfinite", "grad_norm", "update_ratio")
"""Columns of a history that the page shows."""

MOST_VALUES = 1 << 24
"""Maximum number of values in all columns together (64 MiB as float32); beyond it, the page has fewer steps."""

MOST_POINTS = 1 << 14
"""Maximum number of points of a logged number; beyond it, neighbours become their minimum and maximum."""

_REPEATED = 20
"""Maximum number of repeated checkpoints that are named."""


def history_of(
    x: object,
    selector: object,
    *,
    strict: bool,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> History | None:
    """The history to show for a `History`, a record, a pattern, or a directory of checkpoints; else None.

    Raises:
        FileFormatError: The record is damaged.
        NoMatch: A branch of the selector matches nothing.
        SourceError: A checkpoint cannot be read.
    """
    from torchparams.record.history_tree import History

    if isinstance(x, History):
        return x.select(selector, strict=strict)
    if not isinstance(x, str | os.PathLike):
        return None
    from torchparams.record.history import has_steps, history

    return history(x, selector, strict=strict, engine=engine, progress=progress) if has_steps(x) else None


def over_steps(history: History, selector: object = None) -> dict[str, Any]:
    """Data of the page for a history. Groups are left out, and of a step that ran twice the first run."""
    shown = ~history.data["overwritten"] & (history.data["kind"] == "parameter")
    present = {history.names[code] for code in np.unique(history.codes[shown]).tolist()}
    infos = [info for name, info in history.infos.items() if name in present]
    places = {info.name: i for i, info in enumerate(infos)}
    rows = np.array([places.get(name, -1) for name in history.names], np.intp)[history.codes]
    shown &= rows >= 0
    every = np.unique(history.data["step"][shown])
    keys = [key for key in COLUMNS if not np.isnan(history.data[key][shown]).all()]
    steps = _kept(every, [finding.step for finding in history.findings], len(infos) * len(keys))
    at = np.minimum(np.searchsorted(steps, history.data["step"]), max(len(steps) - 1, 0))
    if len(steps):
        shown &= steps[at] == history.data["step"]
    columns = {}
    for key in keys:
        table = np.full((len(steps), len(infos)), np.nan)
        table[at[shown], rows[shown]] = history.data[key][shown]
        columns[key] = reals(table.ravel())
    return {
        "version": payload.VERSION,
        "source": {
            "label": history.label,
            "format": history.format,
            "selector": None if selector is None else str(selector),
            "live": False,
            "detailed": True,
            "metadata": [],
            "tensors": len(infos),
            "numel": sum(info.numel for info in infos),
            "nbytes": sum(info.nbytes for info in infos),
            "left_out": [],
            "lost": 0,
        },
        "dtypes": payload.dtypes(),
        "table": payload.listing(infos),
        "unread": {},
        "findings": of_record(history.findings, places),
        "spectra": {},
        "pictures": {},
        "history": {
            "steps": packed(steps.astype(np.float64)),
            "columns": columns,
            "numbers": [_number(name, values) for name, values in history.numbers.items() if values],
            "notes": _notes(history, len(every), len(steps), len(set(history.names) - set(places))),
        },
    }


def _kept(steps: Array, wanted: list[int], width: int) -> Array:
    """The steps that the page has room for: the first, the last, those of findings, and others evenly between."""
    most = max(MOST_VALUES // max(width, 1), 2)
    if len(steps) <= most:
        return steps
    found = np.searchsorted(steps, np.unique(wanted)[: most // 2]).astype(np.intp)
    even = np.linspace(0, len(steps) - 1, max(most - len(found), 2)).round().astype(np.intp)
    kept: Array = steps[np.unique(np.concatenate([even, np.minimum(found, len(steps) - 1)]))]
    return kept


def _number(name: str, values: Any) -> dict[str, Any]:
    steps = np.array(sorted(values), np.float64)
    numbers = np.array([values[step] for step in sorted(values)], np.float64)
    which = _outline(numbers)
    return {"name": name, "count": len(steps), "steps": packed(steps[which]), "values": reals(numbers[which])}


def _outline(values: Array) -> Array:
    """Places of the values to draw: of many, the first non-finite one, the minimum and the maximum of neighbours."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    kept: set[int] = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), MOST_POINTS // 3):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        if len(finite) < len(part):
            kept.add(int(part[~np.isfinite(values[part])][0]))
    return np.array(sorted(kept), np.intp)


def _notes(history: History, every: int, kept: int, left_out: int) -> list[str]:
    """What the page leaves out, and what else there is to know of the steps."""
    notes = []
    if kept < every:
        notes.append(f"{kept:,} of {plural(every, 'step')} are in this page: the first, the last, and others between.")
    if left_out:
        notes.append(f"{plural(left_out, 'name')} without a parameter of its own (groups) are left out.")
    overwritten = history.data["overwritten"]
    if overwritten.any():
        again = plural(len(np.unique(history.data["step"][overwritten])), "step")
        notes.append(f"{again} ran again after a resume; the later run is shown.")
    notes += [f"Step {step:,} has the same bytes as step {other:,}." for step, other in history.repeated[:_REPEATED]]
    if len(history.repeated) > _REPEATED:
        notes.append(f"{len(history.repeated) - _REPEATED:,} more steps have the same bytes as the step before.")
    return notes
