"""Evaluate selectors on a table of parameters."""

from __future__ import annotations

import operator
import re
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torchparams._selector.bounded import SIMPLER, Bounded, TooSlow
from torchparams._selector.glob_match import matches
from torchparams._selector.glob_regex import matcher
from torchparams._selector.globs import RANGE_DIGITS, Glob
from torchparams._selector.tree import (
    Complement,
    Compound,
    Condition,
    Intersection,
    Names,
    Node,
    Objects,
    Predicate,
    Regex,
    Union,
    Word,
)
from torchparams.errors import SelectorError, shorten
from torchparams.reading import FieldFunction, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torchparams.info import ParameterInfo
    from torchparams.reading import Lone

Rows: TypeAlias = "set[int]"
"""Row indices of parameters."""


class Candidates:
    """Parameters to evaluate selectors on. Results are cached per node.

    Args:
        infos: Infos in order, or `Reading`, of which only the requested fields are computed.
        where: Label of the table, for messages.
    """

    def __init__(self, infos: Iterable[ParameterInfo], where: str | None = None) -> None:
        self.reading = infos if isinstance(infos, Reading) else Reading(infos)
        self.names = self.reading.names
        self.where = where
        self._known: dict[int, tuple[Node, Rows]] = {}  # the node is stored too, so that its id is not reused

    @property
    def infos(self) -> list[ParameterInfo]:
        """Infos of all parameters; for a live model they are created now."""
        return self.reading.infos

    def hits(self, node: Node) -> Rows:
        """Rows that a node matches.

        Raises:
            SelectorError: The node needs a property that this table does not record.
        """
        known = self._known.get(id(node))
        if known is None:
            known = self._known[id(node)] = (node, self._find(node))
        return known[1]

    def _find(self, node: Node) -> Rows:
        if isinstance(node, Union):
            return set().union(*map(self.hits, node.terms))
        if isinstance(node, Intersection):
            # Evaluate every term, even after an empty one, so that errors do not depend on the other terms.
            found = [self.hits(term) for term in node.terms]
            return set.intersection(*sorted(found, key=len))
        if isinstance(node, Complement):
            return self._all - self.hits(node.term)
        if isinstance(node, Compound):
            rows = self._all if node.pattern is None else self.named(node.pattern)
            for condition in node.conditions:
                rows = self.narrowed(rows, condition)
            return rows
        if isinstance(node, Names):
            return {self.places[name] for name in node.names if name in self.places}
        if isinstance(node, Objects):
            return self._of_objects(node)
        return self._accepted(node)

    @cached_property
    def _all(self) -> Rows:
        return set(range(len(self.names)))

    # --- one parameter ---------------------------------------------------------------------

    @classmethod
    def decides(cls, node: Node, lone: Lone) -> bool | None:
        """Whether a node matches a single parameter, or None if that depends on other parameters.

        Any name of a tied tensor can match, and only one of its names is known here. So a matching pattern decides, and
        one that does not match gives None. Conditions on the first name, such as its owner, give None too.
        """
        return cls(lone.reading)._decide(node, lone)

    def _decide(self, node: Node, lone: Lone) -> bool | None:
        if isinstance(node, Union):
            return _not(_all_of(_not(self._decide(term, lone)) for term in node.terms))
        if isinstance(node, Intersection):
            return _all_of(self._decide(term, lone) for term in node.terms)
        if isinstance(node, Complement):
            return _not(self._decide(node.term, lone))
        if isinstance(node, Compound):
            by_name = True if node.pattern is None else bool(self.named(node.pattern)) or None
            return _all_of((by_name, *(self._decide_condition(each, lone) for each in node.conditions)))
        if isinstance(node, Names):
            return bool(self.hits(node)) or None
        if isinstance(node, Objects):
            return _among(node, lone)
        fields = node.function.fields if isinstance(node.function, FieldFunction) else ("name",)
        return bool(self.hits(node)) if lone.certain.issuperset(fields) else None

    def _decide_condition(self, condition: Condition | Word, lone: Lone) -> bool | None:
        if isinstance(condition, Condition) and condition.field == "name" and isinstance(condition.value, Glob):
            return condition.op == "=" if self.named(condition.value) else None
        tests = _word(condition.word) if isinstance(condition, Word) else [_comparison(condition)]
        if not lone.certain.issuperset(field for field, _ in tests) or self._unrecorded(condition):
            return None
        return bool(self.narrowed({0}, condition))

    # --- names -----------------------------------------------------------------------------

    @cached_property
    def places(self) -> dict[str, int]:
        """Row of every spelling: canonical names take precedence over raw names, and these over aliases."""
        places = dict(zip(self.names, range(len(self.names)), strict=True))
        for row, raw in self.reading.raws:
            places.setdefault(raw, row)
        for row, alias in self._aliases:
            places.setdefault(alias, row)
        return places

    @cached_property
    def _aliases(self) -> list[tuple[int, str]]:
        return list(self.reading.aliases)

    @cached_property
    def _raws(self) -> dict[frozenset[str], list[tuple[int, str]]]:
        """Raw names that differ from the canonical ones, grouped by the components that wrappers added."""
        raws: dict[frozenset[str], list[tuple[int, str]]] = {}
        prefixes: dict[str, frozenset[str]] = {}
        for row, raw in self.reading.raws:
            name = self.names[row]
            if raw.endswith(f".{name}"):
                prefix = raw[: -len(name) - 1]
                if prefix not in prefixes:
                    prefixes[prefix] = frozenset(prefix.split("."))
                added = prefixes[prefix]
            else:
                added = frozenset(_added(raw.split("."), name.split(".")))
            raws.setdefault(added, []).append((row, raw))
        return raws

    def named(self, pattern: Glob | Regex) -> Rows:
        """Rows with a name that the pattern matches.

        A raw name only counts if the pattern spells a component of a wrapper. Otherwise `*.bias` would match a
        top-level `bias` as soon as the model is wrapped, through `module.bias`.

        Raises:
            SelectorError: A regular expression takes too long.
        """
        if isinstance(pattern, Glob):
            if (literal := pattern.literal) is not None:
                return {self.places[literal]} if literal in self.places else set()
            match = self._matcher(pattern)

            def which(names: Sequence[str]) -> list[int]:
                return [i for i, name in enumerate(names) if match(name)]
        else:
            which = partial(self._which, pattern)
        rows = set(which(self.names))
        further = list(self._aliases)
        for added, raws in self._raws.items():
            if any(map(pattern.spells, added)):
                further += raws
        rows.update(further[i][0] for i in which([name for _, name in further]))
        return rows

    def _matcher(self, glob: Glob) -> Callable[[str], object]:
        if not glob.from_end:
            return matcher(glob)
        nearly = matcher(glob.of_any_number())
        numbers = self._numbers
        return lambda name: nearly(name) and matches(glob, name, lambda module: numbers.get(module, []))

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        """Numbers among the children of each module, sorted, for every spelling of names."""
        found: dict[str, set[int]] = {}
        for name in self.places:
            parts = name.split(".")
            for at, part in enumerate(parts):
                if is_number(part):
                    found.setdefault(".".join(parts[:at]), set()).add(int(part))
        return {module: sorted(numbers) for module, numbers in found.items()}

    def _which(self, pattern: Regex, names: Sequence[str]) -> list[int]:
        try:
            return Bounded(pattern.pattern).which(names)
        except TooSlow as error:
            raise SelectorError(f"`{shorten(str(pattern))}` {error}", where=self.where, hint=SIMPLER) from None

    # --- conditions ------------------------------------------------------------------------

    def narrowed(self, rows: Rows, condition: Condition | Word) -> Rows:
        """Rows for which a condition holds.

        Raises:
            SelectorError: The condition needs a property that this table does not record.
        """
        if isinstance(condition, Condition) and condition.field == "name" and isinstance(condition.value, Glob):
            named = self.named(condition.value)
            return rows & named if condition.op == "=" else rows - named
        self._refuse_unrecorded(condition)
        for field, holds in _word(condition.word) if isinstance(condition, Word) else [_comparison(condition)]:
            values = list(map(layer_of, self.names)) if field == "layer" else self.reading.column(field)
            rows = {row for row in rows if holds(values[row])}
        return rows

    def _refuse_unrecorded(self, condition: Condition | Word) -> None:
        unrecorded = self._unrecorded(condition)
        if unrecorded is not None:
            what, instead = unrecorded
            raise SelectorError(
                f"`{condition}` cannot be evaluated, because {what} is not recorded",
                where=self.where,
                exists="files and mappings of arrays record name, shape and dtype",
                hint=f"{instead}, or use the live model",
            )

    def _unrecorded(self, condition: Condition | Word) -> tuple[str, str] | None:
        asked = condition.word if isinstance(condition, Word) else condition.field
        if asked not in _RECORDED or not self.names:
            return None
        field, absent, what, instead = _RECORDED[asked]
        return (what, instead) if all(value == absent for value in self.reading.column(field)) else None

    def _accepted(self, node: Predicate) -> Rows:
        if isinstance(node.function, FieldFunction):
            return {row for row, holds in enumerate(node.function.over(self.reading)) if holds}
        rows = set()
        for row, info in enumerate(self.infos):
            try:
                if node.function(info):
                    rows.add(row)
            except Exception as error:  # keep the user's error, and add its origin
                error.add_note(f"    raised by the selector {node} for the parameter {info.name!r}")
                raise
        return rows

    def _of_objects(self, node: Objects) -> Rows:
        held, root = self.reading.held, self.reading.root
        if held is None or root is None:
            raise SelectorError(
                f"`{shorten(str(node))}` needs the live model",
                where=self.where,
                exists="this table only has names and shapes",
                hint="select by name, as in encoder.**, or beforehand: torchparams.of(model).select(…)",
            )
        wanted: set[int] = set()
        for same in node.objects:
            if isinstance(same.object, type):
                for module in modules_below(root):
                    if isinstance(module, same.object):
                        wanted.update(tensors_below(module))
            elif hasattr(same.object, "_modules"):
                wanted.update(tensors_below(same.object))
            else:
                wanted.add(id(same.object))
        return {row for row, tensor in enumerate(held.values()) if id(tensor) in wanted}


