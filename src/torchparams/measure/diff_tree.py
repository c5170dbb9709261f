"""Render differences: a summary line, then tables of what differs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torchparams.errors import UnknownName
from torchparams.left_out import left_out_lines
from torchparams.measure.diff_rows import COLUMNS, GROUP_COLUMNS, SAME, STATUSES, GroupDiff, TensorDiff
from torchparams.measure.lost import lines, to_json
from torchparams.measure.numbers import in_order
from torchparams.parameters import ROWS_SHOWN
from torchparams.render.result import Result
from torchparams.render.tabular import Tabular
from torchparams.render.tree import (
    Cell,
    Column,
    Gap,
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
    from collections.abc import Callable, Iterator, Sequence

    from torchparams.info import ParameterInfo
    from torchparams.left_out import LeftOut
    from torchparams.measure.diff_rows import TensorDiff
    from torchparams.measure.lost import Lost
    from torchparams.renames import Renames
    from torchparams.render.tabular import Columns
    from torchparams.sketch.compared import Compared

SORT_KEYS: dict[str, Callable[[TensorDiff], Any]] = {
    "name": lambda row: row.name,
    "numel": lambda row: row.numel,
    "changed": lambda row: row.changed,
    "share": lambda row: row.share,
    "max": lambda row: _or(math.inf, row.max, row),
    "relative": lambda row: _or(math.inf, row.relative, row),
    "cosine": lambda row: _or(-math.inf, row.cosine, row),
}
"""Columns to sort by."""


def _or(most: float, value: float, row: TensorDiff) -> float:
    """Value of a row, or `most` if a NaN or infinity appeared or disappeared: that counts as the largest difference."""
    return most if row.nan_a or row.nan_b or row.infinite else value


@dataclass(frozen=True, repr=False)
class Diff(Result, Tabular):
    """Differences between A and B; prints as a table.

    `found["name"]` is a row. Iteration and `len` cover all rows, including equal tensors.

    Attributes:
        a, b: Labels of the sources.
        selector: Selector of the tensors; None for all.
        numeric: Whether values were compared, instead of bits.
        rename: Rename applied to the names of B, or None.
        proposal: Rename that would pair more tensors, if none was requested.
        part: Target of a mapping inside one checkpoint that shares more names with the other source, or None.
        part_proposal: Rename that `part` needs, or None.
        rows: One row per tensor, in A's order; tensors only in B come last.
        by: Grouping, or None.
        groups: Groups of rows.
        limit: Maximum number of rows shown; None for all.
        left_out_a, left_out_b: State of each source outside the table, not compared.
        lost: Losses of casts in plans that are not written yet, by name.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> a = {"w": np.array([3.0, 4.0]), "b": np.zeros(2)}
    >>> found = tp.diff(a, {"w": np.array([3.0, 3.0]), "b": np.zeros(2)})
    >>> found.same, found["b"].status, found["w"].share, found["w"].max, found["w"].relative
    (False, 'identical', 0.5, 1.0, 0.2)
    """

    a: str
    b: str
    selector: str | None
    numeric: bool
    rename: Renames | None
    proposal: Renames | None
    rows: tuple[TensorDiff, ...]
    by: tuple[str, ...] | None = None
    groups: tuple[GroupDiff, ...] = ()
    limit: int | None = ROWS_SHOWN
    left_out_a: tuple[LeftOut, ...] = ()
    left_out_b: tuple[LeftOut, ...] = ()
    part: str | None = None
    part_proposal: Renames | None = None
    lost: Lost = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether every tensor is in both sources and equal, and no state was left out.

        False if nothing was compared.
        """
        if not self.rows or self.left_out_a or self.left_out_b:
            return False
        return all(row.status in SAME for row in self.rows)

    @property
    def differing(self) -> tuple[TensorDiff, ...]:
        """Rows of tensors that differ, or are in one source only."""
        return tuple(row for row in self.rows if row.status not in SAME)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of tensors of each status."""
        found = dict.fromkeys(STATUSES, 0)
        for row in self.rows:
            found[row.status] += 1
        return found

    @cached_property
    def total(self) -> GroupDiff:
        """All tensors as one group."""
        return GroupDiff.of("total", self.rows)

    def __iter__(self) -> Iterator[TensorDiff]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> TensorDiff:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownName.among(name, self._by_name, f"{self.a} and {self.b}") from None

    @cached_property
    def _by_name(self) -> dict[str, TensorDiff]:
        return {row.name: row for row in self.rows}

    def sorted(self, by: str) -> Diff:
        """Copy with sorted rows.

        Args:
            by: `name`, `numel`, `changed`, `share`, `max`, `relative` or `cosine`; a leading `-` sorts descending. NaN
                sorts last.

        Raises:
            SelectorError: There is no such column.
        """
        return replace(self, rows=in_order(self.rows, SORT_KEYS, by))

    @property
    def columns(self) -> Columns:
        """Types of the columns of `table_rows`, by attribute."""
        return COLUMNS if self.by is None else GROUP_COLUMNS

    def table_rows(self) -> tuple[TensorDiff, ...] | tuple[GroupDiff, ...]:
        """Rows for other libraries: one per tensor, or one per group if grouped."""
        return self.rows if self.by is None else self.groups

    def tree(self) -> Tree:
        """Tree of the differences, with a count of equal tensors."""
        return _tree(self)

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON data. Equal tensors are only counted."""
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "selector": self.selector,
            "numeric": self.numeric,
            "rename": None if self.rename is None else self.rename.to_json(),
            "proposal": None if self.proposal is None else str(self.proposal),
            "part": self.part,
            "part_proposal": None if self.part_proposal is None else str(self.part_proposal),
            "counts": dict(self.counts),
            "total": self.total.to_json(),
            "by": None if self.by is None else list(self.by),
            "groups": [group.to_json() for group in self.groups],
            "tensors": [row.to_json() for row in self.differing],
            "left_out": {
                "a": [each.to_json() for each in self.left_out_a],
                "b": [each.to_json() for each in self.left_out_b],
            },
            "lost": to_json(self.lost),
        }


