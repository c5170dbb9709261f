"""Whether boxes tile a tensor, compared with an array that counts the boxes at each element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchparams.expressions import tiling
from torchparams.expressions.tiling import Box, fault


@st.composite
def boxes_within(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes in it, which now and then tile it."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):  # cut one in two
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.sizes[dim]))
        for start, size in ((0, at), (at, box.sizes[dim] - at)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim] += start
            sizes[dim] = size
            boxes.append(Box(tuple(offsets), tuple(sizes)))
    change = draw(st.sampled_from(["none", "none", "drop", "repeat", "move"]))
    chosen = draw(st.integers(0, len(boxes) - 1))
    if change == "drop":
        boxes.pop(chosen)
    elif change == "repeat":
        boxes.append(boxes[chosen])
    elif change == "move":
        box = boxes[chosen]
        boxes[chosen] = Box(
            tuple(draw(st.integers(0, most - size)) for most, size in zip(shape, box.sizes, strict=True)), box.sizes
        )
    return shape, draw(st.permutations(boxes))


@given(boxes_within())
def test_a_fault_is_found_exactly_where_there_is_one(drawn: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = drawn
    counts = np.zeros(shape, int)
    for box in boxes:
        counts[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))] += 1
    found = fault(shape, boxes)
    assert (found is None) == bool((counts == 1).all())
    if found is not None:
        text = found[found.index("[") + 1 : found.index("]")]
        named = counts[tuple(slice(*map(int, side.split(":"))) for side in text.split(", "))]
        assert (named == 0).all() if found.startswith("lacks") else (named > 1).all()


@pytest.mark.parametrize(
    ("shape", "boxes", "said"),
    [
        ((), [Box((), ())], None),
        ((), [], "lacks the elements []"),
        ((), [Box((), ())] * 2, "has two parts with the elements []"),
        ((4,), [Box((0,), (5,))], "has the shape [4], but a part [0:5] outside of it"),
        ((4,), [Box((-1,), (1,)), Box((0,), (4,))], "has the shape [4], but a part [-1:0] outside of it"),
        ((4,), [Box((0, 0), (4, 1))], "has 1 dimensions, but a part has 2 offsets and 2 sizes"),
        ((4,), [], "lacks the elements [0:4]"),
        ((0, 3), [], None),
    ],
)
def test_what_is_said(shape: tuple[int, ...], boxes: list[Box], said: str | None) -> None:
    assert fault(shape, boxes) == said


def test_boxes_in_no_order_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are counted: boxes that cross each other's slabs would take the square of their number."""
    monkeypatch.setattr(tiling, "STEPS", 1000)
    count = 200
    columns = [(Box((0, at), (at + 1, 1)), Box((at + 1, at), (count - at - 1, 1))) for at in range(count)]
    boxes = [box for pair in columns for box in pair]
    assert fault((count, count), boxes) == "has 399 unordered parts, which are too many to check"


def test_a_grid_takes_steps_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "STEPS", 5000)
    assert fault((50, 50), [Box((row, column), (1, 1)) for row in range(50) for column in range(50)]) is None
