"""Match the tensors of several checkpoints by name."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torchparams.edit.convert import as_stored, select_to_write
from torchparams.edit.save import differing
from torchparams.encodings.companions import refuse
from torchparams.errors import MismatchError, NoMatch, OptionError, PlanError, UnknownName
from torchparams.expressions.combination import combines
from torchparams.proposals import propose
from torchparams.renames import Renames
from torchparams.render.tree import plural
from torchparams.selectors import quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

    Found = tuple[Source, ParameterInfo]

SHOWN = 3
"""Maximum number of names in a message."""

_MISSING = ("refuse", "keep", "drop")


@dataclass(frozen=True, slots=True)
class _Renamed:
    """Tensors of one source, by every name after renaming."""

    source: Source
    by_name: dict[str, ParameterInfo]
    infos: Mapping[str, ParameterInfo]


class Matched:
    """Tensors of all sources, matched by name; the first source leads.

    Attributes:
        sources: Sources in order.
        tensors: For each tensor to write: its names, and its infos in every source, or in one source if it is copied
            unchanged.
        infos: Infos from the first source, under the names written.
        dropped: Tensors that are not written, each with the reason.
        notes: Notes to show.
    """

    def __init__(
        self, things: Iterable[object], selector: object, rename: object, missing: str, *, strict: bool
    ) -> None:
        if missing not in _MISSING:
            raise OptionError(f"`missing` must be 'refuse', 'keep' or 'drop', not {missing!r}")
        self.dropped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self._tables: list[_Renamed] = []
        every = list(things)
        for i, thing in enumerate(every):
            params, dropped, notes = select_to_write(thing, selector if not i else None, strict=strict)
            if not i:
                self.dropped += dropped
                self.notes += notes
            infos = as_stored(params)
            self._tables.append(_Renamed(params.source, _by_name(infos, {}), infos))
        self.sources = [table.source for table in self._tables]
        if not self._tables[0].infos:
            raise PlanError("the source has no tensors", where=self.label(0))
        self._rename(Renames.of(rename), strict=strict)
        self.tensors = self._match(selector, missing)
        self._check_shapes()
        self._refuse_codes()
        self._take_integers()
        self.infos = {names[0]: found[0][1]._replace(name=names[0], aliases=names[1:]) for names, found in self.tensors}

    def label(self, i: int) -> str:
        """Label of a source, for messages."""
        return self.sources[i].label

    def _rename(self, renames: Renames, *, strict: bool) -> None:
        if not renames:
            return
        failed: list[Exception] = []
        for i, table in enumerate(self._tables[1:], 1):
            if strict:
                try:
                    renames.apply(table.by_name, where=self.label(i))
                except (NoMatch, UnknownName) as error:
                    failed.append(error)
            new = renames.apply(table.by_name, strict=False, where=self.label(i))
            self._tables[i] = replace(table, by_name=_by_name(table.infos, new))
        if failed and len(failed) == len(self._tables) - 1:
            raise failed[0]

    def _match(self, selector: object, missing: str) -> list[tuple[tuple[str, ...], list[Found]]]:
        leader, *others = self._tables
        lacking: dict[str, list[str]] = {}
        tensors: list[tuple[tuple[str, ...], list[Found]]] = []
        for info in leader.infos.values():
            # A tie is kept if it exists in every source; other names are written separately.
            together: dict[tuple[int, ...], tuple[list[str], list[Found]]] = {}
            for name in (info.name, *info.aliases):
                found: list[Found] = [(leader.source, info)]
                for other in others:
                    if name in other.by_name:
                        found.append((other.source, other.by_name[name]))
                    else:
                        lacking.setdefault(name, []).append(other.source.label)
                if name in lacking:
                    if missing == "drop":
                        continue
                    found = found[:1]
                key = (len(found), *(id(each) for _, each in found))
                together.setdefault(key, ([], found))[0].append(name)
            tensors += [(tuple(names), found) for names, found in together.values()]
        known = leader.by_name.keys()
        extra: dict[str, Found] = {}
        for other in others if selector is None else ():
            for name, info in other.by_name.items():
                if name not in known:
                    extra.setdefault(name, (other.source, info))
        if (lacking or extra) and missing == "refuse":
            raise self._differ(lacking, extra)
        if missing == "keep":
            tensors += [((name,), [found]) for name, found in extra.items()]
            kept = [*lacking, *extra]
            if kept:
                self.notes.append(f"not in every source, copied unchanged: {some(kept)}")
        else:
            self.dropped += [(name, "not in every source") for name in (*lacking, *extra)]
        if not tensors:
            raise PlanError("the sources have no tensor in common", where=self.label(0))
        return tensors

    def _differ(self, lacking: dict[str, list[str]], extra: dict[str, Found]) -> MismatchError:
        parts = [f"{some(list(lacking))} not in {next(iter(lacking.values()))[0]}"] if lacking else []
        if extra:
            where = next(iter(extra.values()))[0].label
            parts.append(f"{some(list(extra))} of {where} not in {self.label(0)}")
        leader = self._tables[0]
        hint = None
        for other in self._tables[1:]:
            proposed = propose(other.infos, leader.infos)
            if proposed is not None:
                hint = f"rename the tensors of {other.source.label} ({proposed}): rename=… (--rename)"
                break
        return MismatchError(
            f"the sources have different tensors: {'; '.join(parts)}",
            hint=hint or "pass missing='keep' to copy them from the first source that has them, or missing='drop'",
        )

    def _check_shapes(self) -> None:
        wrong: list[str] = []
        names_of: list[str] = []
        for names, found in self.tensors:
            shape = found[0][1].shape
            other = next(((source, info) for source, info in found[1:] if info.shape != shape), None)
            if other is not None:
                names_of += names
                here, there = found[0][0].label, other[0].label
                wrong.append(f"{names[0]!r} is {_shape(shape)} in {here} and {_shape(other[1].shape)} in {there}")
        if wrong:
            more = f", and {plural(len(wrong) - SHOWN, 'other tensor')}" if len(wrong) > SHOWN else ""
            raise MismatchError(
                f"shapes differ: {'; '.join(wrong[:SHOWN])}{more}",
                hint=f"-s {shlex.quote(_without(names_of))} merges only the others",
            )

    def _refuse_codes(self) -> None:
        for source in self.sources:
            names = [info.name for _, found in self.tensors if len(found) > 1 for at, info in found if at is source]
            refuse(
                source.coded(), names, source.label, "Exclude them with a selector (-s), or decode the sources first"
            )

    def _take_integers(self) -> None:
        """Copy non-float tensors from the first source, and note those that differ in other sources."""
        taken: list[int] = []
        for i, (names, found) in enumerate(self.tensors):
            plain = [combines(info.dtype) for _, info in found]
            if len(found) == 1 or all(plain):
                continue
            if any(plain):
                at = plain.index(not plain[0])
                raise MismatchError(
                    f"{names[0]!r} is {found[0][1].dtype} in {found[0][0].label} "
                    f"and {found[at][1].dtype} in {found[at][0].label}",
                    hint="convert one of the sources first",
                )
            taken.append(i)
        first = {self.tensors[i][0][0]: self.tensors[i][1][0] for i in taken}
        changed: set[str] = set()
        for place in range(1, len(self.sources)):
            changed |= differing(first, {self.tensors[i][0][0]: self.tensors[i][1][place] for i in taken})
        for name in first:
            info = first[name][1]
            if name in changed and info.numel > 1:
                raise PlanError(
                    f"{name!r} differs between the sources, and {info.dtype} cannot be averaged",
                    where=self.label(0),
                    hint="exclude it with a selector (-s), or convert it to floats first",
                )
        for i in taken:
            self.tensors[i] = self.tensors[i][0], self.tensors[i][1][:1]
        if first:
            self.notes.append(f"not floats, copied from {self.label(0)}: {some(list(first))}")
        if changed:
            ordered = [name for name in first if name in changed]
            self.notes.append(f"different values in other sources: {some(ordered)}")


def _by_name(infos: Mapping[str, ParameterInfo], new: Mapping[str, str]) -> dict[str, ParameterInfo]:
    """Tensors by every name; canonical names win."""
    found = {new.get(name, name): info for name, info in infos.items()}
    for info in infos.values():
        for alias in info.aliases:
            found.setdefault(new.get(alias, alias), info)
    return found


def _without(names: Sequence[str]) -> str:
    """Selector of all tensors except these."""
    return f"~({' | '.join(map(quote, names))})" if len(names) > 1 else f"~{quote(names[0])}"


def _shape(shape: Any) -> str:
    return "lazy" if shape is None else str(list(shape))


def some(names: Sequence[str]) -> str:
    """First few names, and the count of the others."""
    shown = ", ".join(map(repr, names[:SHOWN]))
    return f"{shown} and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown
