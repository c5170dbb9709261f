"""Terms of a selector with the parameters that each matches, as an explanation shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams._selector.hints import suggestion
from torchparams._selector.tree import Intersection, Node, Union, children
from torchparams.errors import shorten
from torchparams.render.tree import Cell, Column, Row, Table, Text, Tree, cut, human_count, plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torchparams._selector.candidates import Candidates, Rows
    from torchparams.info import ParameterInfo

_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Term:
    """Matches of one part of a selector.

    Attributes:
        text: Text of the part.
        depth: Depth in the selector, 0 for the whole.
        hits: Infos of the matching parameters, in table order.
        note: Suggestion if it matches nothing; otherwise empty.
    """

    text: str
    depth: int
    hits: tuple[ParameterInfo, ...]
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the matches, in table order."""
        return tuple(info.name for info in self.hits)

    @property
    def numel(self) -> int:
        """Number of elements of all matches."""
        return sum(info.numel for info in self.hits)


def json_of(term: Term) -> dict[str, Any]:
    """The term as JSON data."""
    return {
        "term": term.text,
        "depth": term.depth,
        "tensors": len(term.hits),
        "numel": term.numel,
        "names": list(term.names),
        "note": term.note or None,
    }


def terms_of(table: Candidates, node: Node, depth: int = 0) -> Iterator[Term]:
    """The selector and its parts, each before its own parts, from the left."""
    hits = tuple(table.infos[row] for row in sorted(table.hits(node)))
    below = children(node)
    yield Term(str(node), depth, hits, "" if hits or not table.infos else suggestion(table, node))
    for child in below:
        yield from terms_of(table, child, depth + 1)


def reasons(table: Candidates, node: Node) -> dict[str, tuple[str, ...]]:
    """Name → terms that match it, for every selected parameter, in table order."""
    hits = table.hits(node)
    found: dict[int, list[str]] = {row: [] for row in sorted(hits)}
    for text, rows in _reasons(table, node, hits):
        for row in rows:
            if text not in found[row]:
                found[row].append(text)
    return {table.names[row]: tuple(texts) for row, texts in found.items()}


def _reasons(table: Candidates, node: Node, rows: Rows) -> Iterator[tuple[str, Rows]]:
    """Terms that match `rows`, with the rows of each. The node matches all `rows`."""
    if isinstance(node, Union):
        for term in node.terms:
            yield from _reasons(table, term, rows & table.hits(term))
    elif isinstance(node, Intersection):
        for term in node.terms:
            yield from _reasons(table, term, rows)
    else:
        yield str(node), rows


def tree_of(terms: tuple[Term, ...], by: Mapping[str, tuple[str, ...]], table: int, limit: int | None) -> Tree:
    """Tree of the terms, and of the parameters with the terms that match each, if these differ.

    Args:
        terms: The selector and its parts.
        by: Terms that match each selected parameter.
        table: Number of parameters in the table.
        limit: Maximum number of parameters; None for all.
    """
    total = terms[0]
    columns = (
        Column("term", style="name", shrink=True),
        Column("tensors", right=True, style="number"),
        Column("parameters", right=True, style="number", drop=1),
        Column("hits", style="dim", shrink=True, yields=True),
    )
    rows = tuple(_term_row(term) for term in terms)
    parts: list[Text | Table] = [
        Text(shorten(total.text, 200), "title"),
        Table(columns, rows, tree=True),
    ]
    if len(set(by.values())) > 1:
        shown = (
            Column("parameter", style="name", shrink=True),
            Column("hit by", style="dim", shrink=True, yields=True),
        )
        hit_by = [Row((name, "  ".join(texts))) for name, texts in by.items()]
        parts += [Text(""), Table(shown, cut(hit_by, limit, "parameters"))]
    parts.append(Text(f"{len(total.hits):,} of {plural(table, 'tensor')}", "dim"))
    return Tree(tuple(parts))


def _term_row(term: Term) -> Row:
    hits: Cell | str
    if not term.hits:
        hits = Cell(f"nothing: {term.note}", "warn")
    else:
        more = len(term.hits) - _NAMES_SHOWN
        hits = ", ".join(info.name for info in term.hits[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
    return Row((shorten(term.text, 80), f"{len(term.hits):,}", human_count(term.numel), hits), depth=term.depth)