def _not(answer: bool | None) -> bool | None:
    return None if answer is None else not answer


def _all_of(answers: Iterable[bool | None]) -> bool | None:
    found = set(answers)
    return False if False in found else None if None in found else True


def _among(node: Objects, lone: Lone) -> bool | None:
    passed, objects = set(map(id, lone.passed)), [same.object for same in node.objects]
    for each in objects:
        if any(isinstance(step, each) for step in lone.passed) if isinstance(each, type) else id(each) in passed:
            return True
    # Modules and classes of modules may hold the tensor elsewhere.
    return None if any(isinstance(each, type) or hasattr(each, "_modules") for each in objects) else False


def modules_below(root: Any) -> list[Any]:
    """A module and all its submodules, each once."""
    found = {id(root): root}
    todo = [root]
    for module in todo:  # the list grows during the loop
        for child in module._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                todo.append(child)
    return todo


def tensors_below(root: Any) -> Iterator[int]:
    """Ids of the parameters and buffers of a module and all its submodules."""
    for module in modules_below(root):
        yield from map(id, module._parameters.values())
        yield from map(id, module._buffers.values())


def _added(raw: list[str], name: list[str]) -> Iterator[str]:
    """Components of `raw` that are not in `name`, which is a subsequence of it."""
    at = 0
    for component in raw:
        if at < len(name) and component == name[at]:
            at += 1
        else:
            yield component


