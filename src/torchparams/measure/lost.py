"""Losses of casts in plans, such as a conversion or merge, that are read before they are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.expressions.casts import Losses
from torchparams.render.tree import Text, plural, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

Lost = dict[str, Losses]
"""Losses by tensor name, for tensors that lost something."""

_SHOWN = 3


def lines(lost: Mapping[str, Losses]) -> list[Text]:
    """Losses in words: one line, or two if values become infinite."""
    if not lost:
        return []
    total = sum(lost.values(), Losses())
    parts = [f"{total.changed:,} changed"] if total.changed else []
    parts += [f"{total.underflow:,} became zero"] if total.underflow else []
    found = [Text(f"Casts within {plural(len(lost), 'tensor')}: {', '.join(parts)}.", "dim")] if parts else []
    over = [name for name, each in lost.items() if each.overflow]
    if over:
        named = ", ".join(over[:_SHOWN]) + (f" and {len(over) - _SHOWN:,} more" if len(over) > _SHOWN else "")
        found.append(
            Text(printable(f"{plural(total.overflow, 'value')} overflow: {named}. Writing raises an error."), "warn")
        )
    return found


def to_json(lost: Mapping[str, Losses]) -> list[dict[str, Any]]:
    """The losses as JSON data."""
    return [
        {"name": name, "overflow": each.overflow, "underflow": each.underflow, "changed": each.changed}
        for name, each in lost.items()
    ]
