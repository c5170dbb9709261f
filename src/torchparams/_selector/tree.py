"""The tree that a selector's text is parsed to, and that prints back to text."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any, TypeAlias

from torchparams import limits
from torchparams._selector.globs import Glob, quote
from torchparams.errors import SelectorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.dtypes import DType
    from torchparams.info import ParameterInfo


@dataclass(frozen=True, slots=True)
class Regex:
    """A regular expression for the whole name, as it stands between the slashes."""

    pattern: str

    def __str__(self) -> str:
        return f"/{self.pattern}/"

    def spells(self, component: str) -> bool:
        """Whether its text holds this one."""
        return component in self.pattern


Value: TypeAlias = "int | float | str | DType | Glob | tuple[int | None, ...] | None"


@dataclass(frozen=True, slots=True)
class Condition:
    """`[field op value]`.

    Attributes:
        field: A key of `FIELDS`.
        op: One of `=`, `!=`, `<`, `<=`, `>`, `>=`.
        value: What the field is compared with: a number, a dtype, a glob, a shape with None for `*`; None for `lazy`.
        text: The value as it was written. Two spellings of one value are equal.
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
    """Parts that hold together: a pattern of the name, or none, then conditions."""

    pattern: Glob | Regex | None
    conditions: tuple[Condition | Word, ...] = ()

    def __str__(self) -> str:
        return "".join(map(str, (*([] if self.pattern is None else [self.pattern]), *self.conditions)))


@dataclass(frozen=True, slots=True)
class Names:
    """Exactly these names; it prints as the union of them."""

    names: frozenset[str]

    def __str__(self) -> str:
        return " | ".join(map(quote, sorted(self.names))) or "<no names>"


@dataclass(frozen=True, slots=True)
class Predicate:
    """The parameters that a function accepts; the one node that has no text in the language."""

    function: Callable[[ParameterInfo], object]

    def __str__(self) -> str:
        return f"<function {getattr(self.function, '__qualname__', None) or type(self.function).__qualname__}>"


@dataclass(frozen=True, slots=True, eq=False)
class Same:
    """An object that is equal to itself alone: comparing two tensors would compare their values."""

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
    """The tensors of a live model that are these, or belong to these modules or to modules of these classes."""

    objects: tuple[Same, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.objects))


@dataclass(frozen=True, slots=True)
class Union:
    """What any of the terms hits; none of them is a union."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.terms))


@dataclass(frozen=True, slots=True)
class Intersection:
    """What all of the terms hit; none of them is an intersection."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return " & ".join(_as_term(term) for term in self.terms)


@dataclass(frozen=True, slots=True)
class Complement:
    """What the term does not hit."""

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
    """The union, flat."""
    terms = tuple(term for node in nodes for term in (node.terms if isinstance(node, Union) else (node,)))
    return _not_too_deep(Union(terms)) if len(terms) > 1 else terms[0]


def intersection(*nodes: Node) -> Node:
    """The intersection, flat."""
    terms = tuple(term for node in nodes for term in (node.terms if isinstance(node, Intersection) else (node,)))
    return _not_too_deep(Intersection(terms)) if len(terms) > 1 else terms[0]


def complement(node: Node) -> Node:
    """The complement."""
    return _not_too_deep(Complement(node))


def children(node: Node) -> tuple[Node, ...]:
    """The nodes directly below."""
    if isinstance(node, Union | Intersection):
        return node.terms
    return (node.term,) if isinstance(node, Complement) else ()


def _not_too_deep(node: Node) -> Node:
    # Level by level: how deep a tree is must not be found out by recursion.
    level: list[Node] = [node]
    for _ in range(2 * limits.SELECTOR_NESTING + 4):
        level = [child for parent in level for child in children(parent)]
        if not level:
            return node
    raise SelectorError(
        f"the selector is nested more than {2 * limits.SELECTOR_NESTING} deep",
        hint="torchparams.limits.SELECTOR_NESTING bounds it",
    )
