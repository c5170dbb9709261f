"""What a verb has to say, before anyone decides how it looks: a small tree of texts and tables.

Every report of the library can be printed (`str(report)`: plain text, through `to_text` here), shown
in a terminal with colour and cut to its width (`torchparams.render`), and shown in a notebook
(`to_html` here). What a program wants to know of a report is in its own attributes and its `to_json()`,
never in this tree.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torchparams.errors import printable as printable

STYLES = ("name", "number", "dim", "good", "warn", "error", "title", "dtype")
"""What a cell can be; each renderer has its own look for them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A piece of text with a style, one of `STYLES` or empty."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column.

    Attributes:
        title: Its heading.
        right: Flush right, for numbers.
        style: The style of its cells that have none of their own.
        shrink: May be cut in the middle when the table is wider than the place it is shown in.
        yields: Is cut before those that may shrink too.
    """

    title: str
    right: bool = False
    style: str = ""
    shrink: bool = False
    yields: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A table's row: its cells, how deep it stands in a tree of rows, and whether it closes a table (a total)."""

    cells: tuple[Cell | str, ...]
    depth: int = 0
    total: bool = False


@dataclass(frozen=True, slots=True)
class Gap:
    """Stands for rows that are left out; `text` says how many."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns. With `tree`, the first column is indented by each row's depth."""

    columns: tuple[Column, ...]
    rows: tuple[Row | Gap, ...]
    tree: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A line or a paragraph. What is not printable is escaped; a name in it must not bring lines of its own."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Parts, top to bottom."""

    parts: tuple[Text | Table, ...] = field(default=())

    def __str__(self) -> str:
        return to_text(self)


def cut(rows: Sequence[Row], limit: int | None, what: str = "rows") -> tuple[Row | Gap, ...]:
    """`rows`, with the middle left out and counted where there are more than `limit`."""
    if limit is None or len(rows) <= limit:
        return tuple(rows)
    head = (limit + 1) // 2
    tail = limit - head
    left_out = len(rows) - head - tail
    return (*rows[:head], Gap(f"… {left_out:,} more {what} …"), *rows[len(rows) - tail :])


def cell_text(cell: Cell | str) -> str:
    """A cell's text, with everything that is not printable escaped: names come from files nobody vouches for."""
    text = cell if isinstance(cell, str) else cell.text
    return printable(text)


