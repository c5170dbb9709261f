"""How a difference looks: in a line what there is, then tables of what differs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchparams.left_out import left_out_lines
from torchparams.measure.lost import lines
from torchparams.render.tree import (
    Cell,
    Column,
    Gap,
    Report,
    Row,
    Table,
    Text,
    cut,
    human_count,
    human_shape,
    plural,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchparams.info import ParameterInfo
    from torchparams.measure.diff import Diff
    from torchparams.measure.diff_rows import GroupDiff, TensorDiff
    from torchparams.sketch.compared import Compared

_WORDS = {
    "changed": "changed",
    "shape": "of another shape",
    "dtype": "of another dtype",
    "only_a": "only in A",
    "only_b": "only in B",
    "unread": "not compared",
}


def report(diff: Diff) -> Report:
    """The report of `diff`; see `Diff.report`."""
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
    if diff.part is not None:
        parts.append(Text(printable(f"{diff.part} holds what the other has: compare that"), "warn"))
    elif diff.proposal is not None:
        parts.append(Text(printable(f"more names meet with --rename auto (rename='auto'): {diff.proposal}"), "warn"))
    if diff.counts["dtype"] and not diff.numeric:
        parts.append(Text("with --numeric (numeric=True), values are compared across dtypes", "dim"))
    return Report(tuple(parts))


def _verdict(diff: Diff) -> Text:
    if not diff.rows:
        return Text("nothing was compared: there are no tensors in either", "warn")
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
    """Rows for those that are shown; no others are made."""
    if limit is None or len(rows) <= limit:
        return tuple(Row(cells(row)) for row in rows)
    head = (limit + 1) // 2
    ends = [Row(cells(row)) for row in (*rows[:head], *rows[len(rows) - (limit - head) :])]
    return (*ends[:head], Gap(f"… {len(rows) - limit:,} more tensors …"), *ends[head:])


def _changed_table(diff: Diff, rows: Sequence[TensorDiff]) -> Table:
    nan = any(row.nan_a or row.nan_b for row in rows)
    types = any(row.a is not None and row.b is not None and row.a.dtype != row.b.dtype for row in rows)
    columns = (
        Column("changed", style="name", shrink=True),
        Column("shape", drop=3),
        *([Column("dtype", style="dtype", drop=2)] if types else []),
        Column("elements", right=True, drop=1),
        Column("max |Δ|", right=True, style="number"),
        Column("rel. L2", right=True, style="number"),
        Column("cosine", right=True, style="number", drop=4),
        *([Column("NaN in A, B only", right=True)] if nan else []),
    )

    def cells(row: TensorDiff) -> tuple[Cell | str, ...]:
        return (
            row.name,
            human_shape(row.info.shape),
            *([_dtypes(row)] if types else []),
            share(row.changed, row.numel),
            *_numbers(row.compared, row.max, row.relative, row.cosine),
            *([Cell(f"{row.nan_a:,}, {row.nan_b:,}", "error" if row.nan_b else "")] if nan else []),
        )

    shown = _shown(rows, diff.limit, cells)
    if len(rows) > 1:
        total, compared = diff.total, diff.total.compared
        norms = _group_numbers(total)
        last = ("total", "", *[""] * types, share(compared.changed, total.numel), *norms, *[""] * nan)
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
    """The three numbers as they are printed; NaN where a NaN came or went, nothing where there is no number."""
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
    """How many of some elements changed, in percent; 0 % and 100 % are none and all of them, nothing less.

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
    """A number in four digits; an integer that has more in full.

    >>> number(0.000123456), number(2**60 + 1), number(0.0), number(float("nan"))
    ('0.0001235', '1152921504606846977', '0', '')
    """
    if isinstance(value, float) and math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def cosine(value: float) -> str:
    """A cosine; near 1, how far it is from it.

    >>> cosine(0.5), cosine(1 - 1e-6), cosine(1.0), cosine(-1.0)
    ('0.50000', '1 - 1.0e-06', '1', '-1')
    """
    if math.isnan(value):
        return ""
    if value in (1, -1):
        return f"{value:.0f}"
    return f"1 - {1 - value:.1e}" if value > 0.9999 else f"{value:.5f}"
