"""Coverage of a model by a source: tensors that are loaded, missing, unexpected or mismatched."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.errors import MismatchError, OptionError, nearest, shorten
from torchparams.proposals import distinct
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    listed,
    plural,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torchparams.expressions.casts import Losses
    from torchparams.proposals import Match

KINDS = ("missing", "unexpected", "mismatched")
"""Kinds of mismatch. Each is an attribute of `Coverage` and a value for `strict`."""

_DEEPEST = 8  # maximum number of components in a common ending
_SPELLED = 16  # names of each kind compared by spelling
_SPELLED_AMONG = 2_000

Shape = tuple[int, ...] | None  # of a tensor; None if it is lazy


def _empty() -> Mapping[str, Item]:
    return MappingProxyType({})


class Item(NamedTuple):  # the frozen record that is made soonest: there may be a hundred thousand
    """Tensor in a coverage.

    Attributes:
        name: Canonical name in the model; for an unexpected tensor, its name in the source after renaming.
        source: Original name in the source; None if the tensor is missing.
        note: Reason for a mismatch, or the cast of a loaded tensor (`float32 → bfloat16`); usually empty.
        nearest: For a tensor that is not loaded, the closest name on the other side.
        also: Further names in the source for the same tensor, which is tied in the model.
        lost: Number of values that the cast did not keep; None if it kept all, or was not made.
    """

    name: str
    source: str | None = None
    note: str = ""
    nearest: str | None = None
    also: tuple[str, ...] = ()
    lost: Losses | None = None

    def to_json(self) -> dict[str, Any]:
        """The item as JSON data."""
        return {
            "name": self.name,
            "source": self.source,
            "note": self.note or None,
            "nearest": self.nearest,
            "also": list(self.also),
            "lost": None if self.lost is None else asdict(self.lost),
        }


@dataclass(frozen=True, repr=False)
class Coverage(Result):
    """Result of matching a model with a source; prints as a table.

    Attributes:
        model: Label of the model.
        source: Label of the loaded source.
        loaded: Canonical name → item, for each tensor that is (or, by `torchparams.coverage`, would be) loaded.
        missing: Canonical name → item, for each tensor of the model that the source lacks.
        unexpected: Name → item, for each tensor of the source that the model lacks.
        mismatched: Canonical name → item, for each tensor that was found and does not fit; `note` has the reason.
        left_out: With a selector, names in the source that match no selected tensor.
        rename: Description of the renaming; empty if there was none.
        notes: Sentences on module state that was not loaded, module code that was not run, and tensors without
            memory.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Linear(3, 2)
    >>> found = tp.coverage(model, {"weight": torch.zeros(2, 3), "beta": torch.zeros(2)})
    >>> list(found.loaded), list(found.missing), list(found.unexpected)
    (['weight'], ['bias'], ['beta'])
    >>> found.missing["bias"].nearest
    'beta'
    """

    model: str
    source: str
    loaded: Mapping[str, Item] = field(default_factory=_empty)
    missing: Mapping[str, Item] = field(default_factory=_empty)
    unexpected: Mapping[str, Item] = field(default_factory=_empty)
    mismatched: Mapping[str, Item] = field(default_factory=_empty)
    left_out: tuple[str, ...] = ()
    rename: str = ""
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True if nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def renamed(self) -> dict[str, str]:
        """Name in the source → canonical name, where they differ."""
        return {i.source: i.name for i in self.loaded.values() if i.source is not None and i.source != i.name}

    @property
    def cast(self) -> dict[str, str]:
        """Canonical name → cast, such as `float32 → bfloat16`, for tensors that are cast."""
        return {item.name: item.note for item in self.loaded.values() if item.note}

    @property
    def lost(self) -> dict[str, Losses]:
        """Canonical name → numbers of values that overflowed, underflowed and changed, for casts with losses."""
        return {item.name: item.lost for item in self.loaded.values() if item.lost is not None}

    def refuse(self, strict: bool | Collection[str], hint: Callable[[], str | None]) -> None:
        """Raise for mismatches of the kinds in `strict`.

        Args:
            strict: True for all of `KINDS`, False for none, or the names of some.
            hint: Returns the hint of the error; called only on failure, because it may take as long as the matching.

        Raises:
            MismatchError: There is a mismatch; the message has the first names of each kind.
        """
        kinds = strict_kinds(strict)
        wrong = {kind: getattr(self, kind) for kind in KINDS if kind in kinds}
        parts = [_sentence(kind, items) for kind, items in wrong.items() if items]
        if parts:
            raise MismatchError(
                "; ".join(parts),
                where=f"{self.source} → {self.model}",
                exists=f"{plural(len(self.loaded), 'tensor fits', 'tensors fit')}, and nothing was changed",
                hint=hint(),
            )

    # --- print -----------------------------------------------------------------------------------

    def tree(self, *, limit: int | None = ROWS_SHOWN) -> Tree:
        """Tree of all casts and mismatches, and the counts.

        Args:
            limit: Maximum number of rows of each kind; None for all.
        """
        rows: list[Any] = []
        for kind in KINDS:
            style = "error" if kind == "mismatched" else "warn"
            rows += cut([_row(kind, style, item) for item in getattr(self, kind).values()], limit, kind)
        changed = [item for item in self.loaded.values() if item.note or item.also or item.source != item.name]
        rows += cut([_row("loaded", "good", item) for item in changed], limit, "loaded")
        parts: list[Text | Table] = [Text(printable(f"{self.source} → {self.model}"), "title")]
        if rows:
            columns = (
                Column("what"),
                Column("name", style="name", shrink=True),
                Column("from", style="name", shrink=True),
                Column("note", style="dim", wraps=True),
            )
            parts.append(Table(columns, tuple(rows)))
        if self.rename:
            parts.append(Text(printable(f"renamed: {self.rename}")))
        parts += [Text(printable(note), "warn") for note in self.notes]
        parts.append(Text(self._counts(), "dim"))
        return Tree(tuple(parts))

    def _counts(self) -> str:
        casts, renames = len(self.cast), len(self.renamed)
        inside = [f"{casts:,} cast"] * bool(casts) + [f"{renames:,} renamed"] * bool(renames)
        texts = [f"{len(self.loaded):,} loaded" + (f" ({', '.join(inside)})" if inside else "")]
        texts += [f"{len(getattr(self, kind)):,} {kind}" for kind in KINDS]
        if self.left_out:
            texts.append(f"{len(self.left_out):,} left out")
        return " · ".join(texts)

    def to_json(self) -> dict[str, Any]:
        """The coverage as JSON data."""
        return {
            "model": self.model,
            "source": self.source,
            "complete": self.complete,
            **{
                kind: [item.to_json() for item in items.values()]
                for kind, items in (("loaded", self.loaded), *((kind, getattr(self, kind)) for kind in KINDS))
            },
            "left_out": list(self.left_out),
            "rename": self.rename or None,
            "notes": list(self.notes),
        }


def strict_kinds(strict: bool | Collection[str]) -> frozenset[str]:
    """Parse `strict` into kinds of mismatch.

    Raises:
        OptionError: A name is not a kind.

    >>> sorted(strict_kinds(("missing",)))
    ['missing']
    """
    if isinstance(strict, bool):
        return frozenset(KINDS if strict else ())
    named = frozenset([strict] if isinstance(strict, str) else strict)
    for kind in sorted(named - frozenset(KINDS)):
        raise OptionError(
            f"strict={kind!r} is not a kind of mismatch",
            exists=f"the kinds are {', '.join(KINDS)}",
            hint=f"pass several as strict={KINDS[:2]!r}",
        )
    return named


def _sentence(kind: str, items: Mapping[str, Item]) -> str:
    return f"{len(items):,} {kind}: {listed(map(_in_words, items.values()))}"


def _in_words(item: Item) -> str:
    text = shorten(repr(item.name))
    if item.note:
        text += f" ({item.note})"
    if item.nearest is not None:
        text += f" (perhaps {shorten(repr(item.nearest))})"
    return text


def _row(kind: str, style: str, item: Item) -> Row:
    notes = [item.note] if item.note else []
    if item.lost is not None:
        counts = (("overflow", item.lost.overflow), ("underflow", item.lost.underflow), ("changed", item.lost.changed))
        notes += [f"{count:,} {text}" for text, count in counts if count]
        style = "warn" if item.lost.overflow or item.lost.underflow else style
    if item.also:
        notes.append(f"{kind} with {', '.join(item.also)}")
    if item.nearest is not None:
        notes.append(f"perhaps {item.nearest}")
    source = "" if item.source in (None, item.name) else str(item.source)
    return Row((Cell(kind, style), item.name, source, "; ".join(notes)))


# --- the nearest candidates -----------------------------------------------------------------------


def candidates(
    these: Mapping[str, Shape], others: Mapping[str, Shape], matches: Iterable[Match] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """Closest name in `others` for each of `these`, and the reverse.

    Candidates are, in this order: `matches`; names with equal final components and shape; for the first few names,
    similar spellings; names with equal final components. The time is linear in the number of names.

    Args:
        these: Shapes by name.
        others: Shapes by name.
        matches: Pairs of `these` and `others` that are known, such as those of `torchparams.proposals.best_match`.

    >>> candidates({"fc.weight": (3,)}, {"net.fc.weight": (4,)})
    ({'fc.weight': 'net.fc.weight'}, {'net.fc.weight': 'fc.weight'})
    """
    if not (these and others):
        return {}, {}
    pairs = {match.have: match.want for match in matches}
    back = {theirs: ours for ours, theirs in pairs.items()}
    # Shapes as text: a file could choose numbers whose Python hashes collide.
    ours, theirs = ([(name, str(shape), _endings(name)) for name, shape in side.items()] for side in (these, others))
    return _with_alike(pairs, ours, theirs), _with_alike(back, theirs, ours)


_Described = tuple[str, str, list[str]]  # name, shape, endings


def _with_alike(found: dict[str, str], these: Sequence[_Described], others: Sequence[_Described]) -> dict[str, str]:
    by_shape: dict[str, str] = {}
    by_ending: dict[str, str] = {}
    for name, shape, endings in others:
        for ending in endings:
            by_shape.setdefault(ending + shape, name)
            by_ending.setdefault(ending, name)
    names = [name for name, _, _ in others]
    spelled = 0 if len(names) <= _SPELLED_AMONG else _SPELLED
    for name, shape, endings in these:
        if name in found:
            continue
        alike = next((by_shape[end + shape] for end in endings if end + shape in by_shape), None)
        if alike is None and spelled < _SPELLED:
            spelled += 1
            alike = next((near for near in nearest(name, names, 3) if not distinct(name, near)), None)
        if alike is None:
            alike = next((by_ending[end] for end in endings if end in by_ending), None)
        if alike is not None:
            found[name] = alike
    return found


def _endings(name: str) -> list[str]:
    """Endings of `name` with at most `_DEEPEST` components, longest first.

    >>> _endings("a.b.c")
    ['a.b.c', 'b.c', 'c']
    """
    found: list[str] = []
    at = len(name)
    while at >= 0 and len(found) < _DEEPEST:
        at = name.rfind(".", 0, at)
        found.append(name[at + 1 :])
    return found[::-1]


def grouped(items: Iterable[Item]) -> Mapping[str, Item]:
    """Name → item, read-only."""
    return MappingProxyType({item.name: item for item in items})
