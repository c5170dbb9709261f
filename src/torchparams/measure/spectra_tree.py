"""Result of `spectra`: rows and their table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torchparams.errors import UnknownName
from torchparams.left_out import left_out_lines
from torchparams.measure.numbers import in_order
from torchparams.measure.stats_tree import number
from torchparams.render.result import Result
from torchparams.render.tabular import Tabular
from torchparams.render.tree import Column, Row, Table, Text, Tree, cut, json_number, plural, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torchparams.dtypes import DType
    from torchparams.engines.base import Unread
    from torchparams.left_out import LeftOut

ROWS_SHOWN = 40
"""Default number of rows to print; the middle of longer tables is omitted and counted."""

_KEYS = (
    *("name", "spectral_norm", "nuclear_norm", "stable_rank", "effective_rank"),
    *("condition", "tail_exponent", "edge", "spikes"),
)


def _key(name: str) -> Callable[[Spectrum], Any]:
    def value(row: Spectrum) -> Any:
        found = getattr(row, name)
        return math.nan if found is None else found

    return value


SORT_KEYS = {key: _key(key) for key in _KEYS}
"""Columns that rows can be sorted by; rows without a value come last."""

COLUMNS = {
    "name": str,
    "shape": list[int],
    "dtype": str,
    "singular_values": list[float],
    "spectral_norm": float,
    "nuclear_norm": float,
    "stable_rank": float,
    "effective_rank": float,
    "rank": int,
    "condition": float,
    "is_bound": bool,
    "tail_exponent": float,
    "tail_distance": float,
    "edge": float,
    "spikes": int,
}

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 10


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values σ₁ ≥ σ₂ ≥ … of a matrix, and quantities computed from them.

    Attributes:
        name: Name of the tensor; followed by `[i]` for a matrix of a stack.
        shape: Rows and columns of the matrix.
        dtype: dtype of the tensor.
        singular_values: All singular values, descending; None if they are estimated.
        spectral_norm: σ₁.
        nuclear_norm: Σσ.
        stable_rank: Σσ² / σ₁² (Rudelson and Vershynin, 2007).
        effective_rank: exp of the entropy of σ / Σσ (Roy and Vetterli, 2007).
        rank: Number of singular values above 10⁻⁵ σ₁; None if they are estimated.
        condition: σ₁ / σₙ; None if they are estimated.
        is_bound: Whether the condition number is a lower bound, because σₙ is below 10⁻⁵ σ₁.
        tail_exponent: α of the power law x^−α fitted to the tail of the eigenvalues σ² by maximum likelihood. The tail
            starts at the smallest Kolmogorov–Smirnov distance (Clauset, Shalizi and Newman, 2009), as in WeightWatcher
            (Martin and Mahoney, 2021). None for fewer than 50 singular values, or estimates.
        tail_distance: Kolmogorov–Smirnov distance of that fit.
        edge: Expected largest singular value of a matrix with independent entries of the same mean square: s · (√m +
            √n) (Marchenko and Pastur, 1967).
        spikes: Number of singular values above the edge; None if they are estimated.
        errors: Absolute error of each estimate: a bound for `spectral_norm` and `stable_rank`, a standard error for
            `nuclear_norm` and `effective_rank`. Empty if all singular values were computed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    singular_values: tuple[float, ...] | None
    spectral_norm: float
    nuclear_norm: float
    stable_rank: float
    effective_rank: float
    rank: int | None
    condition: float | None
    is_bound: bool
    tail_exponent: float | None
    tail_distance: float | None
    edge: float
    spikes: int | None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def bars(self) -> str:
        """Sketch of the singular values as text, from the largest to the smallest, with linear height."""
        values = self.singular_values
        if not values or not values[0]:
            return ""
        last = len(values) - 1
        shown = [values[round(i * last / (_WIDTH - 1))] / values[0] for i in range(_WIDTH)] if last else [1.0]
        return "".join(_BARS[max(round(value * 8), 1 if value > 0 else 0)] for value in shown)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON data."""
        values = self.singular_values
        found = {key: getattr(self, key) for key in COLUMNS}
        return {
            **{key: json_number(value) if isinstance(value, float) else value for key, value in found.items()},
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "singular_values": None if values is None else list(values),
            "errors": dict(self.errors),
        }