_BY_SHAPE = "select by name or shape, as in **.bias or [ndim<2]"
_OWNED = ("module", None, "the class of the owner", _BY_SHAPE)
_GRADED = ("requires_grad", None, "requires_grad", "select by name, as in encoder.**")
# For words and conditions: required field, its value if nothing is recorded, description and alternative for messages.
_RECORDED: dict[str, tuple[str, str | None, str, str]] = {
    "norm": _OWNED,
    "embedding": _OWNED,
    "module": _OWNED,
    "trainable": _GRADED,
    "frozen": _GRADED,
    "buffer": ("kind", "tensor", "the distinction of parameters and buffers", "select by name, as in **.running_*"),
}


# --- one parameter -------------------------------------------------------------------------------

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

Holds: TypeAlias = "tuple[str, Callable[[Any], object]]"
"""A field with the predicate of a condition on its value."""


def _comparison(condition: Condition) -> Holds:
    field, value = condition.field, condition.value
    if isinstance(value, int | float) and field in ("ndim", "numel", "nbytes", "bpw", "layer"):
        compare = _OPERATORS[condition.op]
        # A lazy parameter has no dimensions, and a name may have no number. Only `!=` then holds, as the complement of
        # `=`.
        return field, lambda size: condition.op == "!=" if size is None else compare(size, value)
    field, equal = _equality(condition)
    return field, equal if condition.op == "=" else lambda found: not equal(found)


