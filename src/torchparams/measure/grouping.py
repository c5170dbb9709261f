"""Group tensors, and add up the sketches of each group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.errors import SelectorError
from torchparams.names import layer_of, module_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torchparams.info import ParameterInfo
    from torchparams.measure.tensor_stats import TensorStats
    from torchparams.sketch import Sketch

REST = "(rest)"
"""Name of the group for tensors that no selector matches."""

PENDING_CODES = 1 << 21
"""Maximum number of sketch codes (at least 6 bytes each) that wait to be added up."""


KEYS: dict[str, Callable[[ParameterInfo], str]] = {
    "module": lambda info: module_of(info.name),
    "layer": lambda info: layer_of(info.name),
    "dtype": lambda info: str(info.dtype),
}
"""Words for grouping, each with a function from a tensor to the name of its group."""

By = tuple[str, ...]
"""Grouping: one of `KEYS`, or the texts of selectors."""


def groups_of(
    infos: Mapping[str, ParameterInfo], by: object, *, strict: bool = True, where: str | None = None
) -> tuple[By, dict[str, list[str]]]:
    """Grouping in words, and the names in each group, ordered by first tensor.

    Args:
        infos: Infos of all tensors, by canonical name.
        by: `module`, `layer` or `dtype`; or a selector or list of selectors: each makes a group of its matches, and the
            remaining tensors make the group `REST`.
        strict: Raise if any branch of a selector matches nothing.
        where: Label of the source, for errors.

    Raises:
        NoMatch: A branch of a selector matches nothing.
        SelectorError: A list contains one of the words above.
    """
    found: dict[str, list[str]] = {}
    if isinstance(by, list | tuple) and len(by) == 1:
        by = by[0]
    if isinstance(by, str) and by in KEYS:
        for info in infos.values():
            found.setdefault(KEYS[by](info), []).append(info.name)
        return (by,), found

    from torchparams.selectors import Selector

    selectors: dict[str, Selector] = {}
    for each in by if isinstance(by, list | tuple) else (by,):
        if isinstance(each, str) and each in KEYS:
            raise SelectorError(
                f"{each!r} is a grouping word, and cannot be in a list",
                hint=f"for a tensor of that name, write the selector /{each}/",
            )
        selectors[str(Selector.of(each))] = Selector.of(each)
    left = dict.fromkeys(infos)
    for text, selector in selectors.items():
        hits = selector.names(infos.values(), strict=strict, where=where)
        found[text] = [name for name in infos if name in hits]
        for name in hits:
            left.pop(name, None)
    if left:
        found[REST] = list(left)
    return tuple(selectors), found


class GroupSums:
    """Adds sketches to groups as they arrive, and releases a group's sketch after its last tensor.

    Memory holds the sketches of unfinished groups, whatever the number of tensors.

    Args:
        groups: Names of the tensors in each group.
        infos: Infos by canonical name.
        derive: Function that makes the row of a group from its sketch, its name, and the infos of its tensors.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]],
        infos: Mapping[str, ParameterInfo],
        derive: Callable[[Sketch, str, list[ParameterInfo]], TensorStats],
    ) -> None:
        self._infos = infos
        self._derive = derive
        self._names = groups
        self._groups_of: dict[str, list[str]] = {}
        for group, names in groups.items():
            for name in names:
                self._groups_of.setdefault(name, []).append(group)
        self._missing = {group: len(names) for group, names in groups.items()}
        self._parts: dict[str, list[Sketch]] = {group: [] for group in groups}
        self._read: dict[str, list[str]] = {group: [] for group in groups}
        self._pending, self._limit = 0, PENDING_CODES
        self._rows: dict[str, TensorStats] = {}
        for group, missing in self._missing.items():
            if not missing:
                self._close(group)

    def add(self, name: str, sketch: Sketch | None) -> None:
        """Add the sketch of a tensor, or None if it could not be read."""
        for group in self._groups_of.get(name, ()):
            if sketch is not None:
                self._parts[group].append(sketch)
                self._read[group].append(name)
                self._pending += len(sketch.codes)
            self._missing[group] -= 1
            if not self._missing[group]:
                self._close(group)
        if self._pending > self._limit:
            self._add_up()

    @property
    def rows(self) -> list[TensorStats]:
        """Rows of all complete groups, in order."""
        return [self._rows[group] for group in self._names if group in self._rows]

    def _sum(self, group: str) -> Sketch:
        """Sum of a group's sketches, in their common dtype if there is one, so that it stays exact."""
        from torchparams.sketch import Sketch

        parts = self._parts[group]
        types = {part.dtype for part in parts}
        return parts[0] if len(parts) == 1 else Sketch.merge(parts, types.pop() if len(types) == 1 else "float64")

    def _add_up(self) -> None:
        for group, parts in self._parts.items():
            if len(parts) > 1:
                self._parts[group] = [self._sum(group)]
        self._pending = sum(len(part.codes) for parts in self._parts.values() for part in parts)
        # Raise the limit if the sketches of unfinished groups alone exceed it.
        self._limit = max(PENDING_CODES, 2 * self._pending)

    def _close(self, group: str) -> None:
        infos = [self._infos[name] for name in self._read[group]]
        self._rows[group] = self._derive(self._sum(group), group, infos)
        self._pending -= sum(len(part.codes) for part in self._parts[group])
        self._parts[group] = []
        self._read[group] = []
