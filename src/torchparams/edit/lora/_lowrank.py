"""Matrices and their changes of low rank: a change added to a matrix, and the best one between two matrices."""

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

    from torchparams.expressions.work import Work

    Array = np.ndarray[Any, Any]

_TILE = 1 << 17  # elements of a product that are computed at once, whole rows
_LIGHT = 32 << 20  # bytes of factors that each thread may hold for itself


class Folded(Combination):
    """A weight and a change of low rank: `W + scale · B·A`, or with `transposed` `W + scale · (B·A)ᵀ`.

    The product is computed in float32 or float64 by BLAS, in tiles of whole rows counted from the first one: a range
    computes the tiles that it touches, so that its elements have the bits of the whole. Everything is rounded once.

    Args:
        base: The weight W, shape (rows, ...).
        a, b: The factors, shapes (r, columns) and (rows, r); transposed, (r, rows) and (columns, r). Dimensions of a
            kernel count to the columns.
        scale: What the product is multiplied by.
        transposed: Whether W is the product's transpose.
        dtype, accumulate: See `Combination`.

    Raises:
        MismatchError: The shapes do not fit.
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
                f"{base.summary()} has shape {list(base.shape)}, which a change of the factors {list(a.shape)} and "
                f"{list(b.shape)} does not fit"
            )
        self._tile = max(_TILE // max(self._columns, 1), 1)
        self.granule = max(self._tile * self._columns, 1)
        self._held = (rows + self._columns) * self.rank * self.accumulate.itemsize
        self.resident = self._held if self._held > _LIGHT else 0

    def prepare(self, work: Work) -> tuple[Array, Array]:
        """Both factors, in the type that is computed in: shapes (rows, r) and (r, columns)."""
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
        """Tile by tile."""
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

    def _tile_of(self, number: int, work: Work) -> Array:
        """The change of a tile of rows, shape (tile · columns,); the last one asked for is kept."""

        def compute() -> Array:
            left, right = work.prepared(self)
            change: Array = left[number * self._tile : (number + 1) * self._tile] @ right
            if self.scale != 1:
                change *= change.dtype.type(self.scale)
            return change.reshape(-1)

        return work.latest(self, number, compute)

    @property
    def footprint(self) -> int:
        """That of a sum, and of the factors, which each thread holds."""
        return super().footprint + (0 if self.resident else 2 * self._held // self.granule)

    def summary(self) -> str:
        """As a formula."""
        name = self.operands[0].summary()
        return f"{name} + {self.scale:g}·{'(B·A)ᵀ' if self.transposed else 'B·A'}, rank {self.rank}"

    def to_json(self) -> dict[str, Any]:
        """With the scale and the rank."""
        return {**super().to_json(), "scale": self.scale, "rank": self.rank, "transposed": self.transposed}


_OVERSAMPLING = 10  # as Halko et al. recommend: more directions than are wanted
_ITERATIONS = 3  # passes to and fro, which make the found directions the leading ones
_EXACT = 512  # up to this many rows or columns, all directions are taken: then nothing is left to chance


class Difference(Combination):
    """One tensor without another, in float32.

    Args:
        tuned, base: The tensors, of one shape.
    """

    def __init__(self, tuned: Expression, base: Expression) -> None:
        super().__init__((tuned, base), DType.of("float32"))

    def combine(self, start: int, stop: int, work: Work) -> Array:
        """The difference."""
        tuned, base = (self.wide(part, slot, start, stop, work) for slot, part in enumerate(self.operands))
        tuned -= base
        return tuned

    def summary(self) -> str:
        """As a formula."""
        names = [part.summary() for part in self.operands]
        return f"the change of {names[0]}" if names[0] == names[1] else " - ".join(names)


class Factors:
    """The best change of a rank between two matrices, by their difference's truncated singular value decomposition.

    The difference is never in memory: it is read by blocks of rows, in 9 passes, by the randomised range finder with
    subspace iterations of Halko, Martinsson and Tropp 2011, arXiv:0909.4061 (their algorithms 4.4 and 5.1; 10
    directions more than are wanted, 3 iterations; the random numbers are made of the tensor's name). Where rows or
    columns are 512 or less, and that takes no more than 32 MiB, all directions are taken, and it is the truncated
    decomposition to float32's precision.

    Args:
        difference: The difference, shape (rows, columns).
        rank: The rank; rows or columns where these are fewer.
        dtype: The type that factors are written in.
        name: The tensor's name.

    Attributes:
        norm: Frobenius norm of the difference; None before it is computed.
        error: Frobenius norm of what the factors, rounded, leave of it, relative to that.
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
        """Bytes that are held while it is computed."""
        return 4 * 4 * (self.rows + self.columns) * self.directions

    def take(self, which: str, work: Work) -> Array:
        """The factor `a`, shape (r, columns), or `b`, shape (rows, r), of the type `dtype`; each is given once."""
        with self._lock:
            if which not in self._found:
                self._found = self._compute(work)
            return self._found.pop(which)

    def _blocks(self, work: Work) -> Iterator[tuple[int, int, Array]]:
        """First row, last row and the difference's rows."""
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
        """An orthonormal basis, shape (rows, directions), of the leading directions of the difference's columns."""
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
        """The difference times a matrix."""
        import numpy as np

        out = np.empty((self.rows, across.shape[1]), np.float32)
        with np.errstate(all="ignore"):
            for first, last, rows in self._blocks(work):
                out[first:last] = rows @ across
        return self._finite(out)

    def _finite(self, found: Array) -> Array:
        import numpy as np

        if not np.isfinite(found).all():
            raise NotReadable(f"{self.name!r} differs by what is not finite: it has no decomposition")
        return found


class Factor(Expression):
    """One of two factors.

    Args:
        factors: Both.
        which: `a`, shape (r, columns), or `b`, shape (rows, r).
        transposed: Whether the factor is written transposed, as those of embeddings are.
    """

    def __init__(self, factors: Factors, which: str, *, transposed: bool = False) -> None:
        shape = (factors.rank, factors.columns) if which == "a" else (factors.rows, factors.rank)
        super().__init__(shape[::-1] if transposed else shape, factors.dtype, (factors.difference,))
        self.factors, self.which, self.transposed = factors, which, transposed
        self.resident = factors.nbytes

    def prepare(self, work: Work) -> Array:
        """All of it."""
        found = self.factors.take(self.which, work)
        return (found.T if self.transposed else found).reshape(-1)

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """A part of what is there already."""
        values: Array = work.prepared(self)[start:stop]
        return values

    def summary(self) -> str:
        """What it is of."""
        return f"{self.which.upper()} of rank {self.factors.rank} of {self.factors.difference.summary()}"

    def to_json(self) -> dict[str, Any]:
        """With the rank."""
        return {**super().to_json(), "factor": self.which, "rank": self.factors.rank}
