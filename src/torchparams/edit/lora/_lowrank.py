"""Low-rank changes of matrices: add one to a matrix, or find the best one between two matrices."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.errors import MismatchError, NotReadable
from torchparams.expressions.base import Expression
from torchparams.expressions.casts import cast
from torchparams.expressions.combination import Combination, check_floats

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from torchparams.expressions.base import Work

    Array = np.ndarray[Any, Any]

_TILE = 1 << 17  # elements of the product computed at once, in whole rows
_LIGHT = 32 << 20  # bytes of factors that each thread may hold its own copy of


class Folded(Combination):
    """A weight plus a low-rank change: `W + scale · B·A`, or `W + scale · (B·A)ᵀ` if `transposed`.

    BLAS computes the product in float32 or float64, in tiles of whole rows counted from the first row. A range computes
    all tiles that it touches, so its elements have the same bits as in the whole. The result is rounded once.

    Args:
        base: Weight W, shape (rows, ...).
        a, b: Factors, shapes (r, columns) and (rows, r); if transposed, (r, rows) and (columns, r). Kernel dimensions
            are flattened into the columns.
        scale: Factor for the product.
        transposed: Whether W stores the transpose of the product.
        dtype, accumulate: See `Combination`.

    Raises:
        MismatchError: The shapes do not match.
    """

    def __init__(
        self,
        base: Expression,
        a: Expression,
        b: Expression,
        scale: float,
        *,
        transposed: bool = False,
        dtype: DType | None = None,
        accumulate: str = "float32",
    ) -> None:
        super().__init__((base,), dtype, accumulate)
        check_floats((a, b))
        self.operands = (base, a, b)
        self.scale, self.transposed = scale, transposed
        self.rank = a.shape[0]
        rows = base.shape[0] if base.shape else 1
        self._columns = base.numel // rows if rows else 0
        kernel = base.shape[2:]
        wanted = ((self.rank, rows), (self._columns, self.rank)) if transposed else (
            (self.rank, *base.shape[1:]), (rows, self.rank, *(1 for _ in kernel))
        )  # fmt: skip
        if (a.shape, b.shape) != wanted or len(base.shape) < 2:
            raise MismatchError(
                f"{base.summary()!r} has shape {list(base.shape)}, which does not match factors of shapes "
                f"{list(a.shape)} and "
                f"{list(b.shape)}"
            )
        self._tile = max(_TILE // max(self._columns, 1), 1)
        self.granule = max(self._tile * self._columns, 1)
        self._held = (rows + self._columns) * self.rank * self.accumulate.itemsize
        self.resident = self._held if self._held > _LIGHT else 0

    def prepare(self, work: Work) -> tuple[Array, Array]:
        """Both factors in the accumulation dtype, shapes (rows, r) and (r, columns)."""
        import numpy as np

        _, a, b = self.operands
        x, y = (self._whole(part, work) for part in (a, b))
        if self.transposed:
            return np.ascontiguousarray(x.reshape(self.rank, -1).T), np.ascontiguousarray(y.reshape(-1, self.rank).T)
        return y.reshape(-1, self.rank), x.reshape(self.rank, -1)

    def _whole(self, part: Expression, work: Work) -> Array:
        import numpy as np

        out = np.empty(part.numel, self.accumulate.numpy)
        for start in range(0, part.numel, work.block):
            stop = min(start + work.block, part.numel)
            out[start:stop] = self.wide(part, 1, start, stop, work)
        return out

    def combine(self, start: int, stop: int, work: Work) -> Array:
        """Base plus change, tile by tile."""
        import numpy as np

        with np.errstate(all="ignore"):
            total = self.wide(self.operands[0], 0, start, stop, work)
            at = start
            while at < stop:
                number = at // self.granule
                end = min((number + 1) * self.granule, stop)
                first = number * self.granule
                total[at - start : end - start] += self._tile_of(number, work)[at - first : end - first]
                at = end
        return total

    def finite(self, start: int, stop: int, work: Work) -> Array:
        """See `Combination.finite`: an element is computed from one of W, a row of B, and a column of A."""
        import numpy as np

        left, right = work.prepared(self)
        rows, columns = np.divmod(np.arange(start, stop), self._columns)
        found: Array = np.isfinite(self.wide(self.operands[0], 0, start, stop, work))
        found &= np.isfinite(left).all(axis=1)[rows]
        found &= np.isfinite(right).all(axis=0)[columns]
        return found

    def _tile_of(self, number: int, work: Work) -> Array:
        """Change for one tile of rows, shape (tile · columns,). The last tile is cached."""

        def compute() -> Array:
            left, right = work.prepared(self)
            change: Array = left[number * self._tile : (number + 1) * self._tile] @ right
            if self.scale != 1:
                change *= change.dtype.type(self.scale)
            return change.reshape(-1)

        return work.latest(self, number, compute)

    @property
    def footprint(self) -> int:
        """Bytes per element, including the factors that each thread holds."""
        return super().footprint + (0 if self.resident else 2 * self._held // self.granule)

    def summary(self) -> str:
        """The expression as a formula."""
        name = self.operands[0].summary()
        return f"{name} + {self.scale:g}·{'(B·A)ᵀ' if self.transposed else 'B·A'}, rank {self.rank}"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with scale and rank."""
        return {**super().to_json(), "scale": self.scale, "rank": self.rank, "transposed": self.transposed}


