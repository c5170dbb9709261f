"""Trees of texts and tables: what a result shows, independent of the output format.

A tree can be printed (`str(tree)`: plain text, by `to_text`), shown in a terminal with colour and limited width
(`torchparams.render.terminal`), or shown in a notebook (`to_html`). Programs read the attributes and `to_json()` of a
result instead.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torchparams.errors import printable as printable
from torchparams.render.cut import elide, elide_all, width_of

STYLES = ("name", "number", "dim", "good", "warn", "error", "title", "dtype", "bars")
"""Styles of cells; each renderer defines their appearance."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Text with a style: one of `STYLES`, or empty."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """Column of a table.

    If a table is wider than the screen: first, columns with `yields` are shortened; then columns with `drop` are
    omitted; last, columns with `shrink` are shortened.

    Attributes:
        title: Heading.
        right: Align right, for numbers.
        style: Default style of cells. Shortened cells of the style `name` stay distinct.
        shrink: May be shortened in the middle.
        yields: May be shortened before any column is omitted.
        wraps: Wrap text to further lines; only for the last column.
        drop: Priority for omission: the highest number goes first; 0 for never.
    """

    title: str
    right: bool = False
    style: str = ""
    shrink: bool = False
    yields: bool = False
    wraps: bool = False
    drop: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """Row of a table: cells, depth in a tree of rows, and whether it is a total."""

    cells: tuple[Cell | str, ...]
    depth: int = 0
    total: bool = False


@dataclass(frozen=True, slots=True)
class Gap:
    """Placeholder for omitted rows; `text` tells how many."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns. With `tree`, the first column is indented by the depth of each row."""

    columns: tuple[Column, ...]
    rows: tuple[Row | Gap, ...]
    tree: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Line or paragraph. Unprintable characters are escaped, but not newlines: names must not contain any."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Tree:
    """Sequence of texts and tables."""

    parts: tuple[Text | Table, ...] = field(default=())

    def __str__(self) -> str:
        return to_text(self)


def cut(rows: Sequence[Row], limit: int | None, what: str = "rows") -> tuple[Row | Gap, ...]:
    """Omit and count the middle rows if there are more than `limit`."""
    if limit is None or len(rows) <= limit:
        return tuple(rows)
    head = (limit + 1) // 2
    tail = limit - head
    left_out = len(rows) - head - tail
    return (*rows[:head], Gap(f"… {left_out:,} more {what} …"), *rows[len(rows) - tail :])


def cell_text(cell: Cell | str) -> str:
    """Text of a cell with unprintable characters escaped: names come from untrusted files."""
    text = cell if isinstance(cell, str) else cell.text
    return printable(text)


_LEAST_WRAPPING = 30
_LEAST_YIELDING = 12
_LEAST_SHRINKING = 8


def least_width(column: Column, width: int, texts: Iterable[str]) -> int:
    """Minimum width of a column before columns are omitted; `width` if the column is not shortened that early."""
    if column.wraps:
        return min(width, _LEAST_WRAPPING)
    if column.yields:
        return min(width, max(_LEAST_YIELDING, width_of(column.title)))
    if column.shrink and column.style == "name":  # the other names of a tied tensor are shortened
        names = (text.partition(" = ") for text in texts)
        needed = (width_of(name) + min(width_of(equals + others), 4) for name, equals, others in names)
        return min(width, max(needed, default=0) or width)
    return width


def fit(
    widths: Sequence[int], least: Sequence[int], columns: Sequence[Column], room: int
) -> tuple[list[int], list[int]]:
    """Choose the columns to show in a given width, and the width of each.

    Args:
        widths: Full width of each column.
        least: Minimum width of each before columns are omitted; see `Column`.
        columns: Columns of the table.
        room: Width of the screen.
    """
    shown = list(range(len(columns)))

    def over(taken: Sequence[int]) -> int:
        return sum(taken[i] for i in shown) + 2 * (len(shown) - 1) - room

    while over(least) > 0 and (may := [i for i in shown if columns[i].drop]):
        shown.remove(max(may, key=lambda i: columns[i].drop))
    fitted = list(widths)
    ends = [max(_LEAST_SHRINKING, width_of(column.title)) if column.shrink else 0 for column in columns]
    for floors in (least, [end or width for end, width in zip(ends, widths, strict=True)]):
        while over(fitted) > 0 and (may := [i for i in shown if fitted[i] > floors[i]]):
            fitted[max(may, key=lambda i: fitted[i])] -= 1
    return shown, fitted


