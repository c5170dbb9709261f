"""Expression that decodes codes by a table, with one scale per block of a matrix."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.errors import NotReadable
from torchparams.expressions.base import Expression
from torchparams.expressions.casts import widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from torchparams.expressions.base import Work

    Array = np.ndarray[Any, Any]

F32 = DType.of("float32")

Table = tuple[float, ...]

FP4: Table = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of float4_e2m1fn by code."""


_E2M3 = (*(m / 8 for m in range(8)), *((1 + m / 8) * 2**e for e in range(3) for m in range(8)))

FP6: Table = (*_E2M3, *(-value for value in _E2M3))
"""Values of float6_e2m3fn by code."""

KEPT = 1 << 18
"""Maximum number of scales of a matrix to cache between blocks; more are read again for each block."""

COUNTED: Table = tuple(map(float, range(256)))
"""Table in which each code is its own value."""


class BlockScaled(Expression):
    """Decoded values: (table value - zero point) times the scale of the block.

    Args:
        codes: Codes, one byte each.
        scales: Scale of each block, row by row of blocks, for each matrix in turn.
        matrix: Rows and columns of a matrix of codes.
        block: Rows and columns of a block; blocks at the end may be smaller.
        table: Values of the codes, at most 256, or a tensor of them; None if the dtype of the codes gives the values.
        zeros: Zero point of each block; None for zero.
        above: Number to add to stored zero points; some formats store them minus one.
        limit: Largest valid stored zero point; larger ones raise an error.
        index: Column of blocks for each column of codes, or row of blocks for each row with `rows_by_index`; None to
            derive it from the block size.
        rows_by_index: Whether `index` refers to rows.
        stored: The same elements in the order of the file, if that order is transposed.
        shape: Shape of the result; by default, that of the codes.
        dtype: dtype that values are rounded to.
        offset: Number to add to every scale.
        factor: Factor for every value, after its scale.

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
        table: Table | Expression | None = None,
        zeros: Expression | None = None,
        above: int = 0,
        limit: int = 255,
        index: Expression | None = None,
        rows_by_index: bool = False,
        stored: Expression | None = None,
        shape: Sequence[int] | None = None,
        dtype: DType = F32,
        offset: float = 0.0,
        factor: float = 1.0,
    ) -> None:
        further = [each for each in (zeros, index, table) if isinstance(each, Expression)]
        super().__init__(codes.shape if shape is None else shape, dtype, (codes, scales, *further))
        self.codes, self.scales, self.zeros, self.index, self.table = codes, scales, zeros, index, table
        self.matrix, self.block = matrix, block
        self.rows_by_index, self._stored = rows_by_index, stored
        self.above, self.limit, self.offset, self.factor = above, limit, offset, factor
        rows, columns = matrix
        # Rows and columns of blocks. With an index, their number follows from the number of scales.
        matrices = codes.numel // max(rows * columns, 1)
        self.lines, self.across = -(-rows // block[0]), -(-columns // block[1])
        if index is not None and rows_by_index:
            self.lines = scales.numel // (matrices * self.across)
        elif index is not None:
            self.across = scales.numel // (matrices * self.lines)
        assert self.numel == codes.numel == matrices * rows * columns
        assert scales.numel == matrices * self.lines * self.across
        assert zeros is None or zeros.numel == scales.numel
        self.granule = columns if columns <= 1 << 16 else 1

    def unordered(self) -> Expression:
        """The elements in stored order, if that order is transposed."""
        return self if self._stored is None else self._stored

    def prepare(self, work: Work) -> Any:
        """Block of each column, or of each row; None if the block size gives it."""
        import numpy as np

        if self.index is None:
            return None
        along = 0 if self.rows_by_index else 1
        groups = (self.lines, self.across)[along]
        found = np.array(self.index.compute(0, self.matrix[along], work)).astype(np.int64)
        if len(found) and (found.min() < 0 or found.max() >= groups):
            raise NotReadable(f"A group in {self.index.summary()!r} is out of range: there are {groups}")
        plain = np.arange(len(found)) // self.block[along]
        return None if np.array_equal(found, plain) else found.astype(np.int32)

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Decode a range."""
        import numpy as np

        direct = self.dtype == F32
        out = into if direct and into is not None else work.scratch(self, 0, stop - start, F32.numpy)
        table = self._table(work)
        index = None if self.index is None else work.state.get(id(self))
        found = self.codes.compute(start, stop, work).view(np.uint8)
        columns, high = self.matrix[1], self.block[0]
        size = self.matrix[0] * columns
        at = start
        while at < stop:  # one matrix after the other: blocks start anew in each
            number, begin = divmod(at, size)
            count = min(size - begin, stop - at)
            if index is not None and self.rows_by_index:
                rows = index[begin // columns : (begin + count - 1) // columns + 1]
                self._by_row(found[at - start : at - start + count], table, number, rows, begin % columns,
                             out[at - start : at - start + count], work)  # fmt: skip
                at += count
                continue
            first, last = begin // columns // high, (begin + count - 1) // columns // high + 1
            self._scale(
                found[at - start : at - start + count], table, number, (first, last), index,
                begin - first * high * columns, out[at - start : at - start + count], work,
            )  # fmt: skip
            at += count
        if self.factor != 1:
            np.multiply(out, np.float32(self.factor), out=out)
        if direct:
            return out
        rounded = work.scratch(self, 1, stop - start, self.dtype.numpy)
        with np.errstate(all="ignore"):
            np.copyto(rounded, out, casting="unsafe")
        return rounded

    def _by_row(self, codes: Array, table: Array, number: int, rows: Array, start: int, out: Array, work: Work) -> None:
        """Rows of which each has blocks of its own, wherever their scales are."""
        from torchparams.sketch.decode import scaled

        scales, *zeros = self._kept(number, work)[:, rows]
        scaled(codes, table, scales, zeros[0] if zeros else None, None, self.matrix[1], (1, self.block[1]), start, out)

    def _scale(
        self,
        codes: Array,
        table: Array,
        number: int,
        lines: tuple[int, int],
        index: Array | None,
        start: int,
        out: Array,
        work: Work,
    ) -> None:
        from torchparams.sketch.decode import scaled

        columns, wide = self.matrix[1], self.block[1]
        first = (number * self.lines + lines[0]) * self.across
        if self.lines * self.across <= KEPT:
            scales, *zeros = self._kept(number, work)[:, lines[0] : lines[1]]
        elif index is None and start % columns + len(codes) <= columns:
            # A part of one row, which may be a whole tensor, needs only its own scales.
            begin, end = start % columns // wide, -(-(start % columns + len(codes)) // wide)
            scales, *zeros = (each.reshape(1, -1) for each in self._factors(first + begin, first + end, work))
            columns, start = (end - begin) * wide, start % columns - begin * wide
        else:
            stop = (number * self.lines + lines[1]) * self.across
            scales, *zeros = (each.reshape(-1, self.across) for each in self._factors(first, stop, work))
        scaled(codes, table, scales, zeros[0] if zeros else None, index, columns, self.block, start, out)

    def _kept(self, number: int, work: Work) -> Array:
        """Scales and zero points of a matrix, cached for the next blocks."""
        import numpy as np

        size = self.lines * self.across

        def read() -> Array:
            found = self._factors(number * size, (number + 1) * size, work)
            return np.stack([each.reshape(-1, self.across) for each in found])

        return work.latest(self, number, read)

    def _factors(self, start: int, stop: int, work: Work) -> list[Array]:
        """A range of scales and, if there are any, zero points, as float32."""
        import numpy as np

        scales = widen(self.scales.compute(start, stop, work), self.scales.dtype)
        if self.offset:
            scales = scales + np.float32(self.offset)
        _check_finite(scales, self.scales, work)
        found = [scales]
        if self.zeros is not None:
            stored = self.zeros.compute(start, stop, work)
            if self.limit < 255 and stored.max() > self.limit:
                raise NotReadable(f"A zero point in {self.zeros.summary()!r} is larger than {self.limit}")
            found.append(stored.astype(np.float32) + np.float32(self.above))
        return found

    def _table(self, work: Work) -> Array:
        if self.table is None:
            return values_of(self.codes.dtype)
        if isinstance(self.table, Expression):
            values = widen(self.table.compute(0, self.table.numel, work), self.table.dtype)
            _check_finite(values, self.table, work)
            return _padded(tuple(values.tolist()))
        return _padded(self.table)

    @property
    def footprint(self) -> int:
        """Bytes per element: codes, scales, and float32 before and after rounding."""
        area = self.block[0] * self.block[1]
        scales = -(-(self.scales.footprint + 12) // min(area, self.scales.footprint + 12))
        return self.codes.footprint + scales + 4 + self.dtype.itemsize

    def summary(self) -> str:
        """Summary of the codes, marked as decoded."""
        return f"{self.codes.summary()} decoded"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the block."""
        return {**super().to_json(), "block": list(self.block)}


def _check_finite(values: Array, x: Expression, work: Work) -> None:
    """Raise if values that are to be written would be NaN or infinite because of a scale."""
    import numpy as np

    if work.strict and not np.isfinite(values).all():
        raise NotReadable(f"A scale in {x.summary()!r} is NaN or infinite")


@lru_cache
def _padded(values: Table) -> Array:
    """Table padded with NaN to 256 values."""
    import numpy as np

    table = np.full(256, np.nan, np.float32)
    table[: len(values)] = values
    return table


@lru_cache
def values_of(dtype: DType) -> Array:
    """Value of each byte in a dtype.

    >>> values_of(DType.of("float8_e4m3fn"))[[1, 0x7E]].tolist()
    [0.001953125, 448.0]
    """
    import numpy as np

    with np.errstate(all="ignore"):
        return np.arange(256, dtype=np.uint8).view(dtype.numpy).astype(np.float32)