def _equality(condition: Condition) -> Holds:
    field, value = condition.field, condition.value
    if field == "module" and isinstance(value, Glob):
        match = matcher(value)
        return _of_class(lambda cls: any(map(match, class_spellings(cls))))
    if field == "shape" and isinstance(value, tuple):
        return field, lambda shape: _shape_fits(shape, value)
    if field == "encoding" and isinstance(value, str):
        fits = re.compile(".*".join(map(re.escape, value.split("*")))).fullmatch
        return field, lambda encoding: encoding is not None and bool(fits(encoding))
    if field == "device" and isinstance(value, str) and ":" not in value:
        return field, lambda device: device.partition(":")[0] == value
    return field, lambda found: bool(found == value)


def _shape_fits(shape: tuple[int, ...] | None, wanted: tuple[int | None, ...]) -> bool:
    if shape is None or len(shape) != len(wanted):
        return False
    return all(want is None or size == want for size, want in zip(shape, wanted, strict=True))


def is_number(component: str) -> bool:
    """Whether a component is a number as in globs: 64 bits, without leading zeros."""
    digits = component.isdecimal() and component.isascii() and len(component) <= RANGE_DIGITS
    return digits and (component == "0" or component[0] != "0")


def layer_of(name: str) -> int | None:
    """First number among the components of a name, or None.

    >>> layer_of("h.11.mlp.2.weight"), layer_of("head.weight")
    (11, None)
    """
    return next((int(part) for part in name.split(".") if is_number(part)), None)


def is_bias(name: str) -> bool:
    """Whether the last component of a name is `bias`, `biases`, `bias_…`, `…_bias` or `…_biases`.

    For a parametrised tensor, such as `fc.parametrizations.bias.original`, the component before the last counts.
    """
    head, _, last = name.rpartition(".")
    if last.startswith("original"):
        parent, _, parametrised = head.rpartition(".")
        if parent == "parametrizations" or parent.endswith(".parametrizations"):
            last = parametrised
    return last in ("bias", "biases") or last.startswith("bias_") or last.endswith(("_bias", "_biases"))


def class_spellings(qualified: str) -> tuple[str, ...]:
    """Spellings of a class: its qualified name, its own name, and `torch.nn.…` for layers of torch."""
    short = qualified.rpartition(".")[2]
    if qualified.startswith("torch.nn.modules."):
        return qualified, short, f"torch.nn.{short}"
    return qualified, short


def is_norm(owner: tuple[str | None, tuple[str, ...]]) -> bool:
    """Whether a class `(module, bases)` is a normalisation layer, by its name or that of a base; implements `:norm`."""
    module, bases = owner
    return any(map(_CLASSES["norm"], bases if module is None else (module, *bases)))


def _of_class(matches: Callable[[str], object]) -> Holds:
    """Predicate on the owner's class or its bases, cached per class."""
    known: dict[tuple[str | None, tuple[str, ...]], bool] = {}

    def holds(owner: tuple[str | None, tuple[str, ...]]) -> bool:
        if owner not in known:
            module, bases = owner
            known[owner] = any(map(matches, bases if module is None else (module, *bases)))
        return known[owner]

    return "owner", holds


# The classes in torch.nn.utils, such as _SpectralNorm, parametrise tensors, and are not layers.
_NO_LAYER = r"(?!torch\.nn\.utils\.)(?s:.*)"
_CLASSES: dict[str, Callable[[str], object]] = {
    "norm": re.compile(_NO_LAYER + r"Norm(?:Base|[123]d)?").fullmatch,
    "embedding": re.compile(_NO_LAYER + r"Embedding(?:Bag)?").fullmatch,
}
_WORDS: dict[str, tuple[Holds, ...]] = {
    "trainable": (("requires_grad", lambda grad: grad is True),),
    "frozen": (("requires_grad", lambda grad: grad is False), ("kind", lambda kind: kind != "buffer")),
    "tied": (("aliases", bool),),
    "buffer": (("kind", lambda kind: kind == "buffer"),),
    "bias": (("name", is_bias),),
    "matrix": (("ndim", lambda ndim: ndim is not None and ndim >= 2),),
    "meta": (("device", lambda device: device == "meta"),),
    "quantized": (("encoding", lambda encoding: encoding is not None),),
    "sharded": (("sharding", lambda sharding: sharding is not None and sharding.is_split),),
}


def _word(word: str) -> tuple[Holds, ...]:
    return (_of_class(_CLASSES[word]),) if word in _CLASSES else _WORDS[word]