def table_cells(table: Table) -> Iterator[tuple[Row | Gap, list[str]]]:
    """Each row with the texts of its cells, indented in a tree."""
    for row in table.rows:
        if isinstance(row, Gap):
            yield row, [printable(row.text)]
            continue
        texts = [cell_text(cell) for cell in row.cells]
        if table.tree and texts:
            texts[0] = "  " * row.depth + texts[0]
        yield row, texts


Paint = Callable[[str, str], str]
"""Function that styles a text; its arguments are the text and one of `STYLES`, `heading`, or empty."""


def _plain(text: str, style: str) -> str:
    return text


def to_text(tree: Tree, width: int | None = None, paint: Paint = _plain) -> str:
    """Tree as text, limited to `width` columns if given, and styled by `paint`."""
    return "\n".join(line for part in tree.parts for line in _lines(part, width, paint))


def _lines(part: Text | Table, width: int | None, paint: Paint) -> Iterator[str]:
    if isinstance(part, Text):
        for line in part.text.split("\n"):
            line = printable(line)
            yield from (paint(piece, part.style) if piece else "" for piece in _prose(line, width))
        return
    columns = part.columns
    rows = list(table_cells(part))
    widths = [width_of(column.title) for column in columns]
    for row, texts in rows:
        if isinstance(row, Row):
            for i, text in enumerate(texts):
                widths[i] = max(widths[i], width_of(text))
    shown = list(range(len(columns)))
    if width is not None:
        full = widths
        least = [
            least_width(column, full[i], (texts[i] for row, texts in rows if isinstance(row, Row)))
            for i, column in enumerate(columns)
        ]
        shown, widths = fit(full, least, columns, width)
        for i in shown:
            if widths[i] < full[i] and not columns[i].wraps:
                widths[i] = _cut_column(rows, i, widths[i], columns[i])
    dropped = [column.title for i, column in enumerate(columns) if i not in shown]
    columns, widths = tuple(columns[i] for i in shown), [widths[i] for i in shown]
    if any(column.title for column in columns):
        headings = ["heading"] * len(columns)
        yield _line([column.title for column in columns], columns, widths, headings, paint)
    for row, texts in rows:
        if isinstance(row, Gap):
            yield paint(texts[0], "dim")
            continue
        if row.total:
            yield paint("─" * (sum(widths) + 2 * (len(widths) - 1)), "dim")
        cells = [row.cells[i] for i in shown]
        styles = [
            column.style if isinstance(cell, str) else cell.style or column.style
            for cell, column in zip(cells, columns, strict=True)
        ]
        texts = [texts[i] for i in shown]
        more: list[str] = []
        if columns[-1].wraps and width_of(texts[-1]) > widths[-1]:
            texts[-1], *more = _wrapped(texts[-1], widths[-1], break_long_words=True)
        yield _line(texts, columns, widths, styles, paint)
        indent = " " * (sum(widths[:-1]) + 2 * (len(widths) - 1))
        yield from (indent + paint(line, styles[-1]) for line in more)
    if dropped:
        yield from _lines(Text(f"not shown in {width} columns: {', '.join(dropped)}", "dim"), width, paint)


def _prose(line: str, width: int | None) -> list[str]:
    if width is None or width_of(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip(" ")))
    first, *more = _wrapped(line.lstrip(" "), max(width - len(indent) - 2, 1), break_long_words=False)
    return [indent + first, *(f"{indent}  {each}" for each in more)]


def _wrapped(text: str, width: int, *, break_long_words: bool) -> list[str]:
    """Wrap prose at spaces, in lines of `width` columns."""
    import textwrap  # imported late: listing a file needs none of it

    return textwrap.wrap(text, width, break_long_words=break_long_words, break_on_hyphens=False)


def _cut_column(rows: Sequence[tuple[Row | Gap, list[str]]], i: int, width: int, column: Column) -> int:
    """Shorten the texts of a column, and return its new width."""
    cells = [texts for row, texts in rows if isinstance(row, Row)]
    each = (texts[i] for texts in cells)
    cut = elide_all(each, width) if column.style == "name" else {text: elide(text, width) for text in each}
    for texts in cells:
        texts[i] = cut[texts[i]]
    return min(width, max(map(width_of, (column.title, *cut.values()))))


