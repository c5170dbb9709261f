"""Syntax tree of selectors, which prints back as text."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any, TypeAlias

from torchparams import limits
from torchparams._selector.globs import Glob, quote
from torchparams.errors import SelectorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchparams.dtypes import DType
    from torchparams.info import ParameterInfo


@dataclass(frozen=True, slots=True)
class Regex:
    """Regular expression for whole names, written between slashes."""

    pattern: str

    def __str__(self) -> str:
        return f"/{self.pattern}/"

    def spells(self, component: str) -> bool:
        """Whether its text contains a component."""
        return component in self.pattern


Value: TypeAlias = "int | float | str | DType | Glob | tuple[int | None, ...] | None"


@dataclass(frozen=True, slots=True)
class Condition:
    """`[field op value]`.

    Attributes:
        field: One of `FIELDS`.
        op: One of `=`, `!=`, `<`, `<=`, `>`, `>=`.
        value: Value to compare with: a number, a dtype, a glob, or a shape with None for `*`; None for `lazy`.
        text: Value as written. Different spellings of the same value are equal.
    """

    field: str
    op: str
    value: Value
    text: str = dataclass_field(compare=False)

    def __str__(self) -> str:
        return f"[{self.field}{self.op}{self.text}]"


@dataclass(frozen=True, slots=True)
class Word:
    """`:word`."""

    word: str

    def __str__(self) -> str:
        return f":{self.word}"


@dataclass(frozen=True, slots=True)
class Compound:
    """Parts that must all hold: an optional pattern of the name, then conditions."""

    pattern: Glob | Regex | None
    conditions: tuple[Condition | Word, ...] = ()

    def __str__(self) -> str:
        return "".join(map(str, (*([] if self.pattern is None else [self.pattern]), *self.conditions)))


@dataclass(frozen=True, slots=True)
class Names:
    """Set of exact names; prints as their union."""

    names: frozenset[str]

    def __str__(self) -> str:
        return " | ".join(map(quote, sorted(self.names))) or "<no names>"


@dataclass(frozen=True, slots=True)
class Predicate:
    """Parameters that a function accepts; the only node without text in the language."""

    function: Callable[[ParameterInfo], object]

    def __str__(self) -> str:
        return f"<function {getattr(self.function, '__qualname__', None) or type(self.function).__qualname__}>"


@dataclass(frozen=True, slots=True, eq=False)
class Same:
    """Wrapper with identity comparison: `==` on tensors would compare their values."""

    object: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.object is other.object

    def __hash__(self) -> int:
        return id(self.object)

    def __str__(self) -> str:
        if isinstance(self.object, type):
            return f"<class {self.object.__qualname__}>"
        kind = type(self.object).__qualname__
        return f"<module {kind}>" if hasattr(self.object, "_modules") else f"<{kind}>"


@dataclass(frozen=True, slots=True)
class Objects:
    """Tensors of a live model: these, or those of modules, or of all modules of a class."""

    objects: tuple[Same, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.objects))


@dataclass(frozen=True, slots=True)
class Union:
    """Union of terms; none of them is a union."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.terms))


@dataclass(frozen=True, slots=True)
class Intersection:
    """Intersection of terms; none of them is an intersection."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return " & ".join(_as_term(term) for term in self.terms)


@dataclass(frozen=True, slots=True)
class Complement:
    """Complement of a term."""

    term: Node

    def __str__(self) -> str:
        term = self.term
        return f"~({term})" if isinstance(term, Intersection) else f"~{_as_term(term)}"


Leaf: TypeAlias = Compound | Names | Predicate | Objects
Node: TypeAlias = Leaf | Union | Intersection | Complement


def _as_term(node: Node) -> str:
    wide = isinstance(node, Union) or (isinstance(node, Names) and len(node.names) > 1)
    wide = wide or (isinstance(node, Objects) and len(node.objects) > 1)
    return f"({node})" if wide else str(node)


def union(*nodes: Node) -> Node:
    """Flat union."""
    terms = tuple(term for node in nodes for term in (node.terms if isinstance(node, Union) else (node,)))
    return _not_too_deep(Union(terms)) if len(terms) > 1 else terms[0]


def intersection(*nodes: Node) -> Node:
    """Flat intersection."""
    terms = tuple(term for node in nodes for term in (node.terms if isinstance(node, Intersection) else (node,)))
    return _not_too_deep(Intersection(terms)) if len(terms) > 1 else terms[0]


def complement(node: Node) -> Node:
    """Complement of a node."""
    return _not_too_deep(Complement(node))


def children(node: Node) -> tuple[Node, ...]:
    """Child nodes."""
    if isinstance(node, Union | Intersection):
        return node.terms
    return (node.term,) if isinstance(node, Complement) else ()


def _not_too_deep(node: Node) -> Node:
    # Level by level: a recursive test could itself exceed the recursion limit.
    level: list[Node] = [node]
    for _ in range(2 * limits.SELECTOR_NESTING + 4):
        level = [child for parent in level for child in children(parent)]
        if not level:
            return node
    raise SelectorError(
        f"the selector is nested more than {2 * limits.SELECTOR_NESTING} deep",
        hint="the limit is torchparams.limits.SELECTOR_NESTING",
    )


def relative(node: Node) -> bool:
    """Whether a number in a glob counts from the end, so that matches depend on other parameters."""
    return any(map(_counts_from_end, _walk(node)))


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in children(node):
        yield from _walk(child)


def _counts_from_end(node: Node) -> bool:
    if not isinstance(node, Compound):
        return False
    globs = (node.pattern, *(each.value for each in node.conditions if isinstance(each, Condition)))
    return any(isinstance(glob, Glob) and glob.from_end for glob in globs)