_WORDS = {
    "changed": "changed",
    "shape": "of different shape",
    "dtype": "of different dtype",
    "only_a": "only in A",
    "only_b": "only in B",
    "unread": "not compared",
}


def _tree(diff: Diff) -> Tree:
    """Tree of a comparison; see `Diff.tree`."""
    parts: list[Text | Table] = [
        Text(printable(f"A  {diff.a}"), "title"),
        Text(printable(f"B  {diff.b}"), "title"),
    ]
    if diff.rename is not None and diff.rename:
        parts.append(Text(printable(f"names of B: {diff.rename}"), "dim"))
    if diff.groups:
        parts.append(_group_table(diff))
    else:
        changed = [row for row in diff.rows if row.status == "changed"]
        if changed:
            parts.append(_changed_table(diff, changed))
        for status in ("shape", "dtype"):
            rows = [row for row in diff.rows if row.status == status]
            if rows:
                parts.append(_apart_table(_WORDS[status], rows, diff.limit))
        for status in ("only_a", "only_b"):
            rows = [row for row in diff.rows if row.status == status]
            if rows:
                parts.append(_one_side_table(_WORDS[status], rows, diff.limit))
        unread = [row for row in diff.rows if row.status == "unread"]
        if unread:
            columns = (Column(_WORDS["unread"], style="name", shrink=True), Column("because", wraps=True))
            parts.append(Table(columns, _shown(unread, diff.limit, lambda row: (row.name, row.reason))))
    for side, found in (("A", diff.left_out_a), ("B", diff.left_out_b)):
        parts += [
            Text(f"{side}, {line.text}" if i == 0 else line.text, line.style)
            for i, line in enumerate(left_out_lines(found))
        ]
    parts.append(_verdict(diff))
    parts += lines(diff.lost)
    if diff.part is not None and diff.part_proposal is not None:
        text = f"compare {diff.part} with --rename auto (rename='auto'): {diff.part_proposal}"
        parts.append(Text(printable(text), "warn"))
    elif diff.part is not None:
        parts.append(Text(printable(f"compare {diff.part}: it has the tensors of the other source"), "warn"))
    elif diff.proposal is not None:
        parts.append(Text(printable(f"more names match with --rename auto (rename='auto'): {diff.proposal}"), "warn"))
    if diff.counts["dtype"] and not diff.numeric:
        parts.append(Text("to compare values across dtypes, pass --numeric (numeric=True)", "dim"))
    return Tree(tuple(parts))