@dataclass(frozen=True, repr=False)
class Spectra(Result, Tabular):
    """Singular values of matrices; prints as a table.

    `found["name"]` is a row; iteration and `len` cover the rows.

    Attributes:
        label: Label of the source.
        format: The kind of source.
        selector: Selector of the tensors; None for all.
        rows: Rows, in the order of the source until sorted.
        unread: Matrices that could not be measured, with reasons.
        others: Number of tensors that are not matrices: scalars and vectors.
        limit: Maximum number of rows to print; None for all.
        left_out: State of the source that is in no row.
        narrow: Hint if a `*` in the selector matches a few tensors where `**` would match many more.
    """

    columns = COLUMNS

    label: str
    format: str
    selector: str | None
    rows: tuple[Spectrum, ...]
    unread: tuple[Unread, ...]
    others: int
    limit: int | None = ROWS_SHOWN
    left_out: tuple[LeftOut, ...] = ()
    narrow: str | None = None

    def __iter__(self) -> Iterator[Spectrum]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Spectrum:
        for row in self.rows:
            if row.name == name:
                return row
        raise UnknownName.among(name, [row.name for row in self.rows], self.label)

    def sorted(self, by: str) -> Spectra:
        """Return a copy with sorted rows.

        Args:
            by: `name`, `spectral_norm`, `nuclear_norm`, `stable_rank`, `effective_rank`, `condition`, `tail_exponent`,
                `edge` or `spikes`; with `-` before it for descending order. Rows without a value come last.

        Raises:
            SelectorError: `by` is not one of these.
        """
        return replace(self, rows=in_order(self.rows, SORT_KEYS, by))

    def table_rows(self) -> tuple[Spectrum, ...]:
        """The rows."""
        return self.rows

    def tree(self) -> Tree:
        """The table, followed by the tensors that were not measured."""
        parts: list[Text | Table] = [Text(printable(f"{self.label} ({self.format})"), "title")]
        if self.rows:
            columns = (
                Column("name", style="name", shrink=True),
                Column("matrix", drop=5),
                Column("σ₁", right=True),
                Column("nuclear", right=True, drop=3),
                Column("stable", right=True),
                Column("effective", right=True, drop=2),
                Column("condition", right=True, drop=4),
                Column("tail α", right=True, drop=1),
                Column("spikes", right=True, drop=6),
                Column("spectrum", style="bars", drop=7),
            )
            parts.append(Table(columns, cut([_shown(row) for row in self.rows], self.limit)))
        total = plural(len(self.rows), "matrix", "matrices")
        if self.others:
            total += f" · {plural(self.others, 'vector or scalar', 'vectors and scalars')} left out"
        parts.append(Text(total, "dim"))
        if any(row.errors for row in self.rows):
            parts.append(Text("~: estimated; --json has the error of each", "dim"))
        if self.unread:
            parts.append(Text(f"not measured: {plural(len(self.unread), 'tensor')}", "warn"))
            shown = self.unread[: self.limit]
            parts += [Text(printable(f"  {each.name}: {each.reason}")) for each in shown]
            parts += [Text(f"  … {more:,} more …", "dim")] if (more := len(self.unread) - len(shown)) else []
        parts += [Text(self.narrow, "warn")] if self.narrow else []
        parts += left_out_lines(self.left_out)
        return Tree(tuple(parts))

    def to_json(self) -> dict[str, Any]:
        """The result as JSON data."""
        return {
            "source": self.label,
            "format": self.format,
            "selector": self.selector,
            "rows": [row.to_json() for row in self.rows],
            "unread": [{"name": each.name, "reason": each.reason} for each in self.unread],
            "others": self.others,
            "left_out": [each.to_json() for each in self.left_out],
        }


def _shown(row: Spectrum) -> Row:
    def value(key: str) -> str:
        found = getattr(row, key)
        if found is None:
            return "–"
        return ("~" if key in row.errors else "") + number(found)

    condition = "–" if row.condition is None else ("> " if row.is_bound else "") + number(row.condition)
    return Row(
        (
            row.name,
            "×".join(map(str, row.shape)),
            value("spectral_norm"),
            value("nuclear_norm"),
            value("stable_rank"),
            value("effective_rank"),
            condition,
            value("tail_exponent"),
            "–" if row.spikes is None else f"{row.spikes:,}",
            row.bars,
        )
    )
