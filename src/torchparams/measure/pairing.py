"""Pair the tensors of two sources by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchparams.errors import NoMatch, SelectorError
from torchparams.proposals import propose

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.info import ParameterInfo
    from torchparams.renames import Renames

    Infos = Mapping[str, ParameterInfo]


@dataclass(frozen=True, slots=True)
class Pair:
    """Tensor of A, of B, or of both.

    Attributes:
        name: Name in A; for a tensor only in B, its name after the rename.
        a: Info in A, or None.
        b: Info in B under its own name, or None.
    """

    name: str
    a: ParameterInfo | None
    b: ParameterInfo | None


def pair(a: Infos, b: Infos, renames: Renames, where: str | None = None) -> list[Pair]:
    """Pair tensors by name, in A's order; tensors only in B come last. Linear in the number of tensors.

    A tied tensor matches by any of its names. If only one side ties two names, each name makes a pair.

    Args:
        a, b: Infos by name.
        renames: Renames from B's names to A's.
        where: Label of B, for errors.

    Raises:
        MismatchError: Two names of B become one.
    """
    if renames:
        every = dict.fromkeys(name for info in b.values() for name in (info.name, *info.aliases))
        new = renames.apply(every, where=where)
    else:
        new = {}
    # A canonical name takes precedence over an alias of another tensor.
    mine, yours = _by_name(a, {}), _by_name(b, new)
    found: dict[str, Pair] = {}
    met: set[str] = set()
    for name, info in a.items():
        other = yours.get(name)
        if other is None:
            # In B, the tie may be listed under another of its names.
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


def selected(pairs: list[Pair], selector: object, *, strict: bool = True, where: str | None = None) -> list[Pair]:
    """Pairs that a selector matches on either side.

    Args:
        pairs: All pairs.
        selector: Selector, applied to the names of the pairs.
        strict: Raise if any branch of the selector matches nothing on both sides.
        where: Label of the two sources, for errors.

    Raises:
        NoMatch: A branch matches nothing.
        SelectorError: The selector uses a property that neither side reading.
    """
    from torchparams.selectors import Selector

    chosen = Selector.of(selector)
    sides = [
        [info._replace(name=p.name) if info.name != p.name else info for p in pairs if (info := getattr(p, side))]
        for side in ("a", "b")
    ]
    hits: set[str] = set()
    able: list[list[ParameterInfo]] = []
    refused: list[SelectorError] = []
    for infos in sides:
        try:
            hits |= chosen.names(infos, where=where)
            able.append(infos)
        except SelectorError as error:  # such as `:trainable`, known for a model but not for a file
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
    """Propose a rename of B's names that pairs more tensors, or None."""
    return propose(b, a)
