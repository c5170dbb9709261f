"""Meaning of globs: the reference for the fast matcher in `glob_regex`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams._selector.globs import ANY_DEPTH, Alternatives, Glob, Range, Sequence, Wild, counts_from_end, replaced

if TYPE_CHECKING:
    from collections.abc import Callable


def matches(glob: Glob, name: str, numbers: Callable[[str], list[int]] | None = None) -> bool:
    """Whether `glob` matches the whole `name`. This is the reference for the fast matcher.

    Args:
        glob: Glob to match.
        name: Name to match.
        numbers: Function from a module to the numbers that occur in it, sorted; for globs with numbers from the end.
    """
    parts = name.split(".")
    reached = {0}
    for component in glob.components:
        if component == ANY_DEPTH:
            reached = set(range(min(reached), len(parts) + 1))
        elif numbers is not None and counts_from_end(component):
            wanted = {at: _among(component, numbers(".".join(parts[:at]))) for at in reached if at < len(parts)}
            reached = {at + 1 for at, there in wanted.items() if there is not None and _fits(there, parts[at])}
        else:
            reached = {at + 1 for at in reached if at < len(parts) and _fits(component, parts[at])}
        if not reached:
            return False
    return len(parts) in reached


def _among(component: Sequence, numbers: list[int]) -> Sequence | None:
    return replaced(component, lambda found: found.among(numbers))


def _fits(component: Sequence, part: str) -> bool:
    return len(part) in _ends(component, part, {0})


def _ends(sequence: Sequence, part: str, starts: set[int]) -> set[int]:
    """Possible ends of `sequence` in `part`, from any of `starts`. Sets avoid exponential backtracking."""
    for piece in sequence:
        if not starts:
            break
        if isinstance(piece, str):
            starts = {at + len(piece) for at in starts if part.startswith(piece, at)}
        elif piece is Wild.CHARACTER:
            starts = {at + 1 for at in starts if at < len(part)}
        elif piece is Wild.CHARACTERS:
            starts = set(range(min(starts), len(part) + 1))
        elif isinstance(piece, Range):
            starts = {at + w for at in starts for w in piece.widths if _in_range(piece, part[at : at + w], w)}
        elif isinstance(piece, Alternatives):
            starts = set().union(*(_ends(item, part, starts) for item in piece.items))
    return starts


def _in_range(piece: Range, digits: str, width: int) -> bool:
    if len(digits) != width or not (digits.isascii() and digits.isdigit()):
        return False
    if width > 1 and not piece.width and digits.startswith("0"):
        return False
    return piece.first <= int(digits) <= piece.last