def _line(
    texts: Sequence[str], columns: Sequence[Column], widths: Sequence[int], styles: Sequence[str], paint: Paint
) -> str:
    parts = []
    last = max((i for i, text in enumerate(texts) if text), default=0)  # no trailing spaces
    for i in range(last + 1):
        pad = " " * (widths[i] - width_of(texts[i]))
        painted = paint(texts[i], styles[i]) if texts[i] else ""
        parts.append(pad + painted if columns[i].right else painted if i == last else painted + pad)
    return "  ".join(parts)


def to_html(tree: Tree) -> str:
    """Tree as an HTML fragment, for notebooks."""
    return "".join(_html(part) for part in tree.parts)


_CSS = {
    "title": "font-weight:bold",
    "number": "",
    "name": "",
    "dtype": "color:#a84fa8",
    "dim": "opacity:.65",
    "good": "color:#1f8a3b",
    "warn": "color:#c0620a;font-weight:bold",
    "error": "color:#e03535;font-weight:bold",
    "bars": "font-family:monospace",
}
"""CSS of `STYLES` in a notebook; every colour is legible on white and on black."""


def _html(part: Text | Table) -> str:
    if isinstance(part, Text):
        lines = (html.escape(printable(line)) for line in part.text.split("\n"))
        return f"<p{_style(_CSS.get(part.style, ''))}>{'<br>'.join(lines)}</p>"
    aligns = ["right" if column.right else "left" for column in part.columns]
    head = "".join(
        f'<th style="text-align:{align}">{html.escape(column.title)}</th>'
        for column, align in zip(part.columns, aligns, strict=True)
    )
    body = []
    for row, texts in table_cells(part):
        if isinstance(row, Gap):
            body.append(f'<tr><td colspan="{len(part.columns)}"><em>{html.escape(texts[0])}</em></td></tr>')
            continue
        cells = []
        for cell, text, align, column in zip(row.cells, texts, aligns, part.columns, strict=True):
            own = column.style if isinstance(cell, str) else cell.style or column.style
            looks = (f"text-align:{align}", "white-space:pre", _CSS.get(own, ""), "font-weight:bold" * row.total)
            cells.append(f"<td{_style(*looks)}>{html.escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _style(*looks: str) -> str:
    used = ";".join(dict.fromkeys(part for look in looks for part in look.split(";") if part))
    return f' style="{used}"' if used else ""


def human_bytes(n: int) -> str:
    """Bytes in binary units with three significant digits: `17 B`, `1.50 KiB`, `750 MiB`."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            return f"{n} B" if unit == "B" else f"{_three(value)} {unit}"
        value /= 1024
    raise AssertionError


def human_count(n: int) -> str:
    """Count in decimal units with three significant digits: `950`, `1.50 K`, `7.24 B` (billion)."""
    value = float(n)
    for unit in ("", "K", "M", "B", "T"):
        if value < 999.5 or unit == "T":
            return f"{n}" if not unit else f"{_three(value)} {unit}"
        value /= 1000
    raise AssertionError


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def human_shape(shape: tuple[int, ...] | None) -> str:
    """Shape as shown in tables: `[64, 3, 7, 7]`, `[]` for a scalar, `lazy` if unknown."""
    return "lazy" if shape is None else str(list(shape))


WIDTH = 78
"""Maximum line width of prose, in columns."""


def filled(text: str, hanging: int = 0) -> str:
    """Wrap text to `WIDTH` columns, with all lines but the first indented by `hanging`; code is not broken.

    >>> filled("two words")
    'two words'
    """
    import textwrap

    kept = _CODE.sub(lambda match: match[0].replace(" ", _NO_BREAK), printable(text))
    lines = textwrap.fill(kept, WIDTH, subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False)
    return lines.replace(_NO_BREAK, " ")


_CODE = re.compile(r"\[[^\[\]]*\]|self\.\w+ = \S+|\(\S+, \S+\)")
_NO_BREAK = "\xa0"


def listed(names: Iterable[str], limit: int = 3) -> str:
    """First few names, and the count of the others.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    every = list(names)
    more = len(every) - limit
    return ", ".join(every[:limit]) + (f" and {more:,} more" if more > 0 else "")


def plural(n: int, singular: str, plural_form: str | None = None) -> str:
    """`1 tensor`, `2 tensors`, `220 tensors`."""
    return f"{n:,} {singular if n == 1 else plural_form or singular + 's'}"


def json_number(value: float) -> float | int | str:
    """Number as JSON data; non-finite numbers become the texts `nan`, `inf` and `-inf`.

    >>> json_number(0.5), json_number(float("-inf"))
    (0.5, '-inf')
    """
    return value if isinstance(value, int) or math.isfinite(value) else str(value)
