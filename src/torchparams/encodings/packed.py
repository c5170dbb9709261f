"""Expressions that unpack codes from words and bytes, and transpose matrices."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.expressions.base import Expression
from torchparams.expressions.casts import widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from torchparams.expressions.base import Work

    Array = np.ndarray[Any, Any]

U8, F32 = DType.of("uint8"), DType.of("float32")

TILE = 1 << 22
"""Elements computed at once for a tile, which is cached for the next blocks."""

_ALIGNED = 32  # rows per tile: this many codes fill whole words for any number of bits
_WHOLE = 1 << 24  # bytes of a matrix up to which it is read whole instead of in very many pieces
_PIECES = 1 << 11


class Tiled(Expression):
    """Matrices computed in tiles of rows, because their rows are not stored consecutively.

    Args:
        shape: Shape; the last two dimensions are rows and columns.
        dtype: Dtype of the result.
        x: Stored matrices, with rows and columns as in `stored`.
        stored: Rows and columns of a stored matrix.
    """

    def __init__(self, shape: Sequence[int], dtype: DType, x: Expression, stored: tuple[int, int]) -> None:
        super().__init__(shape, dtype, (x,))
        self.rows, self.columns = self.shape[-2:]
        self.stored = stored
        self.height = min(max(TILE // max(self.columns, 1) // _ALIGNED, 1) * _ALIGNED, max(self.rows, 1))

    @abstractmethod
    def tile(self, number: int, start: int, stop: int, work: Work) -> Array:
        """Compute rows `[start, stop)` of matrix `number`, contiguous."""

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute elements from one or more tiles."""
        size, tiles = self.rows * self.columns, -(-self.rows // self.height)
        out = into
        at = start
        while at < stop:
            number, offset = divmod(at, size)
            place = offset // self.columns // self.height
            first = place * self.height
            last = min(first + self.height, self.rows)
            tile = work.latest(self, number * tiles + place, partial(self.tile, number, first, last, work)).reshape(-1)
            begin = offset - first * self.columns
            part = tile[begin : begin + stop - at]
            if len(part) == stop - start:
                return part
            if out is None:
                out = work.scratch(self, 0, stop - start, self.dtype.numpy)
            out[at - start : at - start + len(part)] = part
            at += len(part)
        assert out is not None  # there is at least one element
        return out

    def columns_of(self, number: int, start: int, stop: int, work: Work, dtype: np.dtype[Any]) -> Array:
        """Columns `[start, stop)` of all rows of a stored matrix."""
        import numpy as np

        (x,) = self.operands
        rows, columns = self.stored
        begin = number * rows * columns
        whole = (start, stop) == (0, columns)
        if whole or (rows > _PIECES and rows * columns * dtype.itemsize <= _WHOLE):
            found = x.compute(begin, begin + rows * columns, work).view(dtype).reshape(rows, columns)
            return np.ascontiguousarray(found[:, start:stop])
        out = np.empty((rows, stop - start), dtype)
        for row, line in enumerate(out):
            at = begin + row * columns
            line[...] = x.compute(at + start, at + stop, work).view(dtype)
        return out

    def rows_of(self, number: int, start: int, stop: int, work: Work, dtype: np.dtype[Any]) -> Array:
        """Rows `[start, stop)` of a stored matrix."""
        rows, columns = self.stored
        begin = number * rows * columns
        found = self.operands[0].compute(begin + start * columns, begin + stop * columns, work)
        return found.view(dtype).reshape(stop - start, columns)

    def summary(self) -> str:
        """Summary of the stored tensor, marked as unpacked."""
        return f"{self.operands[0].summary()} unpacked"


class Transposed(Tiled):
    """Transposed matrices.

    >>> import numpy as np
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> evaluate(Transposed(MemorySource({"w": np.array([[1, 2, 3], [4, 5, 6]])}).row("w"))).tolist()
    [[1, 4], [2, 5], [3, 6]]
    """

    def __init__(self, x: Expression) -> None:
        *batch, rows, columns = x.shape
        super().__init__((*batch, columns, rows), x.dtype, x, (rows, columns))

    def tile(self, number: int, start: int, stop: int, work: Work) -> Array:
        """Transposed columns of the stored matrix."""
        import numpy as np

        return np.array(self.columns_of(number, start, stop, work, self.dtype.numpy).T, order="C")

    def summary(self) -> str:
        """Summary of the stored tensor, marked as transposed."""
        return f"{self.operands[0].summary()} transposed"


class Unpacked(Tiled):
    """Codes unpacked from 32-bit words to one per byte, lowest bits first.

    Args:
        words: int32 matrix, or several.
        bits: Bits per code.
        shape: Shape of the codes; the last two dimensions are rows and columns.
        axis: Axis of the words along which codes are packed.
        turned: Whether the result is transposed.
        order: Code held by each field of a word; None for consecutive codes.

    >>> import numpy as np
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> words = MemorySource({"w": np.array([[0x21], [0x43]], np.int32)}).row("w")
    >>> evaluate(Unpacked(words, 4, (2, 2), 1)).tolist(), evaluate(Unpacked(words, 4, (2, 2), 1, turned=True)).tolist()
    ([[1, 2], [3, 4]], [[1, 3], [2, 4]])
    """

    def __init__(
        self,
        words: Expression,
        bits: int,
        shape: Sequence[int],
        axis: int,
        *,
        turned: bool = False,
        order: bytes | None = None,
    ) -> None:
        rows, columns = words.shape[-2:]
        super().__init__(shape, U8, words, (rows, columns))
        self.bits, self.axis, self.turned, self.order = bits, axis, turned, order

    def tile(self, number: int, start: int, stop: int, work: Work) -> Array:
        """Codes of a range of rows."""
        import numpy as np

        from torchparams.sketch.decode import unpack

        u32 = np.dtype(np.uint32)
        out = np.empty((stop - start, self.columns), np.uint8)
        take = self.columns_of if self.turned else self.rows_of
        along = self.axis == (1 if self.turned else 0)  # whether the rows are packed
        if along:
            words = take(number, start * self.bits // 32, -(-stop * self.bits // 32), work, u32)
        else:
            words = take(number, start, stop, work, u32)
        count = stop - start if along else self.columns
        unpack(words, self.bits, count, self.axis, out.T if self.turned else out, self.order)
        return out

    @property
    def footprint(self) -> int:
        """Bytes per element: words and codes."""
        return 2


class Bytes(Expression):
    """Bytes of elements, viewed as a one-byte dtype.

    Args:
        x: Elements of at least one byte each.
        dtype: Dtype of the result.
        shape: Shape of the result.

    >>> import numpy as np
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> evaluate(Bytes(MemorySource({"w": np.array([0x0201], np.int16)}).row("w"), U8, (2,)))
    array([1, 2], dtype=uint8)
    """

    def __init__(self, x: Expression, dtype: DType, shape: Sequence[int]) -> None:
        super().__init__(shape, dtype, (x,))
        assert self.nbytes == x.nbytes
        self.granule = x.dtype.itemsize

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute a range of bytes."""
        import numpy as np

        (x,) = self.operands
        size = x.dtype.itemsize
        first = start // size
        found = x.compute(first, -(-stop // size), work).view(np.uint8)
        return found[start - first * size : stop - first * size].view(self.dtype.numpy)

    def summary(self) -> str:
        """Summary of the operand."""
        return self.operands[0].summary()


class Nibbles(Expression):
    """Four-bit codes unpacked from bytes to one per byte.

    Args:
        x: Packed bytes.
        shape: Shape of the codes.
        high_first: Whether the upper half of a byte comes first.

    >>> import numpy as np
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> x = MemorySource({"w": np.array([0x21, 0x43], np.uint8)}).row("w")
    >>> evaluate(Nibbles(x, (4,))).tolist(), evaluate(Nibbles(x, (4,), high_first=True)).tolist()
    ([1, 2, 3, 4], [2, 1, 4, 3])
    """

    granule = 2

    def __init__(self, x: Expression, shape: Sequence[int], *, high_first: bool = False) -> None:
        super().__init__(shape, U8, (x,))
        assert -(-self.numel // 2) == x.nbytes
        self.high_first = high_first

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Unpack a range."""
        import numpy as np

        (x,) = self.operands
        first, last = start // 2, -(-stop // 2)
        packed = x.compute(first, last, work).view(np.uint8)
        out = work.scratch(self, 0, 2 * (last - first), np.dtype(np.uint8))
        halves = out.reshape(-1, 2)
        np.right_shift(packed, 4, out=halves[:, 0 if self.high_first else 1])
        np.bitwise_and(packed, 15, out=halves[:, 1 if self.high_first else 0])
        return out[start - 2 * first : stop - 2 * first]

    @property
    def footprint(self) -> int:
        """Bytes per element: packed bytes and codes."""
        return 2

    def summary(self) -> str:
        """Summary of the operand, marked as unpacked."""
        return f"{self.operands[0].summary()} unpacked"


class Sixes(Expression):
    """Codes of six bits, a byte each; three bytes hold four of them, the lowest bits first.

    Args:
        x: The bytes.
        shape: The shape of the codes, a multiple of four.

    >>> import numpy as np
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> x = MemorySource({"w": np.array([0x81, 0x30, 0x10], np.uint8)}).row("w")
    >>> evaluate(Sixes(x, (4,))).tolist()
    [1, 2, 3, 4]
    """

    granule = 4

    def __init__(self, x: Expression, shape: Sequence[int]) -> None:
        super().__init__(shape, U8, (x,))
        assert self.numel * 3 == x.nbytes * 4

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """The four codes of each three bytes."""
        import numpy as np

        (x,) = self.operands
        first, last = start // 4, -(-stop // 4)
        low, middle, high = x.compute(3 * first, 3 * last, work).view(np.uint8).reshape(-1, 3).T
        out = work.scratch(self, 0, 4 * (last - first), np.dtype(np.uint8))
        codes = out.reshape(-1, 4)
        codes[:, 0] = low
        codes[:, 1] = low >> 6 | middle << 2
        codes[:, 2] = middle >> 4 | high << 4
        codes[:, 3] = high >> 2
        np.bitwise_and(out, 63, out=out)
        return out[start - 4 * first : stop - 4 * first]

    @property
    def footprint(self) -> int:
        """The bytes, and the codes."""
        return 2

    def summary(self) -> str:
        """The bytes, unpacked."""
        return f"{self.operands[0].summary()} unpacked"


class Rescaled(Expression):
    """Numbers multiplied or divided by a scalar, in float32: scales that have a scale.

    Args:
        x: Numbers of at most 32 bits.
        by: Scalar.
        divide: Whether to divide.
    """

    def __init__(self, x: Expression, by: Expression, *, divide: bool = False) -> None:
        super().__init__(x.shape, F32, (x, by))
        assert by.numel == 1
        self.divide = divide

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Scale a range."""
        import numpy as np

        x, by = self.operands
        factor = widen(by.compute(0, 1, work), by.dtype)[0]
        out = widen(x.compute(start, stop, work), x.dtype, work.scratch(self, 0, stop - start, F32.numpy))
        with np.errstate(all="ignore"):
            (np.divide if self.divide else np.multiply)(out, factor, out=out)
        return out

    def summary(self) -> str:
        """The expression as a product or quotient."""
        return f"{self.operands[0].summary()} {'/' if self.divide else '·'} {self.operands[1].summary()}"
