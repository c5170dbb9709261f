"""Operations on tensors: slices, joins, casts, sums, and elementwise functions.

`base.py` describes how to add one.

>>> import numpy as np
>>> from torchparams.dtypes import DType
>>> from torchparams.expressions.base import Stored
>>> from torchparams.expressions.work import evaluate
>>> from torchparams.testing import MemorySource
>>> w = Stored(MemorySource({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}), "w")
>>> evaluate(Concat([Slice(w, 1, 2, 3), w], dim=1))
array([[2., 0., 1., 2.],
       [5., 3., 4., 5.]], dtype=float32)
>>> evaluate(Linear([w, w], [0.5, 0.25])).tolist()
[[0.0, 0.75, 1.5], [2.25, 3.0, 3.75]]
>>> evaluate(Cast(Elementwise(np.square, w, name="square"), DType.of("BF16"))).tolist()
[[0.0, 1.0, 4.0], [9.0, 16.0, 25.0]]
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, PlanError
from torchparams.expressions.base import Expression
from torchparams.expressions.casts import Losses, cast_counting, castable
from torchparams.expressions.combination import Combination
from torchparams.info import Location

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Work
    from torchparams.sketch.sums import NumpySum

    Array = np.ndarray[Any, Any]


class Slice(Expression):
    """Elements `[start, stop)` of a tensor along one dimension.

    Args:
        x: Tensor to slice.
        dim: Dimension, from 0.
        start, stop: Range along the dimension.

    Raises:
        PlanError: The dimension or range does not exist.
    """

    def __init__(self, x: Expression, dim: int, start: int, stop: int) -> None:
        if not 0 <= dim < len(x.shape) or not 0 <= start <= stop <= x.shape[dim]:
            raise PlanError(
                f"cannot slice {start}:{stop} along dimension {dim} of a tensor of shape {list(x.shape)}",
                where=x.summary(),
            )
        super().__init__((*x.shape[:dim], stop - start, *x.shape[dim + 1 :]), x.dtype, (x,))
        self.dim, self.start, self.stop = dim, start, stop
        inner = prod(x.shape[dim + 1 :])
        self._row, self._length, self._skip = x.shape[dim] * inner, (stop - start) * inner, start * inner

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute elements from the rows of the operand."""
        (x,) = self.operands
        row, length, skip = self._row, self._length, self._skip
        if row == length or self.numel == length:  # contiguous in the operand
            return x.compute(start + skip, stop + skip, work, into)
        out = work.scratch(self, 0, stop - start, self.dtype.numpy) if into is None else into
        at = start
        while at < stop:
            number, column = divmod(at, length)
            rows = min((stop - at) // length, work.block // row) if not column else 0
            if rows:
                whole = x.compute(number * row, (number + rows) * row, work).reshape(rows, row)
                count = rows * length
                out[at - start : at - start + count].reshape(rows, length)[...] = whole[:, skip : skip + length]
            else:
                count = min(length - column, stop - at, work.block)
                first = number * row + skip + column
                work.compute_into(x, first, first + count, out[at - start : at - start + count])
            at += count
        return out

    def spans(self) -> list[Location] | None:
        """File range of the slice, if it is contiguous in the operand."""
        if not self.numel or self.numel != self._length:
            return [] if not self.numel else None
        spans = self.operands[0].spans()
        bits = self.dtype.bits
        if spans is None or len(spans) != 1 or self._skip * bits % 8 or self._length * bits % 8:
            return None
        begin = spans[0].start + self._skip * bits // 8
        return [Location(spans[0].file, begin, begin + self.nbytes)]

    def summary(self) -> str:
        """The slice in Python notation."""
        return f"{self.operands[0].summary()}[{':, ' * self.dim}{self.start}:{self.stop}]"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with dimension and range."""
        return {**super().to_json(), "dim": self.dim, "start": self.start, "stop": self.stop}


class Concat(Expression):
    """Tensors joined along one dimension.

    Args:
        parts: At least one tensor. Dtypes must be equal, and shapes may differ only in `dim`.
        dim: Dimension, from 0.

    Raises:
        MismatchError: The tensors cannot be joined.
    """

    def __init__(self, parts: Sequence[Expression], dim: int = 0) -> None:
        first = parts[0]
        for part in parts[1:]:
            ours, theirs = (x.shape[:dim] + x.shape[dim + 1 :] for x in (part, first))
            if len(part.shape) != len(first.shape) or ours != theirs or part.dtype != first.dtype:
                raise MismatchError(
                    f"{first.summary()!r} {list(first.shape)} {first.dtype} and {part.summary()!r} {list(part.shape)} "
                    f"{part.dtype} cannot be joined along dimension {dim}"
                )
        if not 0 <= dim < len(first.shape):
            raise MismatchError(f"{first.summary()!r} of shape {list(first.shape)} has no dimension {dim}")
        size = sum(part.shape[dim] for part in parts)
        super().__init__((*first.shape[:dim], size, *first.shape[dim + 1 :]), first.dtype, tuple(parts))
        self.dim = dim
        inner = prod(first.shape[dim + 1 :])
        self._lengths = [part.shape[dim] * inner for part in parts]
        self._starts = [sum(self._lengths[:i]) for i in range(len(parts))]
        self._row = size * inner

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute elements row by row, from each part in turn."""
        out = work.scratch(self, 0, stop - start, self.dtype.numpy) if into is None else into
        at = start
        while at < stop:
            row, column = divmod(at, self._row)
            rows = min((stop - at) // self._row, work.block // self._row) if not column else 0
            if rows:
                table = out[at - start : at - start + rows * self._row].reshape(rows, self._row)
                for part, begin, length in zip(self.operands, self._starts, self._lengths, strict=True):
                    if length:
                        values = part.compute(row * length, (row + rows) * length, work)
                        table[:, begin : begin + length] = values.reshape(rows, length)
                at += rows * self._row
                continue
            i = bisect_right(self._starts, column) - 1
            first = column - self._starts[i]
            count = min(self._lengths[i] - first, stop - at, work.block)
            begin = row * self._lengths[i] + first
            work.compute_into(self.operands[i], begin, begin + count, out[at - start : at - start + count])
            at += count
        return out

    def spans(self) -> list[Location] | None:
        """File ranges of the parts, if they follow each other as wholes."""
        found: list[Location] = []
        for part in self.operands:
            spans = part.spans()
            if spans is None or prod(self.shape[: self.dim]) > 1 or part.numel * part.dtype.bits % 8:
                return None
            found += spans
        return found

    def summary(self) -> str:
        """Summaries of the parts, shortened."""
        names = [part.summary() for part in self.operands]
        shown = names if len(names) <= 3 else [names[0], "…", names[-1]]
        return f"join({', '.join(shown)}{f', dim={self.dim}' if self.dim else ''})"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the dimension."""
        return {**super().to_json(), "dim": self.dim}


class Cast(Expression):
    """Cast to another dtype, counting overflow, underflow and changed values.

    Args:
        x: Tensor to cast.
        dtype: Dtype of the result.

    Raises:
        PlanError: The cast is not supported; see `castable`.
    """

    def __init__(self, x: Expression, dtype: DType) -> None:
        if not castable(x.dtype, dtype):
            raise PlanError(f"dtype {x.dtype} cannot be cast to {dtype}", where=x.summary())
        super().__init__(x.shape, dtype, (x,))

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute and round elements of the operand."""
        (x,) = self.operands
        values = x.compute(start, stop, work)
        out, lost = cast_counting(values, x.dtype, self.dtype)
        work.count(self, lost)
        return out

    def spans(self) -> list[Location] | None:
        """File ranges of the operand if the dtype does not change."""
        (x,) = self.operands
        return x.spans() if x.dtype == self.dtype else None

    @property
    def footprint(self) -> int:
        """Bytes per element: values before and after, widened for comparison, and masks."""
        return self.operands[0].footprint + self.dtype.itemsize + 2 * max(self.operands[0].dtype.itemsize, 4) + 8

    def summary(self) -> str:
        """Summary of the operand, with the dtype."""
        return f"{self.operands[0].summary()} as {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the dtype."""
        return {**super().to_json(), "dtype": str(self.dtype)}


class Linear(Combination):
    """Weighted sum, computed in float32 or float64 and rounded once.

    Args:
        parts: Tensors of the same shape.
        weights: Weight of each tensor.
        dtype: Dtype of the result; by default, that of the first tensor.
        accumulate: Dtype of products and sums: `float32` or `float64`.

    Raises:
        MismatchError: The shapes differ.
        PlanError: A tensor is not floating-point.
    """

    def __init__(
        self,
        parts: Sequence[Expression],
        weights: Sequence[float],
        dtype: DType | None = None,
        accumulate: str = "float32",
    ) -> None:
        super().__init__(parts, dtype, accumulate)
        self.weights = tuple(float(weight) for _, weight in zip(parts, weights, strict=True))

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute elements, by the C kernel if it supports the dtypes."""
        if self._sum is None:
            return super().compute(start, stop, work, into)
        import numpy as np

        out = work.scratch(self, -1, stop - start, self.dtype.numpy) if into is None else into
        values = []
        for slot, part in enumerate(self.operands):
            found = part.compute(start, stop, work)
            if not self._apart:  # the next operand may reuse this memory
                kept = work.scratch(self, slot, stop - start, part.dtype.numpy)
                np.copyto(kept, found)
                found = kept
            values.append(found)
        work.count(self, Losses(overflow=self._sum(values, out)))
        return out

    @cached_property
    def _apart(self) -> bool:
        parts = [id(x) for part in self.operands for x in part.walk()]
        return len(set(parts)) == len(parts)

    @cached_property
    def _sum(self) -> NumpySum | None:
        from torchparams.sketch.native import uses_c
        from torchparams.sketch.sums import takes, weighted_sum

        dtypes = [part.dtype for part in self.operands]
        if not (uses_c() and self.accumulate == "float32" and takes(dtypes, self.dtype)):
            return None
        return weighted_sum(dtypes, self.weights, self.dtype)

    def combine(self, start: int, stop: int, work: Work) -> Array:
        """Compute products and sums in the order of the tensors."""
        import numpy as np

        kind = self.accumulate.numpy.type
        total: Array | None = None
        with np.errstate(all="ignore"):
            for part, weight in zip(self.operands, self.weights, strict=True):
                values = self.wide(part, 0 if total is None else 1, start, stop, work)
                if weight != 1:
                    values *= kind(weight)
                if total is None:
                    total = values
                else:
                    total += values
        assert total is not None
        return total

    def summary(self) -> str:
        """The sum as a formula; shortened if all tensors have the same name."""
        weights = [f"{weight:g}" for weight in self.weights]
        if len({part.summary() for part in self.operands}) == 1:
            shown = weights if len(weights) <= 4 else [*weights[:2], "…", weights[-1]]
            return f"[{', '.join(shown)}]·{self.operands[0].summary()}"
        parts = [f"{weight:g}·{part.summary()}" for part, weight in zip(self.operands, self.weights, strict=True)]
        return " + ".join(parts if len(parts) <= 3 else [parts[0], "…", parts[-1]])

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the weights."""
        return {**super().to_json(), "weights": list(self.weights)}


class Elementwise(Expression):
    """Elementwise function of one or more tensors of the same shape.

    Args:
        function: Function from one array per tensor, each of shape (n,), to an array of shape (n,) whose dtype NumPy
            can cast to the result's. It must not write to its arguments, and each result must depend only on the
            elements at the same index.
        operands: Tensors.
        dtype: Dtype of the result; by default, that of the first tensor.
        name: Name of the function to show.

    Raises:
        MismatchError: The shapes differ.
    """

    def __init__(
        self, function: Callable[..., Array], *operands: Expression, dtype: DType | None = None, name: str = ""
    ) -> None:
        for other in operands:
            if other.shape != operands[0].shape:
                raise MismatchError(
                    f"{operands[0].summary()!r} has shape {list(operands[0].shape)}, "
                    f"and {other.summary()!r} {list(other.shape)}"
                )
        super().__init__(operands[0].shape, operands[0].dtype if dtype is None else dtype, operands)
        self.function = function
        self.name = name or getattr(function, "__name__", "") or type(function).__name__
        leaves = [id(leaf) for leaf in self.leaves()]
        self._shared = len(set(leaves)) < len(leaves)

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Call the function on a range."""
        import numpy as np

        arrays = [operand.compute(start, stop, work) for operand in self.operands[:1]]
        for operand in self.operands[1:]:
            if self._shared:  # the next operand may reuse this memory
                arrays[-1] = arrays[-1].copy()
            arrays.append(operand.compute(start, stop, work))
        with np.errstate(all="ignore"):
            made = np.asarray(self.function(*arrays))
            if made.shape != (stop - start,):
                raise PlanError(
                    f"the function {self.name!r} returned an array of shape {list(made.shape)} for "
                    f"{stop - start} elements"
                )
            kind = self.dtype.numpy
            return made if made.dtype == kind else made.astype(kind)

    def summary(self) -> str:
        """The function as a call."""
        return f"{self.name}({', '.join(operand.summary() for operand in self.operands)})"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the function's name."""
        return {**super().to_json(), "function": self.name}
