"""The loop of the watchdogs over the records of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.record.watchdogs import YOUNG, Seen

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.record.watchdogs import RecordFinding, Watchdog

    Array = np.ndarray[Any, Any]

KEPT = 9
"""Number of earlier update-to-weight ratios that watchdogs see."""


class Watch:
    """Runs watchdogs on one record after the other, and keeps what they need of earlier records.

    Args:
        watchdogs: Checks to run.

    Attributes:
        findings: All findings, each rule and parameter once.
    """

    def __init__(self, watchdogs: Iterable[Watchdog]) -> None:
        self._watchdogs = tuple(watchdogs)
        self.findings: list[RecordFinding] = []
        self._known: set[tuple[str, str]] = set()
        self._names: Sequence[str] = ()
        self._trainable = np.zeros(0, bool)
        self._before: dict[str, Array] = {}
        self._ratios = np.full((0, KEPT), np.nan)
        self._largest = np.zeros(0)  # weight norm
        self._since = np.zeros(0, np.int64)  # last step before which a parameter was zero

    def parameters(self, names: Sequence[str], trainable: Sequence[bool], same: Sequence[int | None] = ()) -> None:
        """Set the parameters of the next records.

        Args:
            names: Their names.
            trainable: Whether each has `requires_grad`.
            same: For each, its index among the parameters so far; None for a new one, or one that was frozen, unfrozen
                or replaced. Empty if all are new.
        """
        old = [None] * len(names) if not same else list(same)
        kept = np.array([i is not None for i in old], bool)
        rows = np.array([i for i in old if i is not None], np.intp)

        def moved(column: Array, missing: float) -> Array:
            found: Array = np.full((len(names), *column.shape[1:]), missing, column.dtype)
            found[kept] = column[rows]
            return found

        self._before = {key: moved(column, np.nan) for key, column in self._before.items()}
        self._since = moved(self._since, -YOUNG)
        self._ratios = moved(self._ratios, np.nan)
        self._largest = moved(self._largest, np.nan)
        self._names, self._trainable = names, np.array(trainable, bool)

    def record(self, step: int, columns: Mapping[str, Array], *, single: bool = True) -> list[RecordFinding]:
        """Check a record and remember it; return the new findings.

        Args:
            step: Its step.
            columns: Numbers by column, NaN for none; a column may be missing.
            single: Whether updates are those of one step, rather than of all since the previous checkpoint.
        """
        self._since[_was_zero(columns)] = step
        found = self.look(step, columns, single=single)
        if "weight_norm" in columns:
            self._largest = np.fmax(self._largest, columns["weight_norm"])
        ratios = columns.get("update_ratio")
        if ratios is not None:
            known = np.isfinite(ratios)
            self._ratios[known] = np.column_stack([self._ratios[known, 1:], ratios[known]])
        for key, column in columns.items():
            before = self._before.get(key)
            self._before[key] = column if before is None else np.where(np.isnan(column), before, column)
        return found

    def look(self, step: int, columns: Mapping[str, Array], *, single: bool = True) -> list[RecordFinding]:
        """Check numbers between two records, which are not remembered; return the new findings."""
        young = step - self._since < YOUNG
        kept = self._before, self._ratios, young, self._largest
        seen = Seen(step, self._names, self._trainable, columns, *kept, single)
        fresh = []
        for watchdog in self._watchdogs:
            for finding in watchdog.look(seen):
                if (finding.rule, finding.name) not in self._known:
                    self._known.add((finding.rule, finding.name))
                    fresh.append(finding)
        self.findings += fresh
        return fresh


def _was_zero(columns: Mapping[str, Array]) -> Array | slice:
    """Parameters that were zero before the step: those may change by a large part of their norm."""
    update, norm = columns.get("update_norm"), columns.get("weight_norm")
    if update is not None and "update_ratio" in columns:
        found: Array = np.isnan(columns["update_ratio"]) & ~np.isnan(update)
        if norm is not None:
            found |= np.isnan(update) & (norm == 0)
        return found
    return norm == 0 if norm is not None else slice(0)
