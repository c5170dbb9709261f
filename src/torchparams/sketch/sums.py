"""Weighted sums of tensors, in float32 and rounded once: in NumPy, and the choice between that and the same in C.

`NumpySum` (the definition) and `CSum` (the fast path) give equal results for equal data, but for which of several NaN a
NaN is. C is used where the package was built with a compiler, unless the environment variable `TORCHPARAMS_KERNELS` is
`numpy`.
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
"""Types of tensors and results, in the order of the numbers that `_sums.c` gives them."""

MOST = 64
"""Tensors of one sum."""


def takes(dtypes: Sequence[DType], dtype: DType) -> bool:
    """Whether the kernel sums tensors of these types to one of that.

    >>> from torchparams.dtypes import DType
    >>> takes([DType.of("BF16"), DType.of("F32")], DType.of("BF16")), takes([DType.of("I8")], DType.of("BF16"))
    (True, False)
    """
    return len(dtypes) <= MOST and all(each in KINDS for each in (*dtypes, dtype))


class NumpySum:
    """The definition.

    Args:
        dtypes: The tensors' types, of `KINDS`.
        weights: A number for each, which is rounded to float32.
        dtype: The result's type, of `KINDS`.

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
            parts: Of each tensor, as many elements, contiguous.
            out: Where the results go.

        Returns:
            How many results are finite in float32 and not in the result's type.
        """
        with np.errstate(all="ignore"):
            total = parts[0].astype(np.float32) * self._weights[0]
            for part, weight in zip(parts[1:], self._weights[1:], strict=True):
                total = total + part.astype(np.float32) * weight
            out[...] = total.astype(self._dtype.numpy)
            return int(np.count_nonzero(np.isfinite(total) & ~np.isfinite(out.astype(np.float32))))


class CSum(NumpySum):
    """The same in C, several times as fast, with the global interpreter lock released."""

    def __init__(self, dtypes: Sequence[DType], weights: Iterable[float], dtype: DType) -> None:
        super().__init__(dtypes, weights, dtype)
        self._kind = KINDS.index(dtype)
        self._kinds = [KINDS.index(each) for each in dtypes]

    def __call__(self, parts: Sequence[Array], out: Array) -> int:
        """As that of the definition."""
        given = tuple(
            ((part if part.flags.aligned else part.copy()).view(np.uint8), kind, float(weight))
            for part, kind, weight in zip(parts, self._kinds, self._weights, strict=True)
        )
        return _sums.weighted(out.view(np.uint8), self._kind, given)


def weighted_sum(dtypes: Sequence[DType], weights: Iterable[float], dtype: DType) -> NumpySum:
    """What sums, in C where that is in use."""
    return (CSum if native.uses_c() else NumpySum)(dtypes, weights, dtype)
