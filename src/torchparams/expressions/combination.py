"""Base class of combinations: floats of equal shape, widened, combined, and rounded once."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.errors import MismatchError, PlanError
from torchparams.expressions.base import Expression
from torchparams.expressions.casts import Losses, cast, losses, reaches_infinity, widen

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from torchparams.expressions.base import Work

    Array = np.ndarray[Any, Any]

PIECE = 1 << 18
"""Elements computed per step. Smaller steps lose time to passing the GIL between threads."""

_DIRECT = ("float32", "bfloat16", "float16")  # NumPy rounds float32 to these like torch

NEITHER = "float8_e8m0fnu"
"""The only float dtype without arithmetic: it has no sign and no zero."""


def combines(dtype: DType) -> bool:
    """Whether tensors of a dtype can be combined: floats that NumPy or ml_dtypes supports.

    >>> combines(DType.of("bfloat16")), combines(DType.of("int8"))
    (True, False)
    """
    return dtype.kind == "float" and dtype.numpy_name is not None and dtype != NEITHER


def check_floats(parts: Sequence[Expression]) -> None:
    """Check that all tensors are floats.

    Raises:
        PlanError: A tensor is not floating-point.
    """
    for part in parts:
        if not combines(part.dtype):
            raise PlanError(f"a weighted sum needs floating-point tensors, not {part.dtype}", where=part.summary())


class Combination(Expression):
    """Elementwise combination of tensors of equal shape, in float32 or float64.

    Results that are not finite although all operands are, and those that overflow in the dtype of the result, are
    counted as overflow; only writing raises an error.

    Args:
        parts: Tensors to combine.
        dtype: Dtype of the result; by default, that of the first tensor.
        accumulate: Dtype of the computation: `float32` or `float64`.

    Raises:
        MismatchError: The shapes differ.
        PlanError: A tensor is not floating-point.
    """

    working = 2
    """Number of accumulation values held per element, including the result before rounding."""

    def __init__(
        self,
        parts: Sequence[Expression],
        dtype: DType | None = None,
        accumulate: str = "float32",
    ) -> None:
        for part in parts:
            if part.shape != parts[0].shape:
                raise MismatchError(
                    f"{parts[0].summary()!r} has shape {list(parts[0].shape)}, "
                    f"and {part.summary()!r} {list(part.shape)}"
                )
        check_floats(parts)
        super().__init__(parts[0].shape, parts[0].dtype if dtype is None else dtype, tuple(parts))
        self.accumulate = DType.of(accumulate)

    @abstractmethod
    def combine(self, start: int, stop: int, work: Work) -> Array:
        """Compute elements `[start, stop)` in the accumulation dtype."""

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute elements in pieces, each rounded once."""
        import numpy as np

        out = work.scratch(self, -1, stop - start, self.dtype.numpy) if into is None else into
        for at in range(start, stop, PIECE):
            end = min(at + PIECE, stop)
            total = self.combine(at, end, work)
            lost = self.narrow(total, out[at - start : end - start])
            with np.errstate(all="ignore"):
                rest = np.add.reduce(total)  # finite only if all elements are
            if not np.isfinite(rest):
                odd = ~np.isfinite(total)
                lost += Losses(overflow=int(np.count_nonzero(odd & self.finite(at, end, work))) if odd.any() else 0)
            work.count(self, lost)
        return out

    def finite(self, start: int, stop: int, work: Work) -> Array:
        """Whether all that elements `[start, stop)` are computed from is finite; bool, shape (stop - start,)."""
        import numpy as np

        found = np.ones(stop - start, np.bool_)
        for part in self.operands:
            found &= np.isfinite(self.wide(part, 0, start, stop, work))
        return found

    def pieces(self, work: Work) -> Iterator[tuple[int, int]]:
        """Ranges that cover all elements, in order, for passes over the whole tensor."""
        step = max(min(PIECE, work.block) // self.granule, 1) * self.granule
        for start in range(0, self.numel, step):
            yield start, min(start + step, self.numel)

    def wide(self, part: Expression, slot: int, start: int, stop: int, work: Work) -> Array:
        """Elements of an operand in the accumulation dtype, in writable memory of `work`."""
        import numpy as np

        values = part.compute(start, stop, work)
        out = work.scratch(self, slot, stop - start, self.accumulate.numpy)
        if self.accumulate == "float32":
            return widen(values, part.dtype, out)
        with np.errstate(all="ignore"):
            np.copyto(out, values, casting="unsafe")
        return out

    def narrow(self, total: Array, out: Array) -> Losses:
        """Round the result, and count finite values that become infinite."""
        import numpy as np

        if self.dtype in _DIRECT and self.accumulate == "float32":
            with np.errstate(all="ignore"):
                np.copyto(out, total, casting="unsafe")
        else:
            out[...] = cast(total, self.accumulate, self.dtype)
        if not reaches_infinity(total, self.accumulate, self.dtype):
            return Losses()
        return Losses(overflow=losses(total, out, self.accumulate, self.dtype).overflow)

    def called(self) -> str:
        """Summary of the operands, without repetitions."""
        names = list(dict.fromkeys(part.summary() for part in self.operands))
        return ", ".join(names if len(names) <= 4 else [*names[:2], "…", names[-1]])

    @property
    def footprint(self) -> int:
        """Bytes per element: operands, accumulation and result."""
        held = sum(part.footprint for part in self.operands)
        return held + (self.working + 1) * self.accumulate.itemsize + max(self.dtype.itemsize, 4)

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the accumulation dtype."""
        return {**super().to_json(), "accumulate": str(self.accumulate)}
