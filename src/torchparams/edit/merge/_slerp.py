"""Spherical interpolation of two tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torchparams.expressions.combination import Combination

if TYPE_CHECKING:
    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression, Work

    Array = np.ndarray[Any, Any]

TILE = 4096
"""Elements per partial sum. NumPy sums each tile; the sums of tiles are added exactly. Tiles are counted from the
first element, so sums do not depend on the blocks of a read."""

STRAIGHT = 1e-3
"""Sine of the angle below which linear interpolation replaces the arc.

For nearly parallel tensors, both agree to float32 precision. For opposite tensors, the arc is undefined.
"""


class Slerp(Combination):
    """Spherical interpolation at `t` between two tensors (Shoemake 1985, doi:10.1145/325334.325242).

    A tensor is treated as one vector. With ω the angle between the two, the result is `sin((1 − t)ω)/sin ω · a +
    sin(tω)/sin ω · b`. A first pass computes the norms and the dot product in float64. If a norm is zero or not finite,
    or the vectors are parallel or opposite (`sin ω < 0.001`), the result is `(1 − t)·a + t·b`.

    Args:
        a, b: Tensors of the same shape.
        t: Position: 0 gives the first tensor, 1 the second.
        dtype: Dtype of the result; by default, that of the first tensor.
        accumulate: Dtype of the computation: `float32` or `float64`.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> a, b = (Stored(MemorySource({"w": np.array(w, np.float32)}), "w") for w in ([1, 0], [0, 1]))
    >>> evaluate(Slerp(a, b, 0.5))
    array([0.70710677, 0.70710677], dtype=float32)
    """

    granule = TILE

    def __init__(
        self,
        a: Expression,
        b: Expression,
        t: float,
        dtype: DType | None = None,
        accumulate: str = "float32",
    ) -> None:
        super().__init__((a, b), dtype, accumulate)
        self.t = float(t)

    def prepare(self, work: Work) -> tuple[float, float]:
        """Factors of the two tensors."""
        import numpy as np

        a, b = self.operands
        sums: tuple[list[float], list[float], list[float]] = ([], [], [])
        with np.errstate(all="ignore"):
            for start, stop in self.pieces(work):
                x, y, product = (work.scratch(self, slot, stop - start, np.dtype(np.float64)) for slot in (2, 3, 4))
                np.copyto(x, self.wide(a, 0, start, stop, work))
                np.copyto(y, self.wide(b, 1, start, stop, work))
                for found, left, right in zip(sums, (x, y, x), (x, y, y), strict=True):
                    found += _tiles(np.multiply(left, right, out=product))
        aa, bb, ab = (_total(found) for found in sums)
        return arc(aa, bb, ab, self.t)

    def combine(self, start: int, stop: int, work: Work) -> Array:
        """Sum of the scaled tensors."""
        import numpy as np

        kind = self.accumulate.numpy.type
        with np.errstate(all="ignore"):
            total, other = (self.wide(part, slot, start, stop, work) for slot, part in enumerate(self.operands))
            for values, factor in zip((total, other), work.prepared(self), strict=True):
                values *= kind(factor)
            total += other
        return total

    @property
    def footprint(self) -> int:
        """Bytes per element, including float64 products."""
        return super().footprint + 24

    def summary(self) -> str:
        """The expression as a call."""
        return f"slerp({self.called()}, t={self.t:g})"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with `t`."""
        return {**super().to_json(), "t": self.t}


def arc(aa: float, bb: float, ab: float, t: float) -> tuple[float, float]:
    """Factors of the interpolation at `t`, from the products a·a, b·b and a·b.

    >>> arc(1.0, 1.0, 0.0, 0.5)
    (0.7071067811865475, 0.7071067811865475)
    >>> arc(1.0, 4.0, 2.0, 0.25)
    (0.75, 0.25)
    """
    norms = math.sqrt(aa) * math.sqrt(bb)
    if 0 < norms < math.inf and math.isfinite(ab):
        omega = math.acos(min(max(ab / norms, -1.0), 1.0))
        if math.sin(omega) >= STRAIGHT:
            return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
    return 1 - t, t


def _tiles(products: Array) -> list[float]:
    """Sum of each tile of a block."""
    whole = len(products) - len(products) % TILE
    found: list[float] = products[:whole].reshape(-1, TILE).sum(axis=1).tolist()
    if whole < len(products):
        found.append(float(products[whole:].sum()))
    return found


def _total(sums: list[float]) -> float:
    try:
        return math.fsum(sums)
    except (OverflowError, ValueError):  # infinities of both signs, or overflow
        return math.nan