_OVERSAMPLING = 10  # extra directions, as Halko et al. recommend
_ITERATIONS = 3  # subspace iterations, which align the directions with the leading singular vectors
_EXACT = 512  # up to this many rows or columns, all directions are used, without random sampling


class Difference(Combination):
    """Difference of two tensors, in float32.

    Args:
        tuned, base: Tensors of the same shape.
    """

    def __init__(self, tuned: Expression, base: Expression) -> None:
        super().__init__((tuned, base), DType.of("float32"))

    def combine(self, start: int, stop: int, work: Work) -> Array:
        """Difference of a range."""
        tuned, base = (self.wide(part, slot, start, stop, work) for slot, part in enumerate(self.operands))
        tuned -= base
        return tuned

    def summary(self) -> str:
        """The expression as a formula."""
        names = [part.summary() for part in self.operands]
        return f"the change of {names[0]}" if names[0] == names[1] else " - ".join(names)


class Factors:
    """Best low-rank change between two matrices: the truncated singular value decomposition of their difference.

    The difference is never in memory as a whole. It is read in blocks of rows, in 9 passes, by the randomised range
    finder with subspace iterations of Halko, Martinsson and Tropp 2011, arXiv:0909.4061 (algorithms 4.4 and 5.1; 10
    extra directions, 3 iterations; the seed is derived from the tensor's name). With at most 512 rows or columns, and
    at most 32 MiB, all directions are used: the result is then the truncated decomposition to float32 precision.

    Args:
        difference: Difference of the matrices, shape (rows, columns).
        rank: Rank, capped at the number of rows and columns.
        dtype: Dtype of the factors.
        name: Name of the tensor.

    Attributes:
        norm: Frobenius norm of the difference; None before it is computed.
        error: Relative Frobenius error: norm of (difference − product of the rounded factors) divided by `norm`.
    """

    def __init__(self, difference: Difference, rank: int, dtype: DType, name: str) -> None:
        self.difference = difference
        self.rows, self.columns = difference.shape
        smaller = min(difference.shape)
        self.rank = min(rank, smaller)
        self.dtype, self.name = dtype, name
        self.directions = smaller
        if smaller > _EXACT or self.nbytes > _LIGHT:
            self.directions = min(self.rank + _OVERSAMPLING, smaller)
        self.norm: float | None = None
        self.error: float | None = None
        self._found: dict[str, Array] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes in memory during the computation."""
        return 4 * 4 * (self.rows + self.columns) * self.directions

    def take(self, which: str, work: Work) -> Array:
        """Take factor `a`, shape (r, columns), or `b`, shape (rows, r), in `dtype`. Each can be taken once."""
        with self._lock:
            if which not in self._found:
                self._found = self._compute(work)
            return self._found.pop(which)

    def _blocks(self, work: Work) -> Iterator[tuple[int, int, Array]]:
        """Blocks of the difference: first row, end row, values."""
        step = max(work.block // self.columns, 1)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            yield (
                first,
                last,
                self.difference.compute(first * self.columns, last * self.columns, work).reshape(-1, self.columns),
            )

    def _compute(self, work: Work) -> dict[str, Array]:
        import numpy as np

        basis = self._range(work)
        small = np.zeros((basis.shape[1], self.columns), np.float32)
        squares = 0.0
        with np.errstate(all="ignore"):
            for first, last, rows in self._blocks(work):
                small += basis[first:last].T @ rows
                squares += float(np.square(rows, dtype=np.float64).sum())
        left, values, right = np.linalg.svd(self._finite(small), full_matrices=False)
        root = np.sqrt(values[: self.rank])
        f32 = DType.of("float32")
        b, a = (
            cast(np.ascontiguousarray(part).reshape(-1), f32, self.dtype).reshape(part.shape)
            for part in (basis @ left[:, : self.rank] * root, root[:, None] * right[: self.rank])
        )
        wide_b, wide_a = b.astype(np.float32), a.astype(np.float32)
        rest = sum(
            float(np.square(rows - wide_b[first:last] @ wide_a, dtype=np.float64).sum())
            for first, last, rows in self._blocks(work)
        )
        self.norm = squares**0.5
        self.error = (rest / squares) ** 0.5 if squares else 0.0
        return {"a": a, "b": b}

    def _range(self, work: Work) -> Array:
        """Orthonormal basis of the leading directions of the columns, shape (rows, directions)."""
        import numpy as np

        if self.directions == self.rows:
            return np.eye(self.rows, dtype=np.float32)
        if self.directions == self.columns:
            return np.linalg.qr(self._images(np.eye(self.columns, dtype=np.float32), work))[0]
        key = hashlib.blake2b(self.name.encode(), digest_size=16).digest()
        numbers = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64)))
        images = self._images(numbers.standard_normal((self.columns, self.directions), dtype=np.float32), work)
        for _ in range(_ITERATIONS):
            basis = np.linalg.qr(images)[0]
            back = np.zeros((self.columns, self.directions), np.float32)
            for first, last, rows in self._blocks(work):
                back += rows.T @ basis[first:last]
            images = self._images(np.linalg.qr(back)[0], work)
        found: Array = np.linalg.qr(images)[0]
        return found

    def _images(self, across: Array, work: Work) -> Array:
        """Product of the difference and a matrix."""
        import numpy as np

        out = np.empty((self.rows, across.shape[1]), np.float32)
        with np.errstate(all="ignore"):
            for first, last, rows in self._blocks(work):
                out[first:last] = rows @ across
        return self._finite(out)

    def _finite(self, found: Array) -> Array:
        import numpy as np

        if not np.isfinite(found).all():
            raise NotReadable(f"the difference of {self.name!r} has non-finite values, so it has no decomposition")
        return found


class Factor(Expression):
    """One of the two factors, as an expression.

    Args:
        factors: The computation of both factors.
        which: `a`, shape (r, columns), or `b`, shape (rows, r).
        transposed: Whether to write the transpose, as PEFT does for embeddings.
    """

    def __init__(self, factors: Factors, which: str, *, transposed: bool = False) -> None:
        shape = (factors.rank, factors.columns) if which == "a" else (factors.rows, factors.rank)
        super().__init__(shape[::-1] if transposed else shape, factors.dtype, (factors.difference,))
        self.factors, self.which, self.transposed = factors, which, transposed
        self.resident = factors.nbytes

    def prepare(self, work: Work) -> Array:
        """Complete factor, flattened."""
        found = self.factors.take(self.which, work)
        return (found.T if self.transposed else found).reshape(-1)

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Range of the prepared factor."""
        values: Array = work.prepared(self)[start:stop]
        return values

    def summary(self) -> str:
        """Short description of the factor."""
        return f"{self.which.upper()} of rank {self.factors.rank} of {self.factors.difference.summary()}"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the rank."""
        return {**super().to_json(), "factor": self.which, "rank": self.factors.rank}
