"""Render statistics: the table, the flags, and unread tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torchparams.errors import UnknownName
from torchparams.left_out import left_out_lines
from torchparams.measure.flags import kinds_of
from torchparams.measure.lost import lines, to_json
from torchparams.measure.numbers import in_order
from torchparams.measure.tensor_stats import COLUMNS
from torchparams.render.result import Result
from torchparams.render.rows import total_of
from torchparams.render.tabular import Tabular
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    human_count,
    human_shape,
    plural,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torchparams.engines.base import Unread
    from torchparams.info import ParameterInfo
    from torchparams.left_out import LeftOut
    from torchparams.measure.flags import Flag
    from torchparams.measure.lost import Lost
    from torchparams.measure.tensor_stats import TensorStats

ROWS_SHOWN = 40
"""Default number of printed rows; rows in the middle are omitted and counted."""

SORT_KEYS: dict[str, Callable[[TensorStats], Any]] = {
    key: attrgetter(key)
    for key in (
        *("name", "numel", "zeros", "nonfinite", "min", "max", "mean", "std"),
        *("l1", "l2", "linf", "entropy", "distinct"),
    )
}
"""Columns to sort by."""


@dataclass(frozen=True, repr=False)
class Stats(Result, Tabular):
    """Statistics of tensors or groups; prints as a table.

    `found["name"]` is a row. Iteration and `len` cover the rows.

    Attributes:
        label: Label of the source.
        format: Format of the source.
        selector: Selector of the tensors; None for all.
        by: Grouping: a word, or the texts of selectors; None for one row per tensor.
        quantiles: Quantiles in the rows.
        rows: Rows in source order, or sorted. Equal to a tuple of rows.
        flags: Flags of tensors, even if rows are groups.
        unread: Tensors whose values cannot be read, with the reason.
        infos: Infos of all tensors, in source order.
        lost: Losses of casts in a plan that is not written yet, by name.
        shown: Quantiles with a column in the table.
        limit: Maximum number of printed rows, flags and unread tensors; None for all.
        wide: Whether the table has all columns, instead of those that fit 80 characters.
        left_out: State of the source outside the table.
        narrow: Note about a `*` of the selector that matches a few tensors where `**` would match many more, or None.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> found = tp.stats({"a": np.arange(4.0).reshape(2, 2), "b": np.zeros((2, 2), np.float16)})
    >>> found["a"].mean, [flag.kind for flag in found.flags]
    (1.5, ['zero'])
    """

    columns = COLUMNS

    label: str
    format: str
    selector: str | None
    by: tuple[str, ...] | None
    quantiles: tuple[float, ...]
    rows: Sequence[TensorStats]
    flags: tuple[Flag, ...]
    unread: tuple[Unread, ...]
    infos: tuple[ParameterInfo, ...]
    lost: Lost = field(default_factory=dict)
    shown: tuple[float, ...] = ()
    limit: int | None = ROWS_SHOWN
    wide: bool = False
    left_out: tuple[LeftOut, ...] = ()
    narrow: str | None = None

    def __iter__(self) -> Iterator[TensorStats]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> TensorStats:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownName.among(name, self._by_name, self.label) from None

    @cached_property
    def _by_name(self) -> dict[str, TensorStats]:
        return {row.name: row for row in self.rows}

    def sorted(self, by: str) -> Stats:
        """Copy with sorted rows.

        Args:
            by: `name`, `numel`, `zeros`, `nonfinite`, `min`, `max`, `mean`, `std`, `l1`, `l2`, `linf`, `entropy` or
                `distinct`; a leading `-` sorts descending. NaN sorts last.

        Raises:
            SelectorError: There is no such column.
        """
        return replace(self, rows=in_order(self.rows, SORT_KEYS, by))

    def table_rows(self) -> tuple[TensorStats, ...]:
        """Rows as a tuple."""
        return tuple(self.rows)

    def tree(self) -> Tree:
        """Tree of the table, the flags, and unread tensors."""
        return _tree(self)

    def to_json(self) -> dict[str, Any]:
        """The statistics as JSON data."""
        return {
            "source": self.label,
            "format": self.format,
            "selector": self.selector,
            "by": None if self.by is None else list(self.by),
            "total": {
                "tensors": len(self.infos),
                "numel": sum(info.numel for info in self.infos),
                "nbytes": sum(info.nbytes for info in self.infos),
            },
            "rows": [row.to_json() for row in self.rows],
            "flags": [flag.to_json() for flag in self.flags],
            "unread": [{"name": each.name, "reason": each.reason} for each in self.unread],
            "left_out": [each.to_json() for each in self.left_out],
            "lost": to_json(self.lost),
        }


_Show = Callable[["TensorStats"], Cell | str]


def _tree(stats: Stats) -> Tree:
    """Tree of statistics; see `Stats.tree`."""
    limit, wide = stats.limit, stats.wide
    title = f"{stats.label} ({stats.format})"
    parts: list[Text | Table] = [Text(printable(title), "title")]
    if stats.rows:
        columns = _columns(stats, wide)
        shown = [column for column, _ in columns]
        rows = cut(_Lazy(stats.rows, [show for _, show in columns]), limit)  # type: ignore[arg-type]  # a sequence
        parts.append(Table(tuple(shown), rows))
    parts.append(Text(total_of(list(stats.infos)), "dim"))
    parts += lines(stats.lost)
    if stats.unread:
        parts.append(Text(f"not read: {plural(len(stats.unread), 'tensor')}", "warn"))
        parts += _lines(((each.name, each.reason) for each in stats.unread), len(stats.unread), limit)
    parts += [Text(stats.narrow, "warn")] if stats.narrow else []
    parts += left_out_lines(stats.left_out)
    if stats.flags:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in kinds_of(stats.flags).items())
        parts.append(Text(f"flags: {kinds}", "warn"))
        parts += _lines(((flag.name, flag.reason) for flag in stats.flags), len(stats.flags), limit)
    return Tree(tuple(parts))


class _Lazy:
    """Rows created as they are printed: a table of 100,000 tensors prints at once."""

    def __init__(self, rows: tuple[TensorStats, ...], shows: list[_Show]) -> None:
        self._rows, self._shows = rows, shows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self[:])

    def __getitem__(self, which: slice) -> list[Row]:
        return [Row(tuple(show(row) for show in self._shows)) for row in self._rows[which]]


def _lines(pairs: Iterable[tuple[str, str]], count: int, limit: int | None) -> list[Text]:
    most = count if limit is None else min(count, limit)
    lines = [Text(printable(f"  {name}: {reason}")) for (name, reason), _ in zip(pairs, range(most), strict=False)]
    if count > most:
        lines.append(Text(f"  … {count - most:,} more …", "dim"))
    return lines


def _columns(stats: Stats, wide: bool) -> list[tuple[Column, _Show]]:
    """Columns with the functions that format their cells. The narrow table omits columns that are always empty."""
    rows = stats.rows
    grouped = stats.by is not None
    head = "group" if grouped else "name"
    odd: list[tuple[Column, _Show]] = [
        (Column(title, right=True), lambda row, key=key: _odd(getattr(row, key)))  # type: ignore[misc]  # key is bound
        for title, key in (("NaN", "nan"), ("+Inf", "posinf"), ("-Inf", "neginf"))
    ]
    found: list[tuple[Column, _Show]] = [(Column(head, style="name", shrink=True), lambda row: row.name)]
    if grouped:
        found.append((Column("tensors", right=True, drop=8), lambda row: f"{row.tensors:,}"))
    if wide and not grouped:
        found.append((Column("shape", drop=12), lambda row: human_shape(row.shape)))
    if wide:
        found.append((Column("dtype", style="dtype", drop=10), lambda row: str(row.dtype or "several")))
    if wide or grouped:
        found.append((Column("numel", right=True, drop=11), lambda row: human_count(row.numel)))
    found += [_numeric(key, key, drop) for key, drop in (("mean", 2), ("std", 0), ("min", 0), ("max", 0))]
    given = stats.quantiles if wide else stats.shown
    found += [_quantile(i, q) for i, q in enumerate(given)]
    if wide or any(row.zeros >= 0.0005 * row.values > 0 for row in rows):
        found.append((Column("zeros", right=True, drop=3), _zeros))
    if wide or any(row.nonfinite for row in rows):
        found += odd if wide else [(Column("NaN/Inf", right=True), lambda row: _odd(row.nonfinite))]
    if wide:
        found += [_numeric(title, key, 13) for title, key in (("L1", "l1"), ("L2", "l2"), ("L∞", "linf"))]
        found.append((Column("bits", right=True, drop=14), lambda row: f"{_bound(row)}{row.entropy:.2f}"))
        found.append((Column("distinct", right=True, drop=15), lambda row: f"{_bound(row)}{row.distinct:,}"))
    found.append((Column("histogram", style="bars", drop=1), lambda row: row.bars.rstrip()))
    return [(replace(column, drop=0), show) for column, show in found] if wide else found


def _numeric(title: str, key: str, drop: int) -> tuple[Column, _Show]:
    return Column(title, right=True, drop=drop), lambda row: number(getattr(row, key))


def _quantile(i: int, q: float) -> tuple[Column, _Show]:
    return Column(f"{100 * q:.6g}%", right=True, drop=9), lambda row: number(row.quantiles[i][1])


def _zeros(row: TensorStats) -> Cell | str:
    if not row.zeros:
        return ""
    share = row.zeros / row.values
    return "0%" if share < 0.0005 else f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def _bound(row: TensorStats) -> str:
    """Mark for a lower bound; a single value is always exact."""
    return "" if row.exact or row.min == row.max or not row.values else "≥ "


def _odd(count: int) -> Cell | str:
    return Cell(f"{count:,}", "error") if count else ""


def number(value: float) -> str:
    """Number with three significant digits and at most eight characters; `–` for NaN.

    >>> number(0.0213456), number(-0.000123456), number(12345678), number(1e-10)
    ('0.0213', '-1.23e-4', '1.23e7', '1e-10')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value) or value == 0:
        return f"{value:g}".lstrip("-") if value == 0 else f"{value:g}"
    if isinstance(value, int) and abs(value) < 100_000:
        return str(value)
    if 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    if 1000 <= abs(value) < 9999.5:
        return f"{value:.0f}"
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
