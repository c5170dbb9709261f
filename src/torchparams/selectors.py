r"""The selector language: text that means a set of parameters.

A **selector** is a function from parameters to a set of their names. It is written as text, as a function of
`ParameterInfo`, or as a list of names; for a live model also as a module, a class of modules, or a parameter. These
combine with `|`, `&`, `-` and `~`.

    encoder.**                  everything below encoder, and encoder itself
    **.bias                     every bias, also a top-level one
    encoder.layer.{0..5}.**     layers 0 to 5
    encoder.layer.{-2..-1}.**   the last two layers
    **.{q,k,v}_proj.weight      three of the projections
    **.weight[ndim>=2]          matrices by name and dimensions
    :trainable & ~:bias         what is trained, the biases left out
    /.*\.(weight|scale)/         a regular expression

**Terms.** A term is a glob or a regular expression between slashes, then conditions in brackets and words after
colons, all without blanks between them; all of its parts hold together. Each of them may be absent, but not all.
Terms combine by `|` (union), `&` (intersection, which binds tighter), `~` (complement, tighter still) and parentheses.

**Names.** A glob or a regular expression matches a *whole* name: `bias` is the top-level bias, `head` never hits
`decode_head`. A glob has components, joined by dots as the name's. In a component, `*` is any characters, `?` one
character, `{a,b}` one of some alternatives (each a pattern again, possibly empty), `{0..11}` a whole number in that
range, written without leading zeros; `{00..11}` one of exactly two digits; `{-2..-1}`, `{-1}` and `{6..-1}` count from
the end of the numbers that occur in the same module, and are a whole component. The component `**` is any count of
components, also none. Case counts. A name with characters that mean something here is quoted, in part or whole, or has
a backslash before them: `"my layer".weight`, `my\ layer.weight`; an empty component is `""`. Inside a regular
expression, a slash is written `\/`.

An alias of a tied tensor is as good as its name. The name as the source spells it (`module.fc.weight` under
DistributedDataParallel) is tried for a name without wildcards, and for a pattern that spells the wrapper's component,
such as `module.**`. A selection always holds canonical names.

**Conditions.** `[field op value]`, where `=` and `!=` go with every field and `<`, `<=`, `>`, `>=` with `ndim`,
`numel`, `nbytes`, `bpw` and `layer`. `!=` is exactly the complement of `=`.

| field | value |
|---|---|
| `name` | a glob |
| `shape` | `64x3x7x7`, `(64, 3, 7, 7)`; `*` is any size of one dimension; `()` a scalar; `lazy` no shape yet |
| `ndim` | a whole number |
| `numel`, `nbytes` | a size: `1500000`, `1.5M` (K, M, G, T: powers of 1000), `64KiB` (KiB, MiB, GiB, TiB: of 1024) |
| `dtype` | as torch, numpy or safetensors spell it: `bfloat16`, `bf16`, `BF16` |
| `device` | `cpu`, `meta`, `cuda` (any of them), `cuda:0`; `file` for a checkpoint |
| `kind` | `parameter`, `buffer`, or `tensor` where they are not told apart |
| `module` | a glob for the owner's class or a base class: `Linear`, `torch.nn.Linear`, `*Norm`, `torch.nn.**` |
| `layer` | a whole number: the first component of the name that is one |
| `encoding` | that of quantised parameters, with `*` for any characters: `nf4`, `fp8-*` |
| `bpw` | bits that are stored for an element, scales included: `4.5` |

**Words.**

| word | parameters that |
|---|---|
| `:trainable` | have `requires_grad` |
| `:frozen` | do not have it, buffers left out |
| `:tied` | stand under several names |
| `:buffer` | are buffers |
| `:matrix` | have two dimensions or more |
| `:meta` | are on the meta device |
| `:quantized` | have an encoding: codes and scales are stored |
| `:sharded` | are kept in parts by the ranks of a process group |
| `:bias` | have `bias`, `biases`, `bias_…`, `…_bias` or `…_biases` as the last component, parametrised or not |
| `:norm` | belong to a layer whose class or base class is called `…Norm`, `…Norm1d`, `…2d`, `…3d` or `…NormBase` |
| `:embedding` | belong to a layer whose class or base class is called `…Embedding` or `…EmbeddingBag` |

The classes in `torch.nn.utils` are no layers for the last two. A file does not record owners, `requires_grad` or what
is a buffer: to ask it for them is a `SelectorError`, never an empty selection.

**Strictness.** A selection is strict unless one asks otherwise: every term must hit something, every intersection must
leave something, and a complement must both exclude and leave something. `NoMatch` names the part that does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams._selector.globs import Glob
from torchparams._selector.globs import quote as quote
from torchparams._selector.hints import narrow, refuse_empty, suggestion
from torchparams._selector.parser import parse
from torchparams._selector.table import Rows, Table
from torchparams._selector.tree import (
    Compound,
    Condition,
    Intersection,
    Names,
    Node,
    Objects,
    Predicate,
    Same,
    Union,
    children,
    complement,
    intersection,
    union,
)
from torchparams.errors import SelectorError, shorten
from torchparams.records import Records
from torchparams.render.result import Result
from torchparams.render.tree import Cell, Column, Report, Row, Text, cut, human_count, plural
from torchparams.render.tree import Table as ReportTable

if TYPE_CHECKING:
    from torchparams.info import ParameterInfo
    from torchparams.records import Lone

ROWS_SHOWN = 40
"""Parameters that printing an explanation lists at most."""


class Selector:
    """A function from parameters to a set of their names: immutable, hashable, and printable as text.

    Args:
        what: Text in the selector language; a `Selector`; an iterable of exact names (a list, a set, a `Parameters`,
            a state dict); a function of `ParameterInfo` that is true for what is selected; or, of a live model, a
            module (all its parameters, submodules included), a class of modules (those of all such modules, also of
            a subclass), a parameter, or an iterable of these.

    Raises:
        SelectorSyntaxError: The text is not a selector; the error knows the column.
        SelectorError: It is none of these.

    Two selectors are equal when they say the same in the same order: `[dtype=bf16]` and `[dtype=bfloat16]` are.

    >>> from torchparams import Selector
    >>> Selector("**.bias") | Selector("[ndim < 2]")
    Selector('**.bias | [ndim<2]')
    >>> Selector("encoder.**") - Selector("**.bias | **.norm.**")
    Selector('encoder.** & ~(**.bias | **.norm.**)')
    >>> Selector(lambda info: info.numel > 1000) & "**.weight"
    Selector('<function <lambda>> & **.weight')
    """

    __slots__ = ("_node",)

    _node: Node

    def __init__(self, what: object) -> None:
        self._node = _node_of(what)

    @classmethod
    def of(cls, what: object) -> Selector:
        """`what` as a selector: itself where it is one, else `Selector(what)`.

        >>> Selector.of(["fc.weight", "fc.bias"])
        Selector('fc.bias | fc.weight')
        """
        return what if isinstance(what, Selector) else cls(what)

    @classmethod
    def everything(cls) -> Selector:
        """The selector of all parameters, `**`.

        >>> Selector.everything() == Selector("**")
        True
        """
        return cls("**")

    @property
    def branches(self) -> tuple[Selector, ...]:
        """The terms of its outermost union; itself alone where it is none.

        >>> Selector("**.bias | a.** & b.**").branches
        (Selector('**.bias'), Selector('a.** & b.**'))
        """
        node = self._node
        return tuple(map(_from_node, node.terms)) if isinstance(node, Union) else (self,)

    @property
    def relative(self) -> bool:
        """Whether it counts layers from the end, so that a hit depends on which other parameters there are.

        >>> Selector("layers.{-1}.**").relative, Selector("layers.1.**").relative
        (True, False)
        """
        return any(map(_counts_from_end, _walk(self._node)))

    # --- apply -----------------------------------------------------------------------------

    def names(self, infos: Iterable[ParameterInfo], strict: bool = False, where: str | None = None) -> frozenset[str]:
        """The canonical names of the parameters that it hits.

        Linear in the count of parameters.

        Args:
            infos: The records of all parameters of a source.
            strict: Refuse a selector of which any part hits nothing.
            where: What an error calls the source.

        Raises:
            NoMatch: With `strict`, a part hits nothing; the message names it, and what was perhaps meant.
            SelectorError: It asks for what the source does not record, such as `:trainable` of a file.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> params = tp.of({"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)})
        >>> sorted(tp.Selector("fc.*[ndim=1]").names(params.infos.values()))
        ['fc.bias']
        """
        table = _table_of(infos, where)
        rows = table.hits(self._node)
        if strict:
            refuse_empty(table, self._node)
        return frozenset(map(table.names.__getitem__, rows))

    def decides(self, lone: Lone) -> bool | None:
        """Whether it hits a parameter that was found alone; None where that takes a look at all of them.

        Names, patterns that match, conditions on the tensor itself (shape, dtype, `:trainable`, …), modules and
        parameters decide alone. `:tied`, a pattern that does not match, its complement, and what depends on the first
        name of a tied tensor (`:bias`, `:norm`, `[module=…]`, a function), or counts from the end, do not.
        """
        return None if self.relative else Table.decides(self._node, lone)

    def narrow(self, infos: Iterable[ParameterInfo], where: str | None = None) -> str | None:
        """One line about a `*` that hits a few parameters where `**` would hit many more; None where there is none.

        Args:
            infos: The records of all parameters of a source.
            where: The name of the source in errors.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> layers = {f"h.{i}.weight": np.zeros(1) for i in range(6)}
        >>> tp.Selector("*.weight").narrow(tp.of({"head.weight": np.zeros(1), **layers}).infos.values())
        '`*.weight` hits 1 of the 7 parameters that `**.weight` hits'
        """
        return narrow(_table_of(infos, where), self._node)

    def explain(self, infos: Iterable[ParameterInfo], where: str | None = None) -> Explanation:
        """Which term hits which parameter, and how many each. A term that hits nothing is shown with what was meant.

        Args:
            infos: The records of all parameters of a source.
            where: What an error calls the source.

        Raises:
            SelectorError: It asks for what the source does not record.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> params = tp.of({"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)})
        >>> print(tp.Selector("**.bias | head").explain(params.infos.values()))
        **.bias | head
        term            tensors  parameters  hits
        **.bias | head        1           2  fc.bias
          **.bias             1           2  fc.bias
          head                0           0  nothing: no name has the component 'head'; the names begin with fc
        1 of 2 tensors
        """
        table = _table_of(infos, where)
        terms = tuple(_terms(table, self._node, 0))
        reasons: dict[int, list[str]] = {row: [] for row in sorted(table.hits(self._node))}
        for text, rows in _reasons(table, self._node, table.hits(self._node)):
            for row in rows:
                if text not in reasons[row]:
                    reasons[row].append(text)
        by = {table.names[row]: tuple(texts) for row, texts in reasons.items()}
        return Explanation(self, terms, MappingProxyType(by), len(table.infos))

    # --- combine ---------------------------------------------------------------------------

    def __or__(self, other: object) -> Selector:
        return self._joined(other, union)

    def __ror__(self, other: object) -> Selector:
        return self._joined(other, lambda a, b: union(b, a))

    def __and__(self, other: object) -> Selector:
        return self._joined(other, intersection)

    def __rand__(self, other: object) -> Selector:
        return self._joined(other, lambda a, b: intersection(b, a))

    def __sub__(self, other: object) -> Selector:
        return self._joined(other, lambda a, b: intersection(a, complement(b)))

    def __rsub__(self, other: object) -> Selector:
        return self._joined(other, lambda a, b: intersection(b, complement(a)))

    def __invert__(self) -> Selector:
        return _from_node(complement(self._node))

    def _joined(self, other: object, how: Callable[[Node, Node], Node]) -> Selector:
        if not isinstance(other, Selector | str):
            return NotImplemented  # type: ignore[no-any-return]  # Python's own protocol
        return _from_node(how(self._node, Selector.of(other)._node))

    # --- a value ---------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return self._node == other._node if isinstance(other, Selector) else NotImplemented

    def __hash__(self) -> int:
        return hash((Selector, self._node))

    def __str__(self) -> str:
        return str(self._node)

    def __repr__(self) -> str:
        return f"Selector({str(self)!r})"


def _table_of(infos: Iterable[ParameterInfo], where: str | None) -> Table:
    if not isinstance(infos, Records):
        return Table(infos, where)
    if infos.applied is None:
        infos.applied = Table(infos, where)
    table: Table = infos.applied
    table.where = where
    return table


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in children(node):
        yield from _walk(child)


def _counts_from_end(node: Node) -> bool:
    if not isinstance(node, Compound):
        return False
    globs = (node.pattern, *(each.value for each in node.conditions if isinstance(each, Condition)))
    return any(isinstance(glob, Glob) and glob.from_end for glob in globs)


def _from_node(node: Node) -> Selector:
    selector = Selector.__new__(Selector)
    selector._node = node
    return selector


def _node_of(what: object) -> Node:
    if isinstance(what, str):
        return parse(what)
    if isinstance(what, Selector):
        return what._node
    if _is_object(what):
        return Objects((Same(what),))
    # Before functions: a Parameters is a mapping that can be called.
    if isinstance(what, Iterable) and not isinstance(what, bytes | type):
        listed = list(what)
        names = frozenset(each for each in listed if isinstance(each, str))
        objects = dict.fromkeys(Same(each) for each in listed if _is_object(each))
        for each in listed:
            if not (isinstance(each, str) or _is_object(each)):
                kind = type(each).__name__
                raise SelectorError(
                    f"a list that selects holds names, modules or parameters, and this one holds a {kind}",
                    hint="other selectors are joined with |",
                )
        if not objects:
            return Names(names)
        # Very many parameters are one term, so that the table is looked through once.
        tensors = tuple(each for each in objects if not _is_module(each.object))
        modules = (Objects((each,)) for each in objects if _is_module(each.object))
        return union(*[Names(names)] * bool(names), *modules, *[Objects(tensors)] * bool(tensors))
    if hasattr(what, "named_parameters"):
        raise SelectorError(
            f"a {type(what).__name__} is a model, and a selector is text, names or a function of ParameterInfo",
            hint="select from it: torchparams.of(model).select(…)",
        )
    if callable(what) and not isinstance(what, type):
        return Predicate(what)
    raise SelectorError(
        f"{shorten(repr(what))} is not a selector",
        exists="a selector is text such as '**.bias', a list of names, a module or a class of modules, "
        "a function of ParameterInfo, or a Selector",
    )


def _is_object(what: object) -> bool:
    """Whether it is a module, a class of modules, or a tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and (_is_module(what) or isinstance(what, torch.Tensor))


def _is_module(what: object) -> bool:
    """Whether it is a module or a class of modules."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return issubclass(what, torch.nn.Module) if isinstance(what, type) else isinstance(what, torch.nn.Module)


# --- explain -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Term:
    """What a part of a selector hits, by itself.

    Attributes:
        text: The part, as it prints.
        depth: How deep it stands in the selector: 0 is all of it.
        hits: The records of the parameters, in the table's order.
        note: Where it hits nothing, what was perhaps meant; else empty.
    """

    text: str
    depth: int
    hits: tuple[ParameterInfo, ...]
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical names of what it hits, in the table's order."""
        return tuple(info.name for info in self.hits)

    @property
    def numel(self) -> int:
        """Count of elements of all of them."""
        return sum(info.numel for info in self.hits)


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Result):
    """Which part of a selector hits which parameters; it prints as a table.

    Attributes:
        selector: What is explained.
        terms: It and its parts, each before the parts of it, from the left.
        by: Name → the terms that it is hit by, for all that the selector hits, in the table's order. Of an intersection
            these are all its terms; a complement is one term.
        table: How many parameters were asked about.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> params = tp.of({"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)})
    >>> [(term.text, term.names) for term in params.explain("**.bias").terms]
    [('**.bias', ('fc.bias',))]
    """

    selector: Selector
    terms: tuple[Term, ...]
    by: Mapping[str, tuple[str, ...]]
    table: int

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical names of all that the selector hits, in the table's order."""
        return self.terms[0].names

    def report(self, *, limit: int | None = ROWS_SHOWN) -> Report:
        """The explanation as a report: the terms, and the parameters with what hits each where that is not the same.

        Args:
            limit: Most parameters to list; None for all.
        """
        total = self.terms[0]
        columns = (
            Column("term", style="name", shrink=True),
            Column("tensors", right=True, style="number"),
            Column("parameters", right=True, style="number", drop=1),
            Column("hits", style="dim", shrink=True, yields=True),
        )
        rows = tuple(_term_row(term) for term in self.terms)
        parts: list[Text | ReportTable] = [
            Text(shorten(total.text, 200), "title"),
            ReportTable(columns, rows, tree=True),
        ]
        if len(set(self.by.values())) > 1:
            shown = (
                Column("parameter", style="name", shrink=True),
                Column("hit by", style="dim", shrink=True, yields=True),
            )
            reasons = [Row((name, "  ".join(texts))) for name, texts in self.by.items()]
            parts += [Text(""), ReportTable(shown, cut(reasons, limit, "parameters"))]
        parts.append(Text(f"{len(total.hits):,} of {plural(self.table, 'tensor')}", "dim"))
        return Report(tuple(parts))

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON takes it."""
        return {
            "selector": str(self.selector),
            "tensors": self.table,
            "names": list(self.names),
            "by": {name: list(texts) for name, texts in self.by.items()},
            "terms": [
                {
                    "term": term.text,
                    "depth": term.depth,
                    "tensors": len(term.hits),
                    "numel": term.numel,
                    "names": list(term.names),
                    "note": term.note or None,
                }
                for term in self.terms
            ],
        }


_NAMES_SHOWN = 3


def _term_row(term: Term) -> Row:
    hits: Cell | str
    if not term.hits:
        hits = Cell(f"nothing: {term.note}", "warn")
    else:
        more = len(term.hits) - _NAMES_SHOWN
        hits = ", ".join(info.name for info in term.hits[:_NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
    return Row((shorten(term.text, 80), f"{len(term.hits):,}", human_count(term.numel), hits), depth=term.depth)


def _terms(table: Table, node: Node, depth: int) -> Iterator[Term]:
    hits = tuple(table.infos[row] for row in sorted(table.hits(node)))
    below = children(node)
    yield Term(str(node), depth, hits, "" if hits or not table.infos else suggestion(table, node))
    for child in below:
        yield from _terms(table, child, depth + 1)


def _reasons(table: Table, node: Node, rows: Rows) -> Iterator[tuple[str, Rows]]:
    """The terms that hit `rows`, all of which the node hits, and which of them each hits."""
    if isinstance(node, Union):
        for term in node.terms:
            yield from _reasons(table, term, rows & table.hits(term))
    elif isinstance(node, Intersection):
        for term in node.terms:
            yield from _reasons(table, term, rows)
    else:
        yield str(node), rows
