"""Tensors that are sharded over the ranks of a process group.

A `Sharded` row has the shape of the whole tensor, and an expression for the part on this rank. An engine either reduces
the parts on their ranks, or connects the row to a `Remote` that fetches elements from other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torchparams.errors import NotReadable
from torchparams.expressions.base import Expression
from torchparams.expressions.operations import Slice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np

    from torchparams.expressions.base import Stored, Work
    from torchparams.info import Location

    Array = np.ndarray[Any, Any]


class Box(NamedTuple):
    """A rectangular part of a tensor.

    Attributes:
        offsets: Offset in each dimension.
        sizes: Shape of the part.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which part of a tensor each rank keeps.

    Attributes:
        grid: Shape that the boxes refer to: the shape of the tensor, or its number of elements for flat memory.
        ranks: Global ranks, ascending.
        boxes: Part of each rank. Ranks with equal boxes keep replicas.

    >>> layout = Layout((4, 2), (0, 1), {0: Box((0, 0), (2, 2)), 1: Box((2, 0), (2, 2))})
    >>> layout.is_complete, layout.owners()
    (True, (0, 1))
    """

    grid: tuple[int, ...]
    ranks: tuple[int, ...]
    boxes: Mapping[int, Box]

    def owners(self, turn: int = 0) -> tuple[int, ...]:
        """One rank for each distinct, non-empty part, ascending; `turn` chooses among replicas."""
        replicas: dict[Box, list[int]] = {}
        for rank in self.ranks:
            if self.boxes[rank].numel:
                replicas.setdefault(self.boxes[rank], []).append(rank)
        return tuple(sorted(ranks[turn % len(ranks)] for ranks in replicas.values()))

    @property
    def is_complete(self) -> bool:
        """Whether the distinct parts cover every element of the tensor exactly once."""
        boxes = {box for box in self.boxes.values() if box.numel}
        inside = all(
            offset + size <= whole
            for box in boxes
            for offset, size, whole in zip(box.offsets, box.sizes, self.grid, strict=True)
        )
        return inside and sum(box.numel for box in boxes) == prod(self.grid) and not _overlap(list(boxes))


def _overlap(boxes: list[Box]) -> bool:
    """Whether two boxes overlap."""
    boxes.sort()
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            if a.offsets and b.offsets[0] >= a.offsets[0] + a.sizes[0]:
                break  # boxes that begin later do not overlap either
            if all(x < y + m and y < x + n for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)):
                return True
    return False


class Remote(Protocol):
    """Interface that fetches elements of a sharded tensor from any rank."""

    def read(self, x: Sharded, start: int, stop: int) -> Array:
        """Elements `[start, stop)` of the whole tensor, in C order."""


class Sharded(Expression):
    """A tensor that is sharded over the ranks of a process group.

    Args:
        name: Name of the tensor.
        shape: Shape of the whole tensor.
        local: Part on this rank.
        layout: Which part each rank keeps.
        label: Label of the source, for messages.
        tensor: Callable that returns the part on this rank as a torch tensor.
        reduce: Callable that returns the whole tensor with a collective that all ranks enter; used only if the parts
            are summands (`Partial`).

    Attributes:
        remote: Fetches elements for `compute`; None unless an engine that reads shards has set it.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        local: Expression,
        layout: Layout,
        label: str,
        tensor: Callable[[], Any],
        reduce: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(shape, local.dtype, (local,))
        self.name, self.layout, self.label = name, layout, label
        self.tensor, self.reduce = tensor, reduce
        self.remote: Remote | None = None

    @property
    def local(self) -> Expression:
        """The part on this rank."""
        return self.operands[0]

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Elements of the whole tensor, fetched from the ranks that keep them.

        Raises:
            NotReadable: The engine does not read shards.
        """
        if self.remote is None:
            raise NotReadable(
                f"{self.name!r} is sharded over {len(self.layout.ranks)} ranks, and this rank only has a part of it",
                where=self.label,
                hint="use torchparams.engines.DistributedEngine, and make the call on all of these ranks",
            )
        return self.remote.read(self, start, stop)

    def walk(self) -> Iterator[Expression]:
        """Yield only this expression; its part is a different tensor."""
        yield self

    def leaves(self) -> Iterator[Stored]:
        """Leaves of the part."""
        return self.operands[0].leaves()

    @property
    def footprint(self) -> int:
        """Bytes of one element, received and copied."""
        return 2 * max(self.dtype.itemsize, 2)

    def summary(self) -> str:
        """Name of the tensor."""
        return self.name

    def to_json(self) -> dict[str, Any]:
        """Name, source and ranks as JSON data."""
        return {"operation": "sharded", "source": self.label, "name": self.name, "ranks": list(self.layout.ranks)}


class Run(Expression):
    """Elements `[start, stop)` of an expression in C order, as one dimension.

    Args:
        x: The expression.
        start, stop: Range of elements.
    """

    def __init__(self, x: Expression, start: int, stop: int) -> None:
        super().__init__((stop - start,), x.dtype, (x,))
        self.start = start

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute the elements of the expression."""
        return self.operands[0].compute(start + self.start, stop + self.start, work, into)

    def spans(self) -> list[Location] | None:
        """Byte range of the elements, if the expression is one byte range."""
        from torchparams.info import Location

        place, bits = self.operands[0].place, self.dtype.bits
        if not self.numel:
            return []
        if place is None or self.start * bits % 8 or self.numel * bits % 8:
            return None
        begin = place.start + self.start * bits // 8
        return [Location(place.file, begin, begin + self.nbytes)]

    def summary(self) -> str:
        """Summary of the expression, with the range."""
        return f"{self.operands[0].summary()}.flat[{self.start}:{self.start + self.numel}]"


def part_of(x: Expression, grid: Sequence[int], box: Box) -> Expression:
    """The part of an expression that a box of a layout describes.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> w = Stored(MemorySource({"w": np.arange(6).reshape(2, 3)}), "w")
    >>> evaluate(part_of(w, (2, 3), Box((0, 1), (2, 2)))).tolist(), evaluate(part_of(w, (6,), Box((2,), (3,)))).tolist()
    ([[1, 2], [4, 5]], [2, 3, 4])
    """
    if tuple(grid) != x.shape:
        return Run(x, box.offsets[0], box.offsets[0] + box.sizes[0])
    for dim, (offset, size) in enumerate(zip(*box, strict=True)):
        if size != x.shape[dim]:
            x = Slice(x, dim, offset, offset + size)
    return x


def shards_in(x: Expression) -> list[Sharded]:
    """Sharded tensors in an expression; a tensor that is used twice is listed twice."""
    return [part for part in x.walk() if isinstance(part, Sharded)]
