"""Tensors that the ranks of a process group keep in parts.

A `Sharded` row has the shape of the whole, and an expression for the part that this rank keeps. Engines either fold the
parts where they lie, or connect the row to a `Remote` that fetches elements from the ranks that keep them.
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

    from torchparams.expressions.base import Stored
    from torchparams.expressions.work import Work
    from torchparams.info import Location

    Array = np.ndarray[Any, Any]


class Box(NamedTuple):
    """A part of a grid of elements.

    Attributes:
        offsets: Where it begins, in each dimension.
        sizes: Its shape.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Count of elements."""
        return prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rank keeps which part of a tensor.

    Attributes:
        grid: The shape in which parts are boxes: that of the tensor, or its count of elements for parts of flat memory.
        ranks: Global ranks, ascending.
        boxes: Rank → its part. Ranks with equal boxes keep replicas.

    >>> layout = Layout((4, 2), (0, 1), {0: Box((0, 0), (2, 2)), 1: Box((2, 0), (2, 2))})
    >>> layout.is_complete, layout.owners()
    (True, (0, 1))
    """

    grid: tuple[int, ...]
    ranks: tuple[int, ...]
    boxes: Mapping[int, Box]

    def owners(self, turn: int = 0) -> tuple[int, ...]:
        """One rank for each distinct part with elements, ascending; `turn` says which of the replicas."""
        replicas: dict[Box, list[int]] = {}
        for rank in self.ranks:
            if self.boxes[rank].numel:
                replicas.setdefault(self.boxes[rank], []).append(rank)
        return tuple(sorted(ranks[turn % len(ranks)] for ranks in replicas.values()))

    @property
    def is_complete(self) -> bool:
        """Whether the distinct parts are all elements of the tensor, each once."""
        boxes = {box for box in self.boxes.values() if box.numel}
        inside = all(
            offset + size <= whole
            for box in boxes
            for offset, size, whole in zip(box.offsets, box.sizes, self.grid, strict=True)
        )
        return inside and sum(box.numel for box in boxes) == prod(self.grid) and not _overlap(list(boxes))


def _overlap(boxes: list[Box]) -> bool:
    """Whether two boxes share an element."""
    boxes.sort()
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            if a.offsets and b.offsets[0] >= a.offsets[0] + a.sizes[0]:
                break  # neither do those that begin later
            if all(x < y + m and y < x + n for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)):
                return True
    return False


class Remote(Protocol):
    """Gives elements of a sharded tensor, wherever they lie."""

    def read(self, x: Sharded, start: int, stop: int) -> Array:
        """Elements `[start, stop)` of the whole, in C order."""


class Sharded(Expression):
    """A tensor that the ranks of a process group keep in parts.

    Args:
        name: Its name.
        shape: Shape of the whole.
        local: The part of this rank.
        layout: Which rank keeps which part.
        label: The source, for messages.
        tensor: Gives this rank's part as a torch tensor.
        reduce: Gives the whole as a torch tensor, by a collective that all ranks enter; None unless the ranks keep
            summands (`Partial`), of which no part is a value.

    Attributes:
        remote: What fetches elements for `compute`; None outside of an engine that reads shards.
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
        """The part of this rank."""
        return self.operands[0]

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Elements of the whole, fetched from the ranks that keep them.

        Raises:
            NotReadable: The engine does not read shards.
        """
        if self.remote is None:
            raise NotReadable(
                f"{self.name!r} is sharded over {len(self.layout.ranks)} ranks, and this rank has a part of it",
                where=self.label,
                hint="torchparams.engines.DistributedEngine reads it; all of these ranks make the call",
            )
        return self.remote.read(self, start, stop)

    def walk(self) -> Iterator[Expression]:
        """Itself: its part is another tensor, and not read on the way to it."""
        yield self

    def leaves(self) -> Iterator[Stored]:
        """Those of the part."""
        return self.operands[0].leaves()

    @property
    def footprint(self) -> int:
        """One element, which is received and copied."""
        return 2 * max(self.dtype.itemsize, 2)

    def summary(self) -> str:
        """Its name."""
        return self.name

    def to_json(self) -> dict[str, Any]:
        """Its name and its source."""
        return {"operation": "sharded", "source": self.label, "name": self.name, "ranks": list(self.layout.ranks)}


class Run(Expression):
    """Elements `[start, stop)` of another in C order, as one dimension.

    Args:
        x: The other.
        start, stop: Where the part begins, and where it ends.
    """

    def __init__(self, x: Expression, start: int, stop: int) -> None:
        super().__init__((stop - start,), x.dtype, (x,))
        self.start = start

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """The other's elements."""
        return self.operands[0].compute(start + self.start, stop + self.start, work, into)

    def spans(self) -> list[Location] | None:
        """The bytes of the part, where the other is one run of bytes."""
        from torchparams.info import Location

        place, bits = self.operands[0].place, self.dtype.bits
        if not self.numel:
            return []
        if place is None or self.start * bits % 8 or self.numel * bits % 8:
            return None
        begin = place.start + self.start * bits // 8
        return [Location(place.file, begin, begin + self.nbytes)]

    def summary(self) -> str:
        """The other's, and the range."""
        return f"{self.operands[0].summary()}.flat[{self.start}:{self.start + self.numel}]"


def part_of(x: Expression, grid: Sequence[int], box: Box) -> Expression:
    """The part of an expression that a box of a layout's grid says.

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
    """The sharded tensors that an expression is made of; one that is used twice comes twice."""
    return [part for part in x.walk() if isinstance(part, Sharded)]
