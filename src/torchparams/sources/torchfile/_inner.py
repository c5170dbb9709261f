"""The part of a pickle that `#inner` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.errors import UnknownName, nearest, shorten
from torchparams.render.tree import plural
from torchparams.sources.torchfile._describe import describe
from torchparams.sources.torchfile._holders import LEAVES, parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchparams.sources.torchfile._holders import Child, TensorOf


def resolve(root: Any, inner: str, children: Callable[[Any], Iterator[Child]], tensor: TensorOf, label: str) -> Any:
    """Resolve the dotted path `inner`; keys may contain dots, and the longest match is tried first."""
    best = (0, root)
    seen = set()
    stack = [(0, root)]
    while stack:
        start, node = stack.pop()
        if start > len(inner):
            return node
        if start >= best[0]:
            best = (start, node)
        if (start, id(node)) in seen:
            continue
        seen.add((start, id(node)))
        fitting = []
        for component, child, _, _ in children(node):
            if inner.startswith(component, start) and inner[start + len(component) :][:1] in ("", "."):
                fitting.append((start + len(component) + 1, child))
        stack.extend(sorted(fitting, key=lambda hit: hit[0]))
    start, node = best
    held = [(component, child) for component, child, _, _ in children(node)]
    place = f"{inner[: start - 1]!r}" if start else "the file"
    near = nearest(inner[start:], [component for component, _ in held[:2000]])
    shown = ", ".join(f"{shorten(component, 40)} ({_contents(child, tensor)})" for component, child in held[:8])
    more = f" and {len(held) - 8:,} more" if len(held) > 8 else ""
    hint = f"did you mean '#{inner[:start]}{near[0]}'?" if near else None
    below = sum(component.startswith(f"{inner[start:]}.") for component, _ in held)
    if below:  # a state_dict is flat: its names contain dots
        leave = f"use '#{inner[: start - 1]}'" if start else f"leave #{inner} out"
        shown, more = f"{plural(below, 'name')} with this prefix, but no nested mapping", ""
        hint = f"{leave}, and select by name: {inner[start:]}.**"
    raise UnknownName(
        f"there is no {inner[start:]!r} in {place}",
        where=label,
        exists=f"there {'is' if below == 1 else 'are'} {shown}{more}" if held else f"{place} is {describe(node)}",
        hint=hint,
    )


def _contents(node: Any, tensor: TensorOf) -> str:
    """A short description of the contents of `node`."""
    if type(node) in LEAVES or tensor(node) is not None:
        return describe(node)
    seen, stack, count = {id(node)}, [node], 0
    while stack:
        for child in parts(stack.pop()):
            if type(child) in LEAVES or id(child) in seen:
                continue
            seen.add(id(child))
            if tensor(child) is not None:
                count += 1
            else:
                stack.append(child)
    return f"{count:,} tensors" if count else describe(node)
