r"""The selector language: text that selects parameters.

A **selector** is a function from parameters to a set of their names. It can be text, a function of `ParameterInfo`, or
a list of names; for a live model also a module, a class of modules, or a parameter. Selectors combine with `|`, `&`,
`-` and `~`.

    encoder.**                  everything below encoder, and encoder itself
    **.bias                     every bias, also a top-level one
    encoder.layer.{0..5}.**     layers 0 to 5
    encoder.layer.{-2..-1}.**   the last two layers
    **.{q,k,v}_proj.weight      three of the projections
    **.weight[ndim>=2]          matrices by name and dimensions
    :trainable & ~:bias         what is trained, the biases left out
    /.*\.(weight|scale)/         a regular expression

**Terms.** A term is a glob, or a regular expression between slashes, followed by conditions in brackets and words after
colons, without spaces; all parts must hold. Each part is optional, but a term needs at least one. Terms combine by `|`
(union), `&` (intersection, binds tighter), `~` (complement, binds tightest) and parentheses.

**Names.** A glob or regular expression matches the *whole* name: `bias` is the top-level bias, and `head` never matches
`decode_head`. A glob has components separated by dots, like a name. In a component, `*` matches any characters, `?` one
character, `{a,b}` one of the alternatives (each a pattern, possibly empty), and `{0..11}` a whole number in that range
without leading zeros (`{00..11}`: exactly two digits). `{-2..-1}`, `{-1}` and `{6..-1}` count from the end of the
numbers that occur in the same module, and must be a whole component. The component `**` matches any number of
components, including none. Matching is case-sensitive. Quote a name with special characters, or put a backslash before
them: `"my layer".weight`, `my\ layer.weight`; an empty component is `""`. In a regular expression, write a slash as
`\/`.

Aliases of tied tensors match like names. A raw name (`module.fc.weight` under DistributedDataParallel) matches a name
without wildcards, or a pattern that spells the wrapper's component, such as `module.**`. A selection always holds
canonical names.

**Conditions.** `[field op value]`. `=` and `!=` work for every field; `<`, `<=`, `>` and `>=` for `ndim`, `numel`,
`nbytes`, `bpw` and `layer`. `!=` is the complement of `=`.

| field | value |
|---|---|
| `name` | a glob |
| `shape` | `64x3x7x7`, `(64, 3, 7, 7)`; `*` is any size of one dimension; `()` a scalar; `lazy` no shape yet |
| `ndim` | a whole number |
| `numel`, `nbytes` | a size: `1500000`, `1.5M` (K, M, G, T: powers of 1000), `64KiB` (KiB, MiB, GiB, TiB: of 1024) |
| `dtype` | as torch, numpy or safetensors spell it: `bfloat16`, `bf16`, `BF16` |
| `device` | `cpu`, `meta`, `cuda` (any of them), `cuda:0`; `file` for a checkpoint |
| `kind` | `parameter`, `buffer`, or `tensor` if the source does not distinguish them |
| `module` | a glob for the owner's class or a base class: `Linear`, `torch.nn.Linear`, `*Norm`, `torch.nn.**` |
| `layer` | a whole number: the first numeric component of the name |
| `encoding` | the encoding of quantised parameters, with `*` for any characters: `nf4`, `fp8-*` |
| `bpw` | stored bits per element, including scales: `4.5` |

**Words.**

| word | parameters that |
|---|---|
| `:trainable` | have `requires_grad` |
| `:frozen` | have no `requires_grad`, except buffers |
| `:tied` | have several names |
| `:buffer` | are buffers |
| `:matrix` | have two dimensions or more |
| `:meta` | are on the meta device |
| `:quantized` | have an encoding: stored as codes with scales |
| `:sharded` | are split over the ranks of a process group |
| `:bias` | have `bias`, `biases`, `bias_…`, `…_bias` or `…_biases` as the last component, parametrised or not |
| `:norm` | belong to a layer whose class or base class is named `…Norm`, `…Norm1d`, `…2d`, `…3d` or `…NormBase` |
| `:embedding` | belong to a layer whose class or base class is named `…Embedding` or `…EmbeddingBag` |

The last two ignore the classes in `torch.nn.utils`, which are not layers. A file records neither owners nor
`requires_grad` nor the kind: selecting by these raises a `SelectorError`, never an empty selection.

**Strictness.** By default, a selection is strict: every term and every intersection must match something, and a
complement must both exclude and leave something. Otherwise, `NoMatch` names the part.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams._selector.candidates import Candidates
from torchparams._selector.globs import quote as quote
from torchparams._selector.hints import narrow, refuse_empty
from torchparams._selector.objects import node_of
from torchparams._selector.terms import Term, json_of, reasons, terms_of, tree_of
from torchparams._selector.tree import Node, Union, complement, intersection, relative, union
from torchparams.reading import Reading
from torchparams.render.result import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torchparams.info import ParameterInfo
    from torchparams.reading import Lone
    from torchparams.render.tree import Tree

ROWS_SHOWN = 40
"""Default number of parameters listed by a printed explanation."""


class Selector:
    """A function from parameters to a set of their names: immutable, hashable, and printable.

    Args:
        what: Text in the selector language; a `Selector`; an iterable of exact names (a list, a set, a `Parameters`, a
            state dict); a function of `ParameterInfo`; or, for a live model, a module (all its parameters, including
            submodules), a class of modules (parameters of all instances, including subclasses), a parameter, or an
            iterable of these.

    Raises:
        SelectorSyntaxError: The text is not a selector; the error has the column.
        SelectorError: The type of `what` is not supported.

    Selectors are equal if they mean the same in the same order: `[dtype=bf16]` equals `[dtype=bfloat16]`.

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
        self._node = what._node if isinstance(what, Selector) else node_of(what)

    @classmethod
    def of(cls, what: object) -> Selector:
        """Convert to a selector; a `Selector` is returned unchanged.

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
        """Terms of the outermost union; the selector itself if it is not a union.

        >>> Selector("**.bias | a.** & b.**").branches
        (Selector('**.bias'), Selector('a.** & b.**'))
        """
        node = self._node
        return tuple(map(_from_node, node.terms)) if isinstance(node, Union) else (self,)

    @property
    def relative(self) -> bool:
        """Whether it counts layers from the end, so that matches depend on other parameters.

        >>> Selector("layers.{-1}.**").relative, Selector("layers.1.**").relative
        (True, False)
        """
        return relative(self._node)

    # --- apply -----------------------------------------------------------------------------

    def names(self, infos: Iterable[ParameterInfo], strict: bool = False, where: str | None = None) -> frozenset[str]:
        """Canonical names of the parameters that the selector matches.

        Linear in the number of parameters.

        Args:
            infos: Infos of all parameters of a source.
            strict: Raise if any part of the selector matches nothing.
            where: Label of the source, for errors.

        Raises:
            NoMatch: With `strict`, a part matches nothing; the message names it, and suggests a correction.
            SelectorError: The source does not record a property, such as `:trainable` for a file.

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
        """Whether it matches a single parameter, or None if that depends on other parameters.

        Names, matching patterns, conditions on the tensor (shape, dtype, `:trainable`, …), modules and parameters
        decide alone. These do not: `:tied`, patterns that do not match, their complements, conditions on the first name
        of a tied tensor (`:bias`, `:norm`, `[module=…]`, functions), and numbers from the end.
        """
        return None if self.relative else Candidates.decides(self._node, lone)

    def narrow(self, infos: Iterable[ParameterInfo], where: str | None = None) -> str | None:
        """Note about a `*` that matches few parameters where `**` would match many more, or None.

        Args:
            infos: Infos of all parameters of a source.
            where: Label of the source, for errors.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> layers = {f"h.{i}.weight": np.zeros(1) for i in range(6)}
        >>> tp.Selector("*.weight").narrow(tp.of({"head.weight": np.zeros(1), **layers}).infos.values())
        '`*.weight` matches 1 of the 7 parameters that `**.weight` matches'
        """
        return narrow(_table_of(infos, where), self._node)

    def explain(self, infos: Iterable[ParameterInfo], where: str | None = None) -> Explanation:
        """Explain which term matches which parameters. A term without a match is shown with a suggestion.

        Args:
            infos: Infos of all parameters of a source.
            where: Label of the source, for errors.

        Raises:
            SelectorError: The source does not record a property.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> params = tp.of({"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)})
        >>> print(tp.Selector("**.bias | head").explain(params.infos.values()))
        **.bias | head
        term            tensors  parameters  hits
        **.bias | head        1           2  fc.bias
          **.bias             1           2  fc.bias
          head                0           0  nothing: no name has the component 'head'; the names start with fc
        1 of 2 tensors
        """
        table = _table_of(infos, where)
        terms = tuple(terms_of(table, self._node))
        by = reasons(table, self._node)
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


