"""Weighted sums in float32, rounded once: the NumPy definition, and the choice of the C kernel.

`NumpySum` (the definition) and `CSum` (the fast path) give equal results, except for the bits of NaN. C is used if the
package was built with a compiler and the environment variable `TORCHPARAMS_KERNELS` is not `numpy`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from torchparams.sketch import native

if native.BUILT:
    from torchparams.sketch import _sums

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from torchparams.dtypes import DType

Array: TypeAlias = "NDArray[Any]"

KINDS = ("bfloat16", "float32")
"""Dtypes of tensors and results, in the numbering of `_sums.c`."""

MOST = 64
"""Maximum number of tensors in a sum."""


def takes(dtypes: Sequence[DType], dtype: DType) -> bool:
    """Whether the kernel supports these dtypes of tensors and result.

    >>> from torchparams.dtypes import DType
    >>> takes([DType.of("BF16"), DType.of("F32")], DType.of("BF16")), takes([DType.of("I8")], DType.of("BF16"))
    (True, False)
    """
    return len(dtypes) <= MOST and all(each in KINDS for each in (*dtypes, dtype))


class NumpySum:
    """NumPy definition.

    Args:
        dtypes: Dtypes of the tensors, from `KINDS`.
        weights: Weight of each tensor, rounded to float32.
        dtype: Dtype of the result, from `KINDS`.

    >>> from torchparams.dtypes import DType
    >>> f32, bf16 = DType.of("F32"), DType.of("BF16")
    >>> out = np.empty(2, bf16.numpy)
    >>> NumpySum([f32, f32], [0.5, 0.25], bf16)([np.ones(2, np.float32), np.full(2, 2, np.float32)], out), out.tolist()
    (0, [1.0, 1.0])
    """

    def __init__(self, dtypes: Sequence[DType], weights: Iterable[float], dtype: DType) -> None:
        self._weights = [np.float32(weight) for weight in weights]
        self._dtype = dtype

    def __call__(self, parts: Sequence[Array], out: Array) -> int:
        """Sum elements, in the order of the tensors.

        Args:
            parts: Contiguous elements of each tensor, equally many.
            out: Array for the results.

        Returns:
            Number of results that are not finite although all elements that they are sums of are.
        """
        with np.errstate(all="ignore"):
            values = [part.astype(np.float32) for part in parts]
            total = values[0] * self._weights[0]
            for value, weight in zip(values[1:], self._weights[1:], strict=True):
                total = total + value * weight
            out[...] = total.astype(self._dtype.numpy)
            over = ~np.isfinite(out.astype(np.float32))
            for value in values if over.any() else ():
                over &= np.isfinite(value)
            return int(np.count_nonzero(over))


class CSum(NumpySum):
    """C kernel: several times faster, and releases the GIL."""

    def __init__(self, dtypes: Sequence[DType], weights: Iterable[float], dtype: DType) -> None:
        super().__init__(dtypes, weights, dtype)
        self._kind = KINDS.index(dtype)
        self._kinds = [KINDS.index(each) for each in dtypes]

    def __call__(self, parts: Sequence[Array], out: Array) -> int:
        """Sum elements; see `NumpySum`."""
        given = tuple(
            ((part if part.flags.aligned else part.copy()).view(np.uint8), kind, float(weight))
            for part, kind, weight in zip(parts, self._kinds, self._weights, strict=True)
        )
        return _sums.weighted(out.view(np.uint8), self._kind, given)


def weighted_sum(dtypes: Sequence[DType], weights: Iterable[float], dtype: DType) -> NumpySum:
    """Create a weighted sum, in C if available."""
    return (CSum if native.uses_c() else NumpySum)(dtypes, weights, dtype)
