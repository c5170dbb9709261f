"""Which tensor of one source goes with which of another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchparams.errors import NoMatch, SelectorError
from torchparams.renames import Renames, propose

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.info import ParameterInfo

    Infos = Mapping[str, ParameterInfo]


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of A, of B, or of both.

    Attributes:
        name: What A calls it; of a tensor of B alone, its name there once that is renamed.
        a: Its record in A.
        b: Its record in B, with the name that it has there.
    """

    name: str
    a: ParameterInfo | None
    b: ParameterInfo | None


def pair(a: Infos, b: Infos, renames: Renames, where: str | None = None) -> list[Pair]:
    """The tensors of both sides by name, in A's order, those of B alone last in its own. Linear in their count.

    A tied tensor answers to all of its names. Where only one side ties two names, there is a pair for each.

    Args:
        a, b: Records by name.
        renames: What the names of B are called in A.
        where: What an error calls B.

    Raises:
        MismatchError: Two names of B become one.
    """
    if renames:
        every = dict.fromkeys(name for info in b.values() for name in (info.name, *info.aliases))
        new = renames.apply(every, where=where)
    else:
        new = {}
    # Canonical names come first: of a name that is one tensor's and another's alias, the tensor itself is meant.
    mine, yours = _by_name(a, {}), _by_name(b, new)
    found: dict[str, Pair] = {}
    met: set[str] = set()
    for name, info in a.items():
        other = yours.get(name)
        if other is None:
            # A tie that goes by another of its names in B, which is listed there.
            other = next((yours[alias] for alias in info.aliases if alias in yours), None)
        found[name] = Pair(name, info, other)
        if other is not None:
            met.add(other.name)
    for name, info in b.items():
        called = new.get(name, name)
        if called in found:
            continue
        other = mine.get(called)
        if other is not None and (name not in met or found[other.name].b is not info):
            found[called] = Pair(called, other, info)
        elif name not in met:
            found[called] = Pair(called, None, info)
    return list(found.values())


def _by_name(infos: Infos, new: Mapping[str, str]) -> dict[str, ParameterInfo]:
    found = {new.get(name, name): info for name, info in infos.items()}
    for info in infos.values():
        for alias in info.aliases:
            found.setdefault(new.get(alias, alias), info)
    return found


def choose(pairs: list[Pair], selector: object, *, strict: bool = True, where: str | None = None) -> list[Pair]:
    """The pairs that a selector hits on either side.

    Args:
        pairs: All of them.
        selector: What chooses; names are those of the pairs.
        strict: Refuse a selector of which any union branch hits nothing on both sides.
        where: What an error calls the two sources.

    Raises:
        NoMatch: A branch hits nothing.
        SelectorError: It asks for what neither side records.
    """
    from torchparams.selectors import Selector

    chosen = Selector.of(selector)
    sides = [
        [replace(info, name=p.name) if info.name != p.name else info for p in pairs if (info := getattr(p, side))]
        for side in ("a", "b")
    ]
    hits: set[str] = set()
    able: list[list[ParameterInfo]] = []
    refused: list[SelectorError] = []
    for infos in sides:
        try:
            hits |= chosen.names(infos, where=where)
            able.append(infos)
        except SelectorError as error:  # `:trainable` of a file, beside a model of which it can be said
            refused.append(error)
    if not able:
        raise refused[0]
    if strict:
        _refuse(chosen.branches, able, where)
    return [p for p in pairs if p.name in hits]


def _refuse(branches: tuple[object, ...], sides: list[list[ParameterInfo]], where: str | None) -> None:
    from torchparams.selectors import Selector

    for branch in branches:
        missed = None
        for infos in sides:
            try:
                Selector.of(branch).names(infos, strict=True, where=where)
                break
            except NoMatch as error:
                missed = missed or error
        else:
            assert missed is not None
            raise missed


def proposal(a: Infos, b: Infos) -> Renames | None:
    """The rename of B's names under which more of them meet one of A."""
    return propose(b, a)