def width_of(text: str) -> int:
    """Columns that `text` takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


def elide(text: str, width: int) -> str:
    """`text` cut to `width` columns: the long components of a dotted name, or its middle.

    Both ends of a name say more than its start alone, and the numbers in it say which of many equal layers it is.

    >>> elide("encoder.layers.11.self_attention.output.weight", 34)
    'en…er.la…rs.11.se…on.output.weight'
    >>> elide("embedding", 6)
    'emb…ng'
    """
    if width_of(text) <= width:
        return text
    if width <= 1:
        return "…"[:width]
    if text.isascii() and "." in text and " " not in text and len(text) <= _LONGEST_NAME:
        components = text.split(".")
        room = width - len(components) + 1
        for least in (3, 1):
            sizes = [len(component) for component in components]
            floors = [len(c) if c.isdecimal() else min(len(c), least) for c in components]
            if sum(floors) > room:
                continue
            for _ in range(sum(sizes) - room):
                longest = max((i for i in range(len(sizes)) if sizes[i] > floors[i]), key=sizes.__getitem__)
                sizes[longest] -= 1
            return ".".join(elide(component, size) for component, size in zip(components, sizes, strict=True))
    tail = (width - 1) // 2
    head = width - 1 - tail
    return f"{text[:head]}…{text[len(text) - tail :]}"


_LONGEST_NAME = 500


def fit(widths: Sequence[int], columns: Sequence[Column], room: int) -> list[int]:
    """Widths that fit in `room` columns, taken from those that yield, then from those that may shrink, widest first."""
    fitted = list(widths)
    over = sum(fitted) + 2 * (len(fitted) - 1) - room
    for yields in (True, False):
        shrinkable = [i for i, column in enumerate(columns) if column.shrink and column.yields == yields]
        while over > 0 and shrinkable:
            widest = max(shrinkable, key=lambda i: fitted[i])
            least = max(8, width_of(columns[widest].title))
            if fitted[widest] <= least:
                break
            fitted[widest] -= 1
            over -= 1
    return fitted


def table_cells(table: Table) -> Iterator[tuple[Row | Gap, list[str]]]:
    """Each row with the texts of its cells, indented where the table is a tree."""
    for row in table.rows:
        if isinstance(row, Gap):
            yield row, [printable(row.text)]
            continue
        texts = [cell_text(cell) for cell in row.cells]
        if table.tree and texts:
            texts[0] = "  " * row.depth + texts[0]
        yield row, texts


Paint = Callable[[str, str], str]
"""What gives a text its look: called with the text and one of `STYLES`, `heading`, or nothing."""


def _plain(text: str, style: str) -> str:
    return text


def to_text(report: Report, width: int | None = None, paint: Paint = _plain) -> str:
    """The report as text, in `width` columns where one is given; with colour where `paint` adds it."""
    return "\n".join(line for part in report.parts for line in _lines(part, width, paint))


def _lines(part: Text | Table, width: int | None, paint: Paint) -> Iterator[str]:
    if isinstance(part, Text):
        for line in part.text.split("\n"):
            yield paint(printable(line), part.style) if line else ""
        return
    columns = part.columns
    rows = list(table_cells(part))
    widths = [width_of(column.title) for column in columns]
    for row, texts in rows:
        if isinstance(row, Row):
            for i, text in enumerate(texts):
                widths[i] = max(widths[i], width_of(text))
    if width is not None:
        widths = fit(widths, columns, width)
    if any(column.title for column in columns):
        headings = ["heading"] * len(columns)
        yield _line([column.title for column in columns], columns, widths, headings, paint)
    for row, texts in rows:
        if isinstance(row, Gap):
            yield paint(texts[0], "dim")
            continue
        if row.total:
            yield paint("─" * (sum(widths) + 2 * (len(widths) - 1)), "dim")
        styles = [
            column.style if isinstance(cell, str) else cell.style or column.style
            for cell, column in zip(row.cells, columns, strict=True)
        ]
        yield _line(texts, columns, widths, styles, paint)


def _line(
    texts: Sequence[str], columns: Sequence[Column], widths: Sequence[int], styles: Sequence[str], paint: Paint
) -> str:
    parts = []
    last = max((i for i, text in enumerate(texts) if text), default=0)  # no blanks at the end of a line
    for i in range(last + 1):
        shown = elide(texts[i], widths[i]) if columns[i].shrink else texts[i]
        pad = " " * (widths[i] - width_of(shown))
        painted = paint(shown, styles[i]) if shown else ""
        parts.append(pad + painted if columns[i].right else painted if i == last else painted + pad)
    return "  ".join(parts)


def to_html(report: Report) -> str:
    """The report as an HTML fragment, for notebooks."""
    return "".join(_html(part) for part in report.parts)


def _html(part: Text | Table) -> str:
    if isinstance(part, Text):
        lines = (html.escape(printable(line)) for line in part.text.split("\n"))
        return f"<p>{'<br>'.join(lines)}</p>"
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
        weight = ";font-weight:bold" if row.total else ""
        cells = "".join(
            f'<td style="text-align:{align};white-space:pre{weight}">{html.escape(text)}</td>'
            for text, align in zip(texts, aligns, strict=True)
        )
        body.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def human_bytes(n: int) -> str:
    """`n` bytes in binary units with three significant digits: `17 B`, `1.50 KiB`, `750 MiB`."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            return f"{n} B" if unit == "B" else f"{_three(value)} {unit}"
        value /= 1024
    raise AssertionError


def human_count(n: int) -> str:
    """A count in decimal units with three significant digits: `950`, `1.50 K`, `7.24 B` (for billion)."""
    value = float(n)
    for unit in ("", "K", "M", "B", "T"):
        if value < 999.5 or unit == "T":
            return f"{n}" if not unit else f"{_three(value)} {unit}"
        value /= 1000
    raise AssertionError


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def human_shape(shape: tuple[int, ...] | None) -> str:
    """A shape as the table shows it: `[64, 3, 7, 7]`, `[]` for a scalar, `lazy` where there is none yet."""
    return "lazy" if shape is None else str(list(shape))


WIDTH = 78
"""Columns of a line of prose."""


def filled(text: str, hanging: int = 0) -> str:
    """`text` in lines of at most `WIDTH` columns, all but the first indented by `hanging`; code is not broken.

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
    """The first few of `names`, and how many more there are.

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
    """A number as JSON takes it: those that are not finite as the texts `nan`, `inf` and `-inf`.

    >>> json_number(0.5), json_number(float("-inf"))
    (0.5, '-inf')
    """
    return value if isinstance(value, int) or math.isfinite(value) else str(value)
