"""Diagnosis of a training: what went wrong first, and in which parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.measure.stats_tree import number
from torchparams.record.findings_table import findings_table
from torchparams.record.history import history
from torchparams.record.history_tree import History
from torchparams.record.watch import Watch
from torchparams.record.watchdogs import WATCHDOGS, RecordFinding
from torchparams.render.result import Result
from torchparams.render.tree import Column, Row, Table, Text, Tree, plural, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchparams.record.watchdogs import Watchdog

BEFORE = 5
"""Number of records to show before the first finding."""

OTHERS = 5
"""Number of other parameters to show: those that changed most at that record."""

WATCHED = (
    *("weight_norm", "mean", "max_abs", "zeros", "nonfinite"),
    *("grad_nonfinite", "update_norm", "update_ratio", "dead_rows"),
)
"""Columns that watchdogs check."""

SHOWN = ("weight_norm", "grad_norm", "update_ratio", "max_abs")
"""Columns to show for the parameter of the first finding."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """The first finding in a training, and its context.

    Attributes:
        label: Path of the record.
        steps: First and last step; None without steps.
        first: The first finding; None if nothing was found.
        findings: All findings, by step.
        before: Records of the parameter before the first finding, oldest first: step, and value by column.
        moved: Parameters whose update-to-weight ratio at that record is furthest from its median until then: name →
            ratio and median.
    """

    label: str
    steps: tuple[int, int] | None
    first: RecordFinding | None
    findings: tuple[RecordFinding, ...]
    before: tuple[tuple[int, dict[str, float]], ...]
    moved: dict[str, tuple[float, float]]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return self.first is None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data."""
        return {
            "source": self.label,
            "steps": None if self.steps is None else list(self.steps),
            "ok": self.ok,
            "first": None if self.first is None else self.first.to_json(),
            "findings": [finding.to_json() for finding in self.findings],
            "before": [
                {"step": step, **{key: None if math.isnan(v) else v for key, v in values.items()}}
                for step, values in self.before
            ],
            "moved": {name: {"ratio": ratio, "median": usual} for name, (ratio, usual) in self.moved.items()},
        }

    def tree(self) -> Tree:
        """The first finding, the steps before it, other changed parameters, and the other findings."""
        parts: list[Text | Table] = [Text(printable(self.label), "title")]
        if self.steps is not None:
            parts.append(Text(f"steps {self.steps[0]:,} to {self.steps[1]:,}", "dim"))
        if self.first is None:
            parts.append(Text("no findings", "good"))
            return Tree(tuple(parts))
        parts.append(Text(printable(f"first: {self.first}"), "error"))
        if self.before:
            columns = (Column("step", right=True), *(Column(key.replace("_", " "), right=True) for key in SHOWN))
            rows = [Row((f"{step:,}", *(number(values[key]) for key in SHOWN))) for step, values in self.before]
            parts.append(Table(columns, tuple(rows)))
        if self.moved:
            parts.append(Text("other parameters whose updates changed most", "dim"))
            columns = (Column("name", style="name", shrink=True), Column("update ratio", right=True),
                       Column("median before", right=True))  # fmt: skip
            rows = [Row((name, number(ratio), number(usual))) for name, (ratio, usual) in self.moved.items()]
            parts.append(Table(columns, tuple(rows)))
        rest = self.findings[1:]
        if rest:
            parts.append(Text(f"and {plural(len(rest), 'more finding')}", "warn"))
            parts.append(findings_table(rest))
        return Tree(tuple(parts))


def diagnose(x: object, *, watchdogs: Iterable[Watchdog] = WATCHDOGS) -> Diagnosis:
    """Find what went wrong first in a training, and where.

    The watchdogs check every record. For a record of `tp.Recorder`, the findings that it made during the training are
    included, because it checks gradients at every step.

    Args:
        x: The directory of a record, checkpoints (see `tp.history`), or a `History`.
        watchdogs: Checks to run.

    Raises:
        SourceError: There is no record and no checkpoint, or a file cannot be read.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> found = tp.diagnose([{"w": np.ones(3)}, {"w": np.array([1, 1, np.nan])}])
    >>> print(found.first)
    step 1: w: the parameter has 1 element that is not finite
    """
    found = x if isinstance(x, History) else history(x)
    known = {(each.rule, each.name): each for each in _watched(found, watchdogs)}
    for finding in found.findings:
        earlier = known.get((finding.rule, finding.name))
        if earlier is None or finding.step <= earlier.step:
            known[finding.rule, finding.name] = finding
    order = {watchdog.name: i for i, watchdog in enumerate(WATCHDOGS)}
    findings = sorted(known.values(), key=lambda each: (each.step, order.get(each.rule, -1)))
    first = findings[0] if findings else None
    steps = found.steps
    return Diagnosis(
        label=found.label,
        steps=(steps[0], steps[-1]) if steps else None,
        first=first,
        findings=tuple(findings),
        before=_before(found, first),
        moved=_moved(found, first),
    )


def _watched(found: History, watchdogs: Iterable[Watchdog]) -> list[RecordFinding]:
    """Findings of the watchdogs in the rows of parameters, each once."""
    names = [name for name in found.names if name in found.infos]
    place = np.full(len(found.names), -1)
    place[[i for i, name in enumerate(found.names) if name in found.infos]] = np.arange(len(names))
    watch = Watch(watchdogs)
    watch.parameters(names, [found.infos[name].requires_grad is not False for name in names])
    steps = found.data["step"]
    rows = np.flatnonzero(~found.data["overwritten"] & (place[found.codes] >= 0)) if names else np.zeros(0, np.intp)
    rows = rows[np.argsort(steps[rows], kind="stable")]
    for of_step in np.split(rows, np.flatnonzero(np.diff(steps[rows])) + 1) if len(rows) else ():
        columns = {key: np.full(len(names), np.nan) for key in WATCHED}
        for key, column in columns.items():
            column[place[found.codes[of_step]]] = found.data[key][of_step]
        measured = {key: column for key, column in columns.items() if not np.isnan(column).all()}
        watch.record(int(steps[of_step[0]]), measured, single=found.format == "record")
    return watch.findings


def _before(found: History, first: RecordFinding | None) -> tuple[tuple[int, dict[str, float]], ...]:
    if first is None or first.name not in found.names:
        return ()
    rows = found[first.name]
    which = np.flatnonzero(rows["step"] <= first.step)[-BEFORE - 1 :]
    return tuple((int(rows["step"][i]), {key: float(rows[key][i]) for key in SHOWN}) for i in which)


def _moved(found: History, first: RecordFinding | None) -> dict[str, tuple[float, float]]:
    """The other parameters whose ratio changed most at the first record from the finding on."""
    if first is None:
        return {}
    far: list[tuple[float, str, float, float]] = []
    for name in found.names:
        if name == first.name or name not in found.infos:
            continue
        rows = found[name]
        ratios = rows["update_ratio"]
        known = np.isfinite(ratios) & (ratios > 0)
        earlier, later = known & (rows["step"] < first.step), known & (rows["step"] >= first.step)
        if earlier.any() and later.any():
            usual, now = float(np.median(ratios[earlier])), float(ratios[later][0])
            far.append((abs(math.log(now / usual)), name, now, usual))
    far.sort(reverse=True)
    return {name: (now, usual) for _, name, now, usual in far[:OTHERS]}