def _verdict(diff: Diff) -> Text:
    if not diff.rows:
        return Text("nothing was compared: neither source has tensors", "warn")
    counts, total = diff.counts, diff.total
    same = "equal in value" if diff.numeric else "identical"
    many = counts["identical"] + counts["equal"]
    if diff.same:
        size = f"{human_count(total.numel)} elements" if total.numel >= 1000 else plural(total.numel, "element")
        bits = "" if diff.numeric else ", bit for bit"
        return Text(f"{same}{bits}: {plural(many, 'tensor')}, {size}", "good")
    parts = [f"{counts[status]:,} {words}" for status, words in _WORDS.items() if counts[status]]
    if diff.left_out_a or diff.left_out_b:
        parts.append("state outside the table, not compared")
    return Text(f"{' · '.join(parts)} · {many:,} {same}", "warn")


def _shown(
    rows: Sequence[TensorDiff], limit: int | None, cells: Callable[[TensorDiff], tuple[Cell | str, ...]]
) -> tuple[Row | Gap, ...]:
    """Rows to show, without creating others."""
    if limit is None or len(rows) <= limit:
        return tuple(Row(cells(row)) for row in rows)
    head = (limit + 1) // 2
    ends = [Row(cells(row)) for row in (*rows[:head], *rows[len(rows) - (limit - head) :])]
    return (*ends[:head], Gap(f"… {len(rows) - limit:,} more tensors …"), *ends[head:])


def _changed_table(diff: Diff, rows: Sequence[TensorDiff]) -> Table:
    nan = any(row.nan_a or row.nan_b for row in rows)
    types = any(row.a is not None and row.b is not None and row.a.dtype != row.b.dtype for row in rows)
    quantised = any(side is not None and side.encoded is not None for row in rows for side in (row.a, row.b))
    columns = (
        Column("changed", style="name", shrink=True),
        Column("shape", drop=3),
        *([Column("dtype", style="dtype", drop=2)] if types else []),
        Column("elements", right=True, drop=1),
        Column("max |Δ|", right=True, style="number"),
        Column("rel. L2", right=True, style="number"),
        Column("cosine", right=True, style="number", drop=4),
        *([Column("SQNR", right=True, style="number")] if quantised else []),
        *([Column("NaN in A, B only", right=True)] if nan else []),
    )

    def cells(row: TensorDiff) -> tuple[Cell | str, ...]:
        return (
            row.name,
            human_shape(row.info.shape),
            *([_dtypes(row)] if types else []),
            share(row.changed, row.numel),
            *_numbers(row.compared, row.max, row.relative, row.cosine),
            *([f"{row.sqnr:.1f} dB" if math.isfinite(row.sqnr) else ""] if quantised else []),
            *([Cell(f"{row.nan_a:,}, {row.nan_b:,}", "error" if row.nan_b else "")] if nan else []),
        )

    shown = _shown(rows, diff.limit, cells)
    if len(rows) > 1:
        total, compared = diff.total, diff.total.compared
        norms = _group_numbers(total)
        last = ("total", "", *[""] * types, share(compared.changed, total.numel), *norms, *[""] * (quantised + nan))
        shown = (*shown, Row(last, total=True))
    return Table(columns, shown)


