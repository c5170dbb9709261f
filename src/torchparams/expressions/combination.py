"""What all combinations of tensors share: floats of one shape, widened, computed with, and rounded once at the end."""

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

    from torchparams.expressions.work import Work

    Array = np.ndarray[Any, Any]

PIECE = 1 << 18
"""Elements that are computed at once. With fewer, threads spend their time on handing each other the GIL."""

_DIRECT = ("float32", "bfloat16", "float16")  # types that numpy rounds to as torch does, from float32

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

    Results that are finite, and infinite in the result's type, are counted; only writing refuses them.

    Args:
        parts: The tensors.
        dtype: The result's type; that of the first unless given.
        accumulate: `float32` or `float64`: the type that everything is computed in.

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
    ) -> None:
        for part in parts:
            if part.shape != parts[0].shape:
                raise MismatchError(
                    f"{parts[0].summary()} has shape {list(parts[0].shape)}, and {part.summary()} {list(part.shape)}"
                )
        check_floats(parts)
        super().__init__(parts[0].shape, parts[0].dtype if dtype is None else dtype, tuple(parts))
        self.accumulate = DType.of(accumulate)

    @abstractmethod
    def combine(self, start: int, stop: int, work: Work) -> Array:
        """Elements `[start, stop)` of the result in the type that is computed in."""

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """The elements, piece by piece, each rounded once."""
        out = work.scratch(self, -1, stop - start, self.dtype.numpy) if into is None else into
        for at in range(start, stop, PIECE):
            end = min(at + PIECE, stop)
            work.count(self, self.narrow(self.combine(at, end, work), out[at - start : end - start]))
        return out

    def pieces(self, work: Work) -> Iterator[tuple[int, int]]:
        """First and last place of pieces of all elements, in order: for what has to see them all first."""
        step = max(min(PIECE, work.block) // self.granule, 1) * self.granule
        for start in range(0, self.numel, step):
            yield start, min(start + step, self.numel)

    def wide(self, part: Expression, slot: int, start: int, stop: int, work: Work) -> Array:
        """Elements of a part in the type that is computed in, in a memory of `work` that may be written to."""
        import numpy as np

        values = part.compute(start, stop, work)
        out = work.scratch(self, slot, stop - start, self.accumulate.numpy)
        if self.accumulate == "float32":
            return widen(values, part.dtype, out)
        with np.errstate(all="ignore"):
            np.copyto(out, values, casting="unsafe")
        return out

    def narrow(self, total: Array, out: Array) -> Losses:
        """Round the result, and count the finite numbers that become infinite."""
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
