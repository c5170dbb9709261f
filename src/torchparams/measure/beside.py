"""Show the non-tensor content of a checkpoint: metadata, other entries, and the verdict on its pickle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torchparams.errors import shorten
from torchparams.render.tree import Text, listed, plural, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torchparams.sources.base import Source

ENTRIES_SHOWN = 6
"""Maximum number of non-tensor entries in a listing."""

_WIDTH = 70  # characters of a value per line


def beside_lines(source: Source) -> Iterator[Text]:
    """Lines of a listing for non-tensor content; none if there is none."""
    parts = outermost(source)
    if parts:
        # A part in files of its own is not counted: they were not opened.
        counts = {part: f" ({plural(count, 'tensor')})" if count else "" for part, count in parts.items()}
        shown = [f"{target_of(source, part)}{count}" for part, count in counts.items()]
        yield Text(printable(f"parts that can be listed separately: {listed(shown)}"), "dim")
    said = {each.name for each in source.left_out}
    entries = [(name, value) for name, value in source.metadata.items() if name not in said]
    if entries:
        yield Text(f"beside the tensors: {plural(len(entries), 'entry', 'entries')}", "dim")
        for name, value in entries[:ENTRIES_SHOWN]:
            yield Text(f"  {shorten(name, 40)} = {shorten(text_of(value), _WIDTH)}", "dim")
        if len(entries) > ENTRIES_SHOWN:
            yield Text(f"  … {len(entries) - ENTRIES_SHOWN:,} more; --json has all", "dim")
    verdict = source.verdict
    if verdict is not None and verdict.alarm is not None:
        yield Text(printable(f"the pickle {verdict.alarm}"), "error")
    elif verdict is not None and verdict.classes:
        yield Text(printable(f"the pickle needs the classes {listed(verdict.classes)}"), "dim")


def outermost(source: Source) -> dict[str, int]:
    """Outermost mappings of a checkpoint, with the number of tensors in each."""
    found = source.mappings
    if not found:
        return {}
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    names = list(source.keys())
    return {part: sum(name.startswith(f"{part}.") for name in names) for part in outer}


def target_of(source: Source, part: str) -> str:
    """Target that names a mapping inside a checkpoint, such as `run.ckpt#model`."""
    return f"{source.label}{'.' if '#' in source.label else '#'}{part}"


def part_within(source: Source, wanted: Mapping[str, Any]) -> str | None:
    """Target of the mapping in a checkpoint that has more of the names `wanted` than the whole checkpoint, or None.

    Args:
        source: Checkpoint to search.
        wanted: Expected names.
    """
    if not source.mappings:
        return None
    names = list(source.keys())

    def hits(part: str) -> int:
        return sum(name.startswith(f"{part}.") and name[len(part) + 1 :] in wanted for name in names)

    best = max(source.mappings, key=hits)
    return target_of(source, best) if hits(best) > sum(name in wanted for name in names) else None


def part_for_rename(source: Source, new_of: Mapping[str, str]) -> str | None:
    """Deepest mapping in a checkpoint that holds all names of a rename and none of the new ones, or None.

    Args:
        source: Checkpoint to search.
        new_of: Names in the checkpoint → new names.
    """
    fitting = [
        part
        for part in source.mappings
        if all(old.startswith(f"{part}.") and not new.startswith(f"{part}.") for old, new in new_of.items())
    ]
    return max(fitting, key=len, default=None) if new_of else None


def as_json(value: Any) -> Any:
    """Metadata value as JSON data; non-finite numbers become the texts `nan`, `inf` and `-inf`.

    >>> as_json({"epoch": 3, "best": [float("inf"), None]})
    {'epoch': 3, 'best': ['inf', None]}
    """
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def items_of(value: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a mapping or list; empty for any other value."""
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    return list(value.items()) if hasattr(value, "items") else []


def text_of(value: Any) -> str:
    """Value as one line of text."""
    return printable(value if isinstance(value, str) else repr(value))
