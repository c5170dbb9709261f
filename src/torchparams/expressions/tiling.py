"""Check that boxes tile a tensor: every element is in exactly one box."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = 2_000_000
"""Maximum number of comparisons per tensor, beyond one per box; unordered boxes may need the square of their number."""


class Box(NamedTuple):
    """A rectangular part of a tensor.

    Attributes:
        offsets: Offset in each dimension.
        sizes: Shape of the part.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return "[" + ", ".join(f"{at}:{at + size}" for at, size in zip(*self, strict=True)) + "]"


def fault(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that should tile a tensor, as text that follows its name; None if they tile it.

    Args:
        shape: Shape of the tensor.
        boxes: Boxes with the same number of dimensions.

    >>> fault((4, 6), [Box((0, 0), (4, 3)), Box((0, 3), (4, 3))])
    >>> fault((4, 6), [Box((0, 0), (4, 3))])
    'lacks the elements [0:4, 3:6]'
    >>> fault((4,), [Box((0,), (3,)), Box((2,), (2,))])
    'has two parts with the elements [2:3]'
    """
    shape = tuple(shape)
    if len(boxes) == 1 and boxes[0].sizes == shape and not any(boxes[0].offsets):
        return None
    if _follow_each_other(shape, boxes):
        return None
    whole = prod(shape)
    total = 0
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
            return f"has {len(shape)} dimensions, but a part has {len(box.offsets)} offsets and {len(box.sizes)} sizes"
        for at, size, most in zip(box.offsets, box.sizes, shape, strict=True):
            if at < 0 or size < 0 or at + size > most:
                return f"has the shape {list(shape)}, but a part {box} outside of it"
        total += prod(box.sizes)
    # Boxes inside the tensor that do not overlap tile it exactly if they have as many elements. The sum alone proves
    # nothing: a gap may be as large as an overlap.
    filled = [box for box in boxes if 0 not in box.sizes]
    if not whole:
        return None
    try:
        found = _Search(STEPS + len(filled)).fault(shape, filled, ())
    except _TooLong:
        return f"has {len(filled):,} unordered parts, which are too many to check"
    if found is None and total != whole:
        raise AssertionError(f"{total} elements in boxes that tile {whole}")
    return found


def _follow_each_other(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether the boxes are consecutive rows of the tensor, by far the most frequent case."""
    if not shape:
        return False
    rest, start = shape[1:], (0,) * (len(shape) - 1)
    at = 0
    for offsets, sizes in boxes:
        if not offsets or not sizes or offsets[0] != at or sizes[0] < 0 or sizes[1:] != rest or offsets[1:] != start:
            return False
        at += sizes[0]
    return at == shape[0]


class _TooLong(Exception):
    """The boxes need too many comparisons."""


class _Search:
    def __init__(self, steps: int) -> None:
        self._steps = steps

    def fault(self, shape: tuple[int, ...], boxes: Sequence[Box], lead: tuple[tuple[int, int], ...]) -> str | None:
        """What is wrong in a slab: ranges of the leading dimensions in which the set of boxes is constant.

        Along the next dimension, boxes begin and end at a few places; between two of these, the set is constant again.
        """
        dim = len(lead)
        if dim == len(shape):
            if len(boxes) == 1:
                return None
            return f"{'has two parts with' if boxes else 'lacks'} the elements {_range(lead, shape)}"
        ordered = sorted(boxes, key=lambda box: box.offsets[dim])
        at, number = 0, 0
        open_: list[Box] = []
        while at < shape[dim]:
            open_ = [box for box in open_ if box.offsets[dim] + box.sizes[dim] > at]
            while number < len(ordered) and ordered[number].offsets[dim] <= at:
                open_.append(ordered[number])
                number += 1
            ends = ordered[number].offsets[dim] if number < len(ordered) else shape[dim]
            self._steps -= len(open_)
            if self._steps < 0:
                raise _TooLong
            if not open_:
                return f"lacks the elements {_range((*lead, (at, ends)), shape)}"
            until = min(min(box.offsets[dim] + box.sizes[dim] for box in open_), ends)
            # One box that is whole in all further dimensions: by far the most frequent case.
            only = open_[0]
            if len(open_) > 1 or only.sizes[dim + 1 :] != shape[dim + 1 :]:
                found = self.fault(shape, open_, (*lead, (at, until)))
                if found is not None:
                    return found
            at = until
        return None


def _range(lead: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> str:
    """A slab in Python slice notation."""
    sides = (*lead, *((0, size) for size in shape[len(lead) :]))
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in sides) + "]"
