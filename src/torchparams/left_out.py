"""State of a source that its table does not list, such as packed weights.

A layer may write its own state to the state dict (`_save_to_state_dict`, `get_extra_state`, a hook): packed weights,
scales, counters. None of it is a parameter or buffer. Sources report it, and every result passes it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchparams.errors import SelectorError
from torchparams.names import common
from torchparams.render.tree import Text, listed, plural, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchparams.selectors import Selector

KINDS_SHOWN = 8
"""Maximum number of lines, one per class and reason."""


STATE_DICT_HINT = "pass model.state_dict(), which holds that state as the modules write it"
"""Hint for a live model with state outside its table."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """State of a source that its table does not list.

    Attributes:
        name: Module or entry that holds it; empty for the outermost module.
        kind: Class of the module or entry.
        reason: Why the table does not list it.
        live: Whether it belongs to a live model, whose state dict contains it.

    >>> LeftOut("fc", "lib.Packed", "writes state of its own").to_json()
    {'name': 'fc', 'kind': 'lib.Packed', 'reason': 'writes state of its own'}
    """

    name: str
    kind: str
    reason: str
    live: bool = False

    def to_json(self) -> dict[str, str]:
        """The description as JSON data."""
        return {"name": self.name, "kind": self.kind, "reason": self.reason}


def state_of_layer(name: str, kind: str) -> str | None:
    """Reason why a non-tensor entry of a state dict is state of a layer; None for other metadata.

    Args:
        name: Name of the entry.
        kind: Class of the entry.

    >>> state_of_layer("fc._extra_state", "dict"), state_of_layer("epoch", "int")
    ('is the extra state of a layer, not a tensor', None)
    """
    if kind.rpartition(".")[2] == "ScriptObject":
        return "is an object of compiled code, such as packed weights, not a tensor"
    if name.rpartition(".")[2] == "_extra_state":
        return "is the extra state of a layer, not a tensor"
    return None


def concerned(found: Iterable[LeftOut], selector: Selector, names: Iterable[str]) -> tuple[LeftOut, ...]:
    """Left-out state that a selection concerns.

    State of a module belongs to a selection that has a tensor of the module, or whose selector matches below the
    module.

    Args:
        found: All left-out state of a source.
        selector: Selector of the selection.
        names: Names that it matches.

    >>> import torchparams as tp
    >>> found = [LeftOut("fc", "lib.Packed", "writes state of its own")]
    >>> [len(concerned(found, tp.Selector(text), ["head.weight"])) for text in ("**", "head.*")]
    [1, 0]
    """
    from torchparams.dtypes import DType
    from torchparams.info import ParameterInfo

    owners = {name.rpartition(".")[0] for name in names}
    # The state has no name of its own; test the selector with a name that PyTorch uses.
    byte = DType.of("uint8")
    entries = {each: f"{each.name}._extra_state".removeprefix(".") for each in found}
    infos = (
        ParameterInfo(name, (0,), byte, 0, 0, "cpu", "buffer", False, each.kind, name, bases=(each.kind,))
        for each, name in entries.items()
    )
    try:
        hits = None if selector.relative else selector.names(infos)
    except SelectorError:  # modules and parameters need the live model
        hits = None
    if hits is None:  # compare with the common module of the names
        inside = common(owners)
        below = f"{inside}." if inside else ""
        hits = frozenset(name for name in entries.values() if name.startswith(below))
    return tuple(each for each, name in entries.items() if each.name in owners or name in hits)


def left_out_lines(found: Sequence[LeftOut]) -> list[Text]:
    """Lines for state outside the table; empty if there is none.

    >>> [line.text for line in left_out_lines([LeftOut("fc", "lib.Packed", "writes state of its own", live=True)])]
    ['not in the table: the state of 1 module', '  fc (lib.Packed): writes state of its own']
    """
    if not found:
        return []
    alike: dict[tuple[str, str], list[str]] = {}
    for each in found:
        alike.setdefault((each.kind, each.reason), []).append(each.name or "the outermost module")
    what = ("module", None) if all(each.live for each in found) else ("entry", "entries")
    lines = [Text(f"not in the table: the state of {plural(len(found), *what)}", "warn")]
    for (kind, reason), names in list(alike.items())[:KINDS_SHOWN]:
        lines.append(Text(printable(f"  {listed(names)} ({kind}): {reason}"), "warn"))
    if len(alike) > KINDS_SHOWN:
        lines.append(Text(f"  … {plural(len(alike) - KINDS_SHOWN, 'more kind')} …", "dim"))
    return lines


def in_words(found: Sequence[LeftOut]) -> str:
    """One sentence on state outside the table, for an error.

    >>> in_words([LeftOut("fc", "lib.Packed", "writes state of its own", live=True)])
    'fc (lib.Packed) writes state of its own'
    """
    first = found[0]
    more = f", as {'does' if len(found) == 2 else 'do'} {len(found) - 1:,} more" if len(found) > 1 else ""
    return f"{first.name or 'the outermost module'} ({first.kind}) {first.reason}{more}"
