"""Result of `history`: columns over steps and parameters, and their table."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchparams.errors import OptionError, UnknownName
from torchparams.measure.stats_tree import number
from torchparams.record.findings_table import findings_table
from torchparams.render.result import Result
from torchparams.render.tabular import Tabular
from torchparams.render.tree import Cell, Column, Row, Table, Text, Tree, cut, json_number, plural, printable
from torchparams.selectors import Selector

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.info import ParameterInfo
    from torchparams.record.watchdogs import RecordFinding

    Array = np.ndarray[Any, Any]

NUMBERS = (
    *("weight_norm", "mean", "std", "max_abs", "zeros", "nonfinite"),
    *("grad_norm", "grad_nonfinite", "update_norm", "update_ratio", "dead_rows"),
)
"""Numeric columns; NaN if a step has no value."""

COLUMNS: dict[str, Any] = {
    "step": int,
    "name": str,
    "kind": str,
    "session": int,
    "overwritten": bool,
    **dict.fromkeys(NUMBERS, float),
    "exponent": float,
    "counts": list[int],
}
"""Columns of the exported table."""

ROWS_SHOWN = 40
_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 16


class HistoryRow(NamedTuple):
    """A parameter at a step. A number that was not recorded is NaN.

    Attributes:
        step: The step.
        name: The parameter, or the group.
        kind: `parameter` or `group`.
        session: Number of the run, from 0, if the training was resumed.
        overwritten: Whether a later session ran the step again.
        weight_norm, mean, std, max_abs: L2 norm, mean, standard deviation and largest magnitude of the elements.
        zeros: Fraction of elements that are zero.
        nonfinite: Number of NaN and infinities.
        grad_norm, grad_nonfinite: L2 norm of the finite elements of the gradient, and number of the others.
        update_norm: L2 norm of the change in the step.
        update_ratio: `update_norm` divided by the norm before the step.
        dead_rows: Number of rows whose gradient is zero.
        exponent, counts: Histogram of magnitudes: number of elements per power of two, from 2^exponent on.
    """

    step: int
    name: str
    kind: str
    session: int
    overwritten: bool
    weight_norm: float
    mean: float
    std: float
    max_abs: float
    zeros: float
    nonfinite: float
    grad_norm: float
    grad_nonfinite: float
    update_norm: float
    update_ratio: float
    dead_rows: float
    exponent: float
    counts: list[int] | None


@dataclass(frozen=True, repr=False)
class History(Result, Tabular):
    """Statistics of parameters over steps; prints as a table with a curve for each parameter.

    `found["name"]` is a mapping from columns to arrays over the steps of one parameter.

    Attributes:
        label: The directory.
        format: `record` or `checkpoints`.
        infos: Name → info of the parameters.
        names: Parameters and groups that have rows.
        codes: Index in `names` for each row.
        data: Array of all rows by column.
        numbers: Logged numbers: name → step → value.
        findings: Findings of watchdogs, by step.
        repeated: Pairs of consecutive steps whose checkpoints have the same bytes.
        shown: Column whose curves are printed.
        limit: Maximum number of parameters to print; None for all.
    """

    columns = COLUMNS

    label: str
    format: str
    infos: Mapping[str, ParameterInfo]
    names: tuple[str, ...]
    codes: Array
    data: Mapping[str, Any]
    numbers: Mapping[str, Mapping[int, float]]
    findings: tuple[RecordFinding, ...]
    repeated: tuple[tuple[int, int], ...]
    shown: str = "update_ratio"
    limit: int | None = ROWS_SHOWN

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Steps, ascending."""
        return tuple(np.unique(self.data["step"]).tolist())

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, name: str) -> dict[str, Array]:
        if name not in self.names:
            raise UnknownName.among(name, self.names, self.label)
        which = np.flatnonzero(self.codes == self.names.index(name))
        which = which[~self.data["overwritten"][which]]
        which = which[np.argsort(self.data["step"][which], kind="stable")]
        return {key: self.data[key][which] for key in ("step", *NUMBERS)}

    def select(
        self, selector: object = None, *, steps: tuple[int | None, int | None] | None = None, strict: bool = True
    ) -> History:
        """Select parameters and steps; groups are kept.

        Args:
            selector: Parameters to include; None for all.
            steps: First and last step, both included; None for an open end.
            strict: Raise if any branch of a selector matches nothing.

        Raises:
            NoMatch: A branch of the selector matches nothing.
        """
        keep = np.ones(len(self), bool)
        if selector is not None:
            hits = Selector.of(selector).names(self.infos.values(), strict=strict, where=self.label)
            wanted = np.array([name in hits or name not in self.infos for name in self.names], bool)
            keep &= wanted[self.codes] if len(self) else keep
        findings = self.findings
        if steps is not None:
            first, last = steps
            low, high = -math.inf if first is None else first, math.inf if last is None else last
            keep &= (self.data["step"] >= low) & (self.data["step"] <= high)
            findings = tuple(finding for finding in findings if low <= finding.step <= high)
        if keep.all():
            return replace(self, findings=findings)
        return self._rows(np.flatnonzero(keep), findings)

    def _rows(self, which: Array, findings: tuple[RecordFinding, ...]) -> History:
        used, codes = np.unique(self.codes[which], return_inverse=True)
        columns = {key: None if column is None else _take(column, which) for key, column in self.data.items()}
        names = tuple(self.names[i] for i in used)
        return replace(self, names=names, codes=codes, data=columns, findings=findings)

    def rows(self) -> list[HistoryRow]:
        """All rows, in the order in which they were written."""
        columns = self.data
        counts = [None] * len(self) if columns["counts"] is None else columns["counts"].to_pylist()
        names = [self.names[code] for code in self.codes]
        plain = {key: columns[key].tolist() for key in COLUMNS if key not in ("name", "counts")}
        values = {**plain, "name": names, "counts": counts}
        return [HistoryRow(*row) for row in zip(*(values[key] for key in HistoryRow._fields), strict=True)]

    def table_rows(self) -> Sequence[Any]:
        """See `rows`."""
        return self.rows()

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The rows as an Arrow C stream; NaN becomes null."""
        from torchparams.render.arrow import stream

        return stream([_Nulls(row) for row in self.rows()], COLUMNS)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data; a number that was not recorded is null."""
        rows = []
        for row in self.rows():
            found = row._asdict()
            rows.append({key: _json(value) for key, value in found.items()})
        return {
            "source": self.label,
            "format": self.format,
            "steps": list(self.steps),
            "rows": rows,
            "numbers": {name: {str(k): json_number(v) for k, v in each.items()} for name, each in self.numbers.items()},
            "findings": [finding.to_json() for finding in self.findings],
            "repeated": [list(pair) for pair in self.repeated],
        }

    def showing(self, column: str, limit: int | None = ROWS_SHOWN) -> History:
        """Return a copy that prints the curves of another column.

        Raises:
            OptionError: There is no such column.
        """
        if column not in NUMBERS:
            raise OptionError(f"there is no column {column!r}", exists="columns: " + ", ".join(NUMBERS))
        return replace(self, shown=column, limit=limit)

    def tree(self) -> Tree:
        """The table: for each parameter, its norm and a curve of `shown` over the steps."""
        steps = self.steps
        span = f", {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f", {steps[0]:,}" if steps else ""
        groups = sum(name not in self.infos for name in self.names)
        counted = plural(len(self.names) - groups, "parameter") + (f", {plural(groups, 'group')}" if groups else "")
        parts: list[Text | Table] = [
            Text(printable(f"{self.label} ({self.format})"), "title"),
            Text(f"{plural(len(steps), 'step')}{span} · {counted}", "dim"),
        ]
        if self.names:
            columns = (
                Column("name", style="name", shrink=True),
                Column("norm", right=True, drop=1),
                Column("last", right=True, drop=2),
                Column(self.shown.replace("_", " "), right=True),
                Column("last", right=True),
                Column("over steps", style="bars"),
            )
            parts.append(Table(columns, cut([self._shown_row(name) for name in self.names], self.limit)))
        for step, earlier in self.repeated:
            parts.append(Text(f"step {step:,} has the same bytes as step {earlier:,}", "warn"))
        if (overwritten := self.data["overwritten"]).any():
            again = np.unique(self.data["step"][overwritten])
            parts.append(Text(f"{plural(len(again), 'step')} from {again[0]:,} on ran again after a resume", "dim"))
        if self.findings:
            parts += [Text(plural(len(self.findings), "finding"), "warn"), findings_table(self.findings)]
        return Tree(tuple(parts))

    def _shown_row(self, name: str) -> Row:
        found = self[name]
        norms, values = _known(found["weight_norm"]), _known(found[self.shown])
        ends = [number(float(array[i])) if len(array) else "–" for array in (norms, values) for i in (0, -1)]
        if (nonfinite := _known(found["nonfinite"])).any() and nonfinite[-1]:
            ends[1] = "NaN"
        odd = bool(np.nansum(found["nonfinite"]) or np.nansum(found["grad_nonfinite"]))
        head = Cell(name, "error") if odd else name
        return Row((head, *ends, curve(values)))


def curve(values: Array, width: int = _CURVE) -> str:
    """Draw values over time as text, scaled from the minimum to the maximum.

    >>> curve(np.arange(8.0))
    '▁▂▃▄▅▆▇█'
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    if len(values) > width:
        values = values[np.linspace(0, len(values) - 1, width).round().astype(int)]
    low, high = float(values.min()), float(values.max())
    if low == high:
        return _BARS[0] * len(values)
    return "".join(_BARS[round((value - low) / (high - low) * 7)] for value in values.tolist())


class _Nulls:
    """A row with None instead of NaN, which Arrow exports as null."""

    __slots__ = ("_row",)

    def __init__(self, row: HistoryRow) -> None:
        self._row = row

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._row, name)
        return None if isinstance(value, float) and math.isnan(value) else value


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else json_number(value)
    return value


def _take(column: Any, which: Array) -> Any:
    return column[which] if isinstance(column, np.ndarray) else column.take(which)


def _known(values: Array) -> Array:
    found: Array = values[~np.isnan(values)]
    return found