def _table_of(infos: Iterable[ParameterInfo], where: str | None) -> Candidates:
    if not isinstance(infos, Reading):
        return Candidates(infos, where)
    if infos.applied is None:
        infos.applied = Candidates(infos, where)
    table: Candidates = infos.applied
    table.where = where
    return table


def _from_node(node: Node) -> Selector:
    selector = Selector.__new__(Selector)
    selector._node = node
    return selector


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Result):
    """Which part of a selector matches which parameters; prints as a table.

    Attributes:
        selector: Explained selector.
        terms: The selector and its parts, each before its own parts, from the left.
        by: Terms that match each selected parameter, by name in table order. For an intersection these are all its
            terms; a complement is one term.
        table: Number of parameters in the table.

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
        """Canonical names of all matches, in table order."""
        return self.terms[0].names

    def tree(self, *, limit: int | None = ROWS_SHOWN) -> Tree:
        """Tree of the terms, and of the parameters with the terms that match each, if these differ.

        Args:
            limit: Maximum number of parameters; None for all.
        """
        return tree_of(self.terms, self.by, self.table, limit)

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON data."""
        return {
            "selector": str(self.selector),
            "tensors": self.table,
            "names": list(self.names),
            "by": {name: list(texts) for name, texts in self.by.items()},
            "terms": list(map(json_of, self.terms)),
        }
