"""Strided views of the contiguous memory of a tensor."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.expressions.base import Expression
from torchparams.io.packing import contiguous
from torchparams.io.reader import gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Work
    from torchparams.info import Location

    Array = np.ndarray[Any, Any]


class Strided(Expression):
    """Strided view of a tensor's contiguous elements, such as a tied part or a transpose.

    A view that is one contiguous run of elements is computed from that run. Any other view keeps the whole tensor in
    memory during the computation, and counts it in `resident`.

    Args:
        x: Base tensor, with elements of at least one byte.
        dtype: Dtype of the view; the bytes are reinterpreted, not cast.
        shape: Shape of the view.
        offset: Offset of the first element, in elements of `dtype`.
        stride: Strides, in elements.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> w = Stored(MemorySource({"w": np.arange(6).reshape(2, 3)}), "w")
    >>> evaluate(Strided(w, w.dtype, (3, 2), 0, (1, 3))).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """

    def __init__(self, x: Expression, dtype: DType, shape: Sequence[int], offset: int, stride: Sequence[int]) -> None:
        super().__init__(shape, dtype, (x,))
        self.offset, self.stride = offset, tuple(stride)
        steps = zip(self.shape, self.stride, contiguous(self.shape), strict=True)
        self._is_run = dtype == x.dtype and all(size == 1 or step == wanted for size, step, wanted in steps)
        if not self._is_run and self.numel:
            self.resident = x.nbytes

    def prepare(self, work: Work) -> Array | None:
        """Bytes of the base tensor; None if the view is a contiguous run."""
        import numpy as np

        if not self.resident:
            return None
        (x,) = self.operands
        out = np.empty(x.numel, x.dtype.numpy)
        at = 0
        for block in work.blocks(x):
            out[at : at + len(block)] = block
            at += len(block)
        return out.view(np.uint8)

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Compute elements from the run, or gather them from the base."""
        import numpy as np

        (x,) = self.operands
        if self._is_run:
            return x.compute(start + self.offset, stop + self.offset, work, into)
        steps = [step * self.dtype.itemsize for step in self.stride]
        view = np.ndarray(
            self.shape, self.dtype.numpy, work.prepared(self).data, self.offset * self.dtype.itemsize, steps
        )
        out = work.scratch(self, 0, stop - start, self.dtype.numpy) if into is None else into
        gather(view, out, start, stop)
        return out

    def spans(self) -> list[Location] | None:
        """File range of the run, if the base is a single file range."""
        (x,) = self.operands
        if self._is_run and self.numel == x.numel:
            return x.spans()
        place = x.place
        if not self._is_run or place is None or not self.numel:
            return [] if not self.numel else None
        begin = place.start + self.offset * self.dtype.itemsize
        return [type(place)(place.file, begin, begin + prod(self.shape) * self.dtype.itemsize)]

    def summary(self) -> str:
        """Summary of the base, marked as a view."""
        return f"a view of {self.operands[0].summary()}"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with dtype, shape, offset and strides."""
        return {
            **super().to_json(),
            "dtype": str(self.dtype),
            "shape": list(self.shape),
            "offset": self.offset,
            "stride": list(self.stride),
        }
