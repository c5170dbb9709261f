"""What all combinations of tensors share: floats of one shape, widened, computed with, and rounded once at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.edit._casts import cast, losses, reaches_infinity, widen
from torchparams.edit.expressions import Expression
from torchparams.errors import MismatchError, PlanError
from torchparams.report import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from torchparams.edit.work import Work

    Array = np.ndarray[Any, Any]

NEITHER = "float8_e8m0fnu"
"""The one float type that nothing is computed in: it has neither a sign nor a zero."""


def combines(dtype: DType) -> bool:
    """Whether tensors of a type can be averaged: floats that numpy or ml_dtypes has.

    >>> combines(DType.of("bfloat16")), combines(DType.of("int8"))
    (True, False)
    """
    return dtype.kind == "float" and dtype.numpy_name is not None and dtype != NEITHER


def check_floats(parts: Sequence[Expression]) -> None:
    """Refuse what cannot be averaged.

    Raises:
        PlanError: A tensor holds no floats.
    """
    for part in parts:
        if not combines(part.dtype):
            raise PlanError(f"a weighted sum is of floats, not of {part.dtype}", where=part.summary())


class Combination(Expression):
    """Tensors of one shape, combined element by element in float32 or float64.

    Args:
        parts: The tensors.
        dtype: The result's type; that of the first unless given.
        accumulate: `float32` or `float64`: the type that everything is computed in.
        allow_overflow: Accept results that are finite, and infinite in the result's type.

    Raises:
        MismatchError: Their shapes differ.
        PlanError: A tensor holds no floats.
    """

    working = 2
    """Numbers of the type that is computed in that are held for an element, the result's before rounding included."""

    def __init__(
        self,
        parts: Sequence[Expression],
        dtype: DType | None = None,
        accumulate: str = "float32",
        *,
        allow_overflow: bool = False,
    ) -> None:
        for part in parts:
            if part.shape != parts[0].shape:
                raise MismatchError(
                    f"{parts[0].summary()} has shape {list(parts[0].shape)}, and {part.summary()} {list(part.shape)}"
                )
        check_floats(parts)
        super().__init__(parts[0].shape, parts[0].dtype if dtype is None else dtype, tuple(parts))
        self.accumulate = DType.of(accumulate)
        self.allow_overflow = allow_overflow

    def wide(self, part: Expression, start: int, stop: int, work: Work) -> Array:
        """Elements of a part in the type that is computed in: a copy, which may be written to."""
        values = part.compute(start, stop, work)
        if self.accumulate == "float32":
            return widen(values, part.dtype)
        return values.astype(self.accumulate.numpy)

    def narrow(self, total: Array) -> Array:
        """The result, rounded.

        Raises:
            PlanError: What is finite would become infinite.
        """
        out = cast(total, self.accumulate, self.dtype)
        if not self.allow_overflow and reaches_infinity(total, self.accumulate, self.dtype):
            over = losses(total, out, self.accumulate, self.dtype).overflow
            if over:
                raise PlanError(
                    f"{plural(over, 'value')} of it or more {'is' if over == 1 else 'are'} too large for {self.dtype}",
                    where=self.operands[0].summary(),
                    exists="nothing was written",
                    hint="choose a wider dtype, or pass allow_overflow=True (--allow-overflow)",
                )
        return out

    def called(self) -> str:
        """The operands' summary, where all have the same; else their summaries."""
        names = list(dict.fromkeys(part.summary() for part in self.operands))
        return ", ".join(names if len(names) <= 4 else [*names[:2], "…", names[-1]])

    @property
    def footprint(self) -> int:
        """The operands, the numbers that are computed with, and the result."""
        held = sum(part.footprint for part in self.operands)
        return held + (self.working + 1) * self.accumulate.itemsize + max(self.dtype.itemsize, 4)

    def to_json(self) -> dict[str, Any]:
        """With the type that it is computed in."""
        return {**super().to_json(), "accumulate": str(self.accumulate)}
