"""What of a model was found in what is loaded into it, and what was not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, OptionError, nearest, shorten
from torchparams.renames import best_match, distinct
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tree import (
    Cell,
    Column,
    Report,
    Row,
    Table,
    Text,
    cut,
    listed,
    plural,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torchparams.expressions.casts import Losses
    from torchparams.info import ParameterInfo

KINDS = ("missing", "unexpected", "mismatched")
"""What can be wrong, by name: each is an attribute of `Coverage`, and can be asked for in `strict`."""

_DEEPEST = 8  # components of a common ending
_SPELLED = 16  # names of each kind that are compared letter by letter, where these are not too many
_SPELLED_AMONG = 2_000
_MATCHED_AMONG = 10_000  # names on both sides; of more, how they end says enough


def _empty() -> Mapping[str, Item]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a coverage.

    Attributes:
        name: Its canonical name in the model; of what is unexpected, the name in what is loaded, after renaming.
        source: Its own name in what is loaded; None of what is missing.
        note: What does not fit, or, of what is loaded, its cast: `float32 → bfloat16`; mostly empty.
        nearest: Of what is not loaded, the name on the other side that was perhaps meant.
        also: Further names in what is loaded that belong here too: the model has them tied.
        lost: How many values its cast has not kept; None where it has kept all, or has not been made.
    """

    name: str
    source: str | None = None
    note: str = ""
    nearest: str | None = None
    also: tuple[str, ...] = ()
    lost: Losses | None = None

    def to_json(self) -> dict[str, Any]:
        """The item as JSON takes it."""
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
    """What of a model is filled from what, and what does not fit; it prints as a table.

    Attributes:
        model: What the model is called.
        source: What that which is loaded is called.
        loaded: Canonical name → item, for all that is (or, by `torchparams.coverage`, would be) loaded.
        missing: The same for what the model has and nothing was found for.
        unexpected: Name → item, for what nothing in the model takes.
        mismatched: Canonical name → item, for what was found and does not fit; `note` says why.
        left_out: With a selector, names in what is loaded that nothing of what it selects takes.
        rename: What was done about names, in words; empty if nothing.
        notes: What else to know, a sentence each: state and code of modules that is not loaded or run, tensors
            without memory.

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
        """Whether everything fits: nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def renamed(self) -> dict[str, str]:
        """Name in what is loaded → canonical name, for those that differ."""
        return {i.source: i.name for i in self.loaded.values() if i.source is not None and i.source != i.name}

    @property
    def cast(self) -> dict[str, str]:
        """Canonical name → the cast it goes through, `float32 → bfloat16`, for those that do."""
        return {item.name: item.note for item in self.loaded.values() if item.note}

    @property
    def lost(self) -> dict[str, Losses]:
        """Canonical name → how many values overflowed, underflowed and changed, of casts that have not kept all."""
        return {item.name: item.lost for item in self.loaded.values() if item.lost is not None}

    def refuse(self, strict: bool | Collection[str], hint: Callable[[], str | None]) -> None:
        """Raise if something is wrong that `strict` does not allow.

        Args:
            strict: True for all of `KINDS`, False for none, or the names of some.
            hint: Says what to do; called only then, as finding out may take as long as the matching did.

        Raises:
            MismatchError: Something does not fit; the message has the first names of each kind.
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

    def report(self, *, limit: int | None = ROWS_SHOWN) -> Report:
        """The coverage as a report: everything that needs a look, and a line with the counts.

        Args:
            limit: Most rows of each kind to show; None for all.
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
        return Report(tuple(parts))

    def _counts(self) -> str:
        casts, renames = len(self.cast), len(self.renamed)
        inside = [f"{casts:,} cast"] * bool(casts) + [f"{renames:,} renamed"] * bool(renames)
        texts = [f"{len(self.loaded):,} loaded" + (f" ({', '.join(inside)})" if inside else "")]
        texts += [f"{len(getattr(self, kind)):,} {kind}" for kind in KINDS]
        if self.left_out:
            texts.append(f"{len(self.left_out):,} left out")
        return " · ".join(texts)

    def to_json(self) -> dict[str, Any]:
        """The coverage as JSON takes it."""
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
    """The kinds that `strict` names.

    Raises:
        OptionError: It names something else.

    >>> sorted(strict_kinds(("missing",)))
    ['missing']
    """
    if isinstance(strict, bool):
        return frozenset(KINDS if strict else ())
    named = frozenset([strict] if isinstance(strict, str) else strict)
    for kind in sorted(named - frozenset(KINDS)):
        raise OptionError(
            f"strict={kind!r} is no kind of mismatch",
            exists=f"there are {', '.join(KINDS)}",
            hint=f"for two of them, strict={KINDS[:2]!r}",
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
    these: Mapping[str, ParameterInfo], others: Mapping[str, ParameterInfo]
) -> tuple[dict[str, str], dict[str, str]]:
    """For each of `these` the one of `others` that was perhaps meant, and the other way round.

    Taken is, in this order, what goes together by shape and place (see `torchparams.renames.best_match`), unless there
    are very many; what ends in the same components and is of the same shape; for the first few, what is spelled alike;
    and what ends alike at all. Linear.

    Args:
        these: Records by name.
        others: The same.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> a, b = tp.of({"fc.weight": np.zeros(3)}), tp.of({"net.fc.weight": np.zeros(4)})
    >>> candidates(a.infos, b.infos)
    ({'fc.weight': 'net.fc.weight'}, {'net.fc.weight': 'fc.weight'})
    """
    if not (these and others):
        return {}, {}
    few = len(these) + len(others) <= _MATCHED_AMONG
    pairs = {match.have: match.want for match in best_match(these, others)} if few else {}
    back = {theirs: ours for ours, theirs in pairs.items()}
    return _with_alike(pairs, these, others), _with_alike(back, others, these)


def _with_alike(
    found: dict[str, str], these: Mapping[str, ParameterInfo], others: Mapping[str, ParameterInfo]
) -> dict[str, str]:
    # Shapes as text: a file could choose numbers of which Python's hashes collide.
    by_shape: dict[tuple[str, str], str] = {}
    by_ending: dict[str, str] = {}
    for name, info in others.items():
        shape = str(info.shape)
        for ending in _endings(name):
            by_shape.setdefault((shape, ending), name)
            by_ending.setdefault(ending, name)
    names = list(others)
    spelled = 0 if len(names) <= _SPELLED_AMONG else _SPELLED
    for name, info in these.items():
        if name in found:
            continue
        endings = list(_endings(name))
        shape = str(info.shape)
        alike = next((by_shape[shape, end] for end in endings if (shape, end) in by_shape), None)
        if alike is None and spelled < _SPELLED:
            spelled += 1
            alike = next((near for near in nearest(name, names, 3) if not distinct(name, near)), None)
        if alike is None:
            alike = next((by_ending[end] for end in endings if end in by_ending), None)
        if alike is not None:
            found[name] = alike
    return found


def _endings(name: str) -> Iterable[str]:
    """What `name` ends in, the longest first: at most so many components."""
    parts = name.split(".")
    return (".".join(parts[at:]) for at in range(max(len(parts) - _DEEPEST, 0), len(parts)))


def grouped(items: Iterable[Item]) -> Mapping[str, Item]:
    """Name → item, read-only."""
    return MappingProxyType({item.name: item for item in items})
