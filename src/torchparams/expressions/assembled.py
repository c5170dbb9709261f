"""A tensor stored in rectangular parts: shards of ranks, or chunks of a distributed checkpoint."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.expressions.base import Expression

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Work
    from torchparams.info import Location

    Array = np.ndarray[Any, Any]


class Chunk(NamedTuple):
    """A part of a tensor.

    Attributes:
        offsets: Offset in the tensor, in each dimension.
        x: Elements of the chunk, in its own shape.
    """

    offsets: tuple[int, ...]
    x: Expression


class Assembled(Expression):
    """A tensor made of chunks that tile it; `torchparams.expressions.tiling` checks this.

    A block consists of a few boxes, and a chunk contributes one run of its elements to a box. So each chunk is read
    once per box, directly into the result if its elements are contiguous there. Memory does not depend on the number of
    chunks.

    Args:
        shape: Shape of the tensor.
        dtype: dtype of the tensor and of all chunks.
        chunks: At least one, unless the tensor is empty; empty chunks are ignored.

    >>> import numpy as np
    >>> from torchparams.dtypes import DType
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> source = MemorySource({"left": np.array([[1], [3]]), "right": np.array([[2], [4]])})
    >>> chunks = [Chunk((0, 1), source.row("right")), Chunk((0, 0), source.row("left"))]
    >>> evaluate(Assembled((2, 2), DType.of("I64"), chunks))
    array([[1, 2],
           [3, 4]])
    """

    def __init__(self, shape: Sequence[int], dtype: DType, chunks: Sequence[Chunk]) -> None:
        kept = sorted((chunk for chunk in chunks if chunk.x.numel), key=lambda chunk: chunk.offsets)
        super().__init__(shape, dtype, tuple(chunk.x for chunk in kept))
        self._offsets = [chunk.offsets for chunk in kept]
        # Chunks are found along the first dimension that is split; dimensions before it are whole in every chunk.
        self._along = next(
            (dim for dim, size in enumerate(self.shape) if any(chunk.x.shape[dim] != size for chunk in kept)), 0
        )
        self._starts = [offsets[self._along] if shape else 0 for offsets in self._offsets]
        self._longest = max((chunk.x.shape[self._along] for chunk in kept if shape), default=1)
        self._inner = [prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute box by box, and chunk by chunk within a box."""
        if len(self.operands) == 1:
            return self.operands[0].compute(start, stop, work, into)
        out = work.scratch(self, 0, stop - start, self.dtype.numpy) if into is None else into
        for lead, first, last, at in self._boxes(start, stop):
            self._fill(lead, first, last, out[at - start : at - start + (last - first) * self._inner[len(lead)]], work)
        return out

    def _boxes(self, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
        """Split elements `[start, stop)` into boxes: leading indexes, a range of the next index, and the first element.

        All dimensions after the range are whole.
        """
        while start < stop:
            lead: tuple[int, ...] = ()
            base = 0
            for size, inner in zip(self.shape, self._inner, strict=True):
                index = (start - base) // inner
                last = min((stop - base) // inner, size)
                if (start - base) % inner == 0 and last > index:
                    yield lead, index, last, start
                    start = base + last * inner
                    break
                lead += (index,)
                base += index * inner

    def _fill(self, lead: tuple[int, ...], first: int, last: int, out: Array, work: Work) -> None:
        """Write the elements of a box to `out`."""
        dim = len(lead)
        box = out.reshape(last - first, *self.shape[dim + 1 :])
        along = self._along
        low, high = (
            (lead[along], lead[along] + 1) if along < dim else (first, last) if along == dim else (0, self.shape[along])
        )
        begin = bisect_left(self._starts, low - self._longest + 1)
        for number in range(begin, bisect_left(self._starts, high)):
            x, offsets = self.operands[number], self._offsets[number]
            # Start of the run that the box takes from the chunk, as an index of the chunk.
            at, inside = 0, True
            for index, offset, size in zip(lead, offsets, x.shape, strict=False):
                inside = inside and offset <= index < offset + size
                at = at * size + index - offset
            begins, ends = max(first, offsets[dim]), min(last, offsets[dim] + x.shape[dim])
            if not inside or begins >= ends:
                continue
            inner = prod(x.shape[dim + 1 :])
            at = (at * x.shape[dim] + begins - offsets[dim]) * inner
            count = (ends - begins) * inner
            if inner == self._inner[dim]:
                run = out[(begins - first) * inner :][:count]
                work.compute_into(x, at, at + count, run)
                continue
            table = work.scratch(self, 1, count, self.dtype.numpy)
            work.compute_into(x, at, at + count, table)
            sides = zip(offsets[dim + 1 :], x.shape[dim + 1 :], strict=True)
            part = (slice(begins - first, ends - first), *(slice(offset, offset + size) for offset, size in sides))
            values = table.reshape(ends - begins, *x.shape[dim + 1 :])
            if self.dtype.itemsize in (1, 2, 4, 8):  # integers are copied faster than ml_dtypes types
                kind = f"u{self.dtype.itemsize}"
                box.view(kind)[part] = values.view(kind)
            else:
                box[part] = values

    def spans(self) -> list[Location] | None:
        """Byte ranges of the chunks, if each is one run of elements of the tensor."""
        if not self.numel:
            return []
        found: list[Location] = []
        runs = [self._run(number) for number in range(len(self.operands))]
        if None in runs or any(here > there for here, there in pairwise(run for run in runs if run is not None)):
            return None
        for x in self.operands:
            spans = x.spans()
            if spans is None or x.numel * x.dtype.bits % 8:
                return None
            found += spans
        return found

    def _run(self, number: int) -> int | None:
        """First element of a chunk that is one run of elements; otherwise None."""
        shape, offsets = self.operands[number].shape, self._offsets[number]
        cut = next((dim for dim, size in enumerate(shape) if size > 1), len(shape))
        if shape[cut + 1 :] != self.shape[cut + 1 :]:
            return None
        return sum(offset * inner for offset, inner in zip(offsets, self._inner, strict=True))

    @property
    def footprint(self) -> int:
        """Chunks are computed one after the other, so the largest counts."""
        return max((x.footprint for x in self.operands), default=0) + 2 * max(self.dtype.itemsize, 4)

    def summary(self) -> str:
        """Summary of the first chunk, and the number of others."""
        if not self.operands:
            return "nothing"
        more = len(self.operands) - 1
        return f"{self.operands[0].summary()} and {more:,} more" if more else self.operands[0].summary()

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the offsets."""
        return {**super().to_json(), "offsets": [list(offsets) for offsets in self._offsets]}
