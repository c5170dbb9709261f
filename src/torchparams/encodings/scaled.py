"""Codes of at most 8 bits that a table gives values for, with a scale for each block of a matrix."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.expressions.base import Expression
from torchparams.expressions.casts import widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from torchparams.expressions.work import Work

    Array = np.ndarray[Any, Any]

F32 = DType.of("float32")


class BlockScaled(Expression):
    """Values of codes: that of the table, less a zero point, times the scale of the block.

    Args:
        codes: Elements of one byte.
        scales: One for each block, row by row of blocks; of several matrices, one after the other.
        matrix: Rows and columns of a matrix of codes.
        block: Rows and columns of a block; those at the end may be smaller.
        table: The values of the codes, at most 256, where the codes' own type does not say it.
        shape: The shape; that of the codes unless given.
        dtype: The type that values are rounded to.
        offset: Added to every scale.

    >>> import numpy as np
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> source = MemorySource({"w": np.array([[1, -2, 3]], np.int8), "s": np.array([[10.0, 0.5]], np.float32)})
    >>> evaluate(BlockScaled(source.row("w"), source.row("s"), (1, 3), (1, 2)))
    array([[ 10. , -20. ,   1.5]], dtype=float32)
    """

    def __init__(
        self,
        codes: Expression,
        scales: Expression,
        matrix: tuple[int, int],
        block: tuple[int, int],
        *,
        table: tuple[float, ...] | None = None,
        shape: Sequence[int] | None = None,
        dtype: DType = F32,
        offset: float = 0.0,
    ) -> None:
        super().__init__(codes.shape if shape is None else shape, dtype, (codes, scales))
        self.matrix, self.block, self.table, self.offset = matrix, block, table, offset
        rows, columns = matrix
        self.lines, self.across = -(-rows // block[0]), -(-columns // block[1])  # rows and columns of blocks
        matrices = codes.numel // max(rows * columns, 1)
        assert self.numel == codes.numel == matrices * rows * columns
        assert scales.numel == matrices * self.lines * self.across
        self.granule = columns if columns <= 1 << 16 else 1

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """The codes' values, scaled."""
        import numpy as np

        direct = self.dtype == F32
        out = into if direct and into is not None else work.scratch(self, 0, stop - start, F32.numpy)
        codes, scales = self.operands
        found = codes.compute(start, stop, work).view(np.uint8)
        rows, columns = self.matrix
        size = rows * columns
        at = start
        while at < stop:  # one matrix after the other: the blocks of the next begin anew
            number, begin = divmod(at, size)
            count = min(size - begin, stop - at)
            first = begin // columns // self.block[0]
            last = (begin + count - 1) // columns // self.block[0] + 1
            line = number * self.lines
            factors = self._factors(scales, (line + first) * self.across, (line + last) * self.across, work)
            self._scale(
                found[at - start : at - start + count],
                factors.reshape(last - first, self.across),
                begin - first * self.block[0] * columns,
                out[at - start : at - start + count],
            )
            at += count
        return out if direct else _rounded(out, self.dtype, work.scratch(self, 1, stop - start, self.dtype.numpy))

    def _factors(self, scales: Expression, start: int, stop: int, work: Work) -> Array:
        import numpy as np

        factors = widen(scales.compute(start, stop, work), scales.dtype)
        return factors + np.float32(self.offset) if self.offset else factors

    def _scale(self, codes: Array, factors: Array, start: int, out: Array) -> None:
        from torchparams.sketch.decode import scaled

        table = values_of(self.operands[0].dtype) if self.table is None else _padded(self.table)
        scaled(codes, table, factors, None, None, self.matrix[1], self.block, start, out)

    @property
    def footprint(self) -> int:
        """The codes, and float32 before and after rounding."""
        per_scale = self.operands[1].footprint + 8
        scales = -(-per_scale // min(self.block[0] * self.block[1], per_scale))
        return self.operands[0].footprint + scales + 4 + self.dtype.itemsize

    def summary(self) -> str:
        """The codes, decoded."""
        return f"{self.operands[0].summary()} decoded"

    def to_json(self) -> dict[str, Any]:
        """With the block."""
        return {**super().to_json(), "block": list(self.block)}


def _rounded(values: Array, dtype: DType, out: Array) -> Array:
    import numpy as np

    with np.errstate(all="ignore"):
        np.copyto(out, values, casting="unsafe")
    return out


@lru_cache
def _padded(values: tuple[float, ...]) -> Array:
    """A table of 256 values, of which the others are NaN."""
    import numpy as np

    table = np.full(256, np.nan, np.float32)
    table[: len(values)] = values
    return table


@lru_cache
def values_of(dtype: DType) -> Array:
    """The value of each byte as an element of a type.

    >>> values_of(DType.of("float8_e4m3fn"))[[1, 0x7E]].tolist()
    [0.001953125, 448.0]
    """
    import numpy as np

    with np.errstate(all="ignore"):
        return np.arange(256, dtype=np.uint8).view(dtype.numpy).astype(np.float32)