def _group_table(diff: Diff) -> Table:
    columns = (
        Column("by " + " | ".join(diff.by or ()), style="name", shrink=True),
        Column("differ", right=True),
        Column("tensors", right=True, drop=1),
        Column("elements", right=True, drop=2),
        Column("max |Δ|", right=True, style="number", drop=3),
        Column("rel. L2", right=True, style="number"),
        Column("cosine", right=True, style="number", drop=4),
    )

    def row(group: GroupDiff, total: bool = False) -> Row:
        compared = group.compared
        quiet = not group.differing
        texts = (
            f"{group.differing:,}",
            f"{group.tensors:,}",
            share(compared.changed, group.numel) if group.numel else "",
            *_group_numbers(group),
        )
        return Row((group.name, *(Cell(text, "dim") if quiet else text for text in texts)), 0, total)

    rows = cut([row(group) for group in diff.groups], diff.limit, "groups")
    return Table(columns, (*rows, row(diff.total, total=True)))


def _group_numbers(group: GroupDiff) -> tuple[str, ...]:
    compared = group.compared
    if not group.numbers:
        return ("", "", "")
    return _numbers(compared, compared.greatest, compared.relative, group.cosine)


def _numbers(compared: Compared | None, greatest: float, relative: float, angle: float) -> tuple[str, ...]:
    """The three numbers as text; NaN if a NaN appeared or disappeared, blank if there is no number."""
    missing = "NaN" if compared is not None and (compared.nan_a or compared.nan_b) else ""
    return number(greatest) or missing, number(relative) or missing, cosine(angle) or missing


def _apart_table(title: str, rows: Sequence[TensorDiff], limit: int | None) -> Table:
    columns = (Column(title, style="name", shrink=True), Column("in A"), Column("in B"))
    return Table(columns, _shown(rows, limit, lambda row: (row.name, _described(row.a), _described(row.b))))


def _one_side_table(title: str, rows: Sequence[TensorDiff], limit: int | None) -> Table:
    columns = (Column(title, style="name", shrink=True), Column("shape"), Column("dtype", style="dtype", drop=1))
    return Table(columns, _shown(rows, limit, lambda row: (row.name, human_shape(row.info.shape), str(row.info.dtype))))


def _described(info: ParameterInfo | None) -> str:
    return "" if info is None else f"{human_shape(info.shape)} {info.dtype}"


def _dtypes(row: TensorDiff) -> str:
    a, b = row.a, row.b
    assert a is not None
    assert b is not None
    return str(a.dtype) if a.dtype == b.dtype else f"{a.dtype} → {b.dtype}"


def share(changed: int, numel: int) -> str:
    """Share of changed elements in percent. Only exact values print as 0 % and 100 %.

    >>> share(1, 3), share(1, 10**9), share(10**9 - 1, 10**9), share(5, 5)
    ('33.3 %', '< 0.1 %', '> 99.9 %', '100 %')
    """
    if changed == 0:
        return "0 %"
    if changed == numel:
        return "100 %"
    percent = 100 * changed / numel
    return "< 0.1 %" if percent < 0.1 else "> 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


def number(value: float) -> str:
    """Number with four digits; longer integers in full.

    >>> number(0.000123456), number(2**60 + 1), number(0.0), number(float("nan"))
    ('0.0001235', '1152921504606846977', '0', '')
    """
    if isinstance(value, float) and math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def cosine(value: float) -> str:
    """Cosine as text; near 1, as the distance from 1.

    >>> cosine(0.5), cosine(1 - 1e-6), cosine(1.0), cosine(-1.0)
    ('0.50000', '1 - 1.0e-06', '1', '-1')
    """
    if math.isnan(value):
        return ""
    if value in (1, -1):
        return f"{value:.0f}"
    return f"1 - {1 - value:.1e}" if value > 0.9999 else f"{value:.5f}"
