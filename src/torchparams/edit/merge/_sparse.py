"""Combine task vectors, the differences from a base: plain sums, trimmed, randomly dropped, or with sign election."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from torchparams.expressions.combination import Combination

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression, Work

    Array = np.ndarray[Any, Any]

_DIGIT = 16  # bits of the magnitude counted per pass
_DRAWS = 8  # 32-bit random numbers per step of the generator's counter


class TaskVectors(Combination):
    """A base plus the weighted sum of several tensors' differences from it (Ilharco et al. 2022, arXiv:2212.04089).

    The result is `base + scale · Σ weight_i · (tensor_i − base)`. With `elect`, the sum is replaced by the disjoint
    mean of TIES (Yadav et al. 2023, arXiv:2306.01708): for each element, the sign with the larger total magnitude of
    weighted differences is elected (positive on a tie). Only differences of that sign are summed, and the sum is
    divided by the sum of their weights.

    Args:
        base: Base tensor.
        parts: Tuned tensors of the same shape.
        weights: Weight of each tensor; non-negative with `elect`.
        scale: Factor for the sum.
        elect: Whether to elect signs.
        dtype: Dtype of the result; by default, that of the base.
        accumulate: Dtype of the computation: `float32` or `float64`.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> base, a, b = (Stored(MemorySource({"w": np.array(w, np.float32)}), "w") for w in ([1, 1], [3, 2], [2, -2]))
    >>> evaluate(TaskVectors(base, [a, b], [1, 1])), evaluate(TaskVectors(base, [a, b], [1, 1], elect=True))
    (array([ 4., -1.], dtype=float32), array([ 2.5, -2. ], dtype=float32))
    """

    title = "task arithmetic"

    def __init__(
        self,
        base: Expression,
        parts: Sequence[Expression],
        weights: Sequence[float],
        scale: float = 1.0,
        *,
        elect: bool = False,
        dtype: DType | None = None,
        accumulate: str = "float32",
    ) -> None:
        super().__init__((base, *parts), dtype, accumulate)
        self.weights = tuple(float(weight) for _, weight in zip(parts, weights, strict=True))
        self.scale = float(scale)
        self.elect = elect
        self.working = 8 if elect else 4

    def delta(self, i: int, base: Array, start: int, stop: int, work: Work) -> Array:
        """Difference of a range of one tensor from the base, as a writable array."""
        values = self.wide(self.operands[i + 1], 1, start, stop, work)
        values -= base
        return values

    def thin(self, i: int, delta: Array, start: int, work: Work) -> None:
        """Zero, in place, the differences of a tensor that do not count."""
        return  # every difference counts

    def combine(self, start: int, stop: int, work: Work) -> Array:
        """Base plus the sum."""
        import numpy as np

        kind = self.accumulate.numpy.type
        with np.errstate(all="ignore"):
            base = self.wide(self.operands[0], 0, start, stop, work)
            # Each sign has a sum and a sum of weights; without election there is one sum.
            sums = [self._sum(slot, len(base), work) for slot in range(2, 6 if self.elect else 3)]
            for i, weight in enumerate(self.weights):
                delta = self.delta(i, base, start, stop, work)
                self.thin(i, delta, start, work)
                if self.elect:
                    _count(delta, kind(weight), sums, work.scratch(self, 6, len(base), base.dtype))
                    continue
                if weight != 1:
                    delta *= kind(weight)
                sums[0] += delta
            total = _elected(sums, work.scratch(self, 6, len(base), base.dtype)) if self.elect else sums[0]
            if self.scale != 1:
                total *= kind(self.scale)
            total += base
        return total

    def _sum(self, slot: int, count: int, work: Work) -> Array:
        found = work.scratch(self, slot, count, self.accumulate.numpy)
        found.fill(0)
        return found

    def summary(self) -> str:
        """The expression as a call."""
        weights = [f"{weight:g}" for weight in self.weights]
        shown = weights if len(weights) <= 4 else [*weights[:2], "…", weights[-1]]
        return f"{self.title} [{', '.join(shown)}]·{self.called()}"

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the weights."""
        return {
            **super().to_json(),
            "method": self.title,
            "weights": list(self.weights),
            "scale": self.scale,
            "elect": self.elect,
        }


def _count(delta: Array, weight: Any, sums: list[Array], scratch: Array) -> None:
    """Add weighted differences to the sum of their sign, and the weights to its sum of weights."""
    import numpy as np

    positive, negative, of_positive, of_negative = sums
    of_positive += np.multiply(delta > 0, weight, out=scratch)
    of_negative += np.multiply(delta < 0, weight, out=scratch)
    delta *= weight
    # NaN has no sign, and makes both sums NaN.
    positive += np.maximum(delta, 0, out=scratch)
    negative += np.minimum(delta, 0, out=scratch)


def _elected(sums: list[Array], scratch: Array) -> Array:
    """Mean of the elected sign; zero where no difference has it."""
    import numpy as np

    positive, negative, of_positive, of_negative = sums
    up = _bits(np.add(positive, negative, out=scratch) >= 0, scratch)
    _blend(up, positive, negative)
    _blend(up, of_positive, of_negative)
    of_positive += of_positive == 0  # avoids 0/0; the sum is zero or NaN there
    positive /= of_positive
    return positive


# Bit masks: boolean indexing and np.where take ten times as long.
def _bits(mask: Array, scratch: Array) -> Array:
    """All bits set where a mask is true, none elsewhere, stored in `scratch` as integers of the same size."""
    import numpy as np

    found: Array = np.negative(mask.view(np.int8), out=scratch.view(f"i{scratch.itemsize}"))
    return found


def _keep(mask: Array, values: Array, scratch: Array) -> None:
    """Zero values, in place, where a mask is false."""
    values.view(f"i{values.itemsize}")[...] &= _bits(mask, scratch)


def _blend(mask: Array, values: Array, others: Array) -> None:
    """Copy `others` into `values` where the bit mask is unset. `others` is not changed."""
    mine, theirs = values.view(mask.dtype), others.view(mask.dtype)
    mine ^= theirs
    mine &= mask
    mine ^= theirs


class Trimmed(TaskVectors):
    """Task vectors trimmed to the differences of greatest magnitude: the trim step of TIES (arXiv:2306.01708).

    The ⌊density · numel⌋ greatest differences are kept, at least one, and all others equal to the smallest of them.
    Magnitudes are compared in the accumulation dtype. The threshold is exact: it is found by counting the bits of the
    magnitudes, 16 per pass from the highest.

    Args:
        base, parts, weights, scale, elect, dtype, accumulate: See `TaskVectors`.
        densities: Share of the differences to keep, for each tensor: above 0, up to 1.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> base, a = (Stored(MemorySource({"w": np.array(w, np.float32)}), "w") for w in ([0, 0, 0, 0], [1, -4, 2, 3]))
    >>> evaluate(Trimmed(base, [a], [1], densities=[0.5], elect=True))
    array([ 0., -4.,  0.,  3.], dtype=float32)
    """

    title = "ties"

    def __init__(
        self,
        base: Expression,
        parts: Sequence[Expression],
        weights: Sequence[float],
        scale: float = 1.0,
        *,
        densities: Sequence[float],
        elect: bool = False,
        dtype: DType | None = None,
        accumulate: str = "float32",
    ) -> None:
        super().__init__(base, parts, weights, scale, elect=elect, dtype=dtype, accumulate=accumulate)
        self.densities = tuple(densities)

    def prepare(self, work: Work) -> list[Any]:
        """Bits of the smallest magnitude that is kept, for each tensor."""
        import numpy as np

        wanted = [max(int(density * self.numel), 1) for density in self.densities]
        bits = self.accumulate.bits
        prefixes = [0] * len(wanted)
        searched = [i for i, count in enumerate(wanted) if count < self.numel]
        for shift in range(bits - _DIGIT, -1, -_DIGIT) if searched else ():
            counts = {i: _Counts() for i in searched}
            for start, stop in self.pieces(work):
                with np.errstate(all="ignore"):
                    base = self.wide(self.operands[0], 0, start, stop, work)
                    for i in searched:
                        delta = self.delta(i, base, start, stop, work)
                        found = _magnitudes(delta, work.scratch(self, 6, len(delta), delta.dtype))
                        if shift + _DIGIT < bits:
                            found = found[found >> (shift + _DIGIT) == prefixes[i]]
                        counts[i].add((found >> shift).astype(np.uint16))
            for i, counted in counts.items():
                count = counted.finish()
                above = np.cumsum(count[::-1])[::-1]  # for each digit, the count of elements with it or a greater one
                digit = int(np.flatnonzero(above >= wanted[i])[-1])
                wanted[i] -= int(above[digit] - count[digit])
                prefixes[i] = prefixes[i] << _DIGIT | digit
        return [np.dtype(f"u{bits // 8}").type(prefix) for prefix in prefixes]

    def thin(self, i: int, delta: Array, start: int, work: Work) -> None:
        """Zero the differences below the threshold."""
        least = work.prepared(self)[i]
        if least:
            scratch = work.scratch(self, 6, len(delta), delta.dtype)
            _keep(_magnitudes(delta, scratch) >= least, delta, scratch)

    @property
    def footprint(self) -> int:
        """Bytes per element, including magnitudes and digits (counted as 8-byte indices)."""
        return super().footprint + 2 * self.accumulate.itemsize + 10

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with the densities."""
        return {**super().to_json(), "densities": list(self.densities)}


class _Counts:
    """Histogram of digits. Small arrays are collected first: each count costs at least 2^16 steps."""

    def __init__(self) -> None:
        import numpy as np

        self._counts = np.zeros(1 << _DIGIT, np.int64)
        self._waiting: list[Array] = []
        self._size = 0

    def add(self, digits: Array) -> None:
        """Add digits."""
        self._waiting.append(digits)
        self._size += len(digits)
        if self._size >= 4 << _DIGIT:
            self.finish()

    def finish(self) -> Array:
        """Counts, shape (2^16,)."""
        import numpy as np

        if self._waiting:
            found = np.bincount(np.concatenate(self._waiting))
            self._counts[: len(found)] += found
            self._waiting, self._size = [], 0
        return self._counts


def _magnitudes(values: Array, scratch: Array) -> Array:
    """Bits of the magnitudes. As integers they sort like the magnitudes, with NaN last."""
    import numpy as np

    bits = values.view(f"u{values.itemsize}")
    found: Array = np.bitwise_and(bits, bits.dtype.type(np.iinfo(bits.dtype).max >> 1), out=scratch.view(bits.dtype))
    return found


class Dropped(TaskVectors):
    """Task vectors with random drop and rescale: DARE (Yu et al. 2023, arXiv:2311.03099).

    Each difference is kept with probability `density` and divided by `density`; otherwise it is zero. The choice
    depends only on the seed, the index of the tensor among the parts, its name, and the element's index: the random
    numbers are Philox4x64 (Salmon et al. 2011, doi:10.1145/2063384.2063405), keyed by a hash of the first three, with
    the element's index as counter.

    Args:
        base, parts, weights, scale, elect, dtype, accumulate: See `TaskVectors`.
        densities: Probability of keeping a difference, for each tensor: above 0, up to 1.
        seed: Seed of the random numbers.
        name: Name of the tensor.

    >>> import numpy as np
    >>> from torchparams.expressions.base import Stored
    >>> from torchparams.expressions.work import evaluate
    >>> from torchparams.testing import MemorySource
    >>> base, a = (Stored(MemorySource({"w": np.full(6, w, np.float32)}), "w") for w in (1, 2))
    >>> evaluate(Dropped(base, [a], [1], densities=[0.5], seed=0, name="w"))
    array([3., 3., 1., 1., 3., 3.], dtype=float32)
    """

    title = "dare"

    def __init__(
        self,
        base: Expression,
        parts: Sequence[Expression],
        weights: Sequence[float],
        scale: float = 1.0,
        *,
        densities: Sequence[float],
        seed: int,
        name: str,
        elect: bool = False,
        dtype: DType | None = None,
        accumulate: str = "float32",
    ) -> None:
        super().__init__(base, parts, weights, scale, elect=elect, dtype=dtype, accumulate=accumulate)
        self.densities = tuple(densities)
        self.seed, self.name = seed, name
        if self.elect:
            self.title = "dare_ties"

    def thin(self, i: int, delta: Array, start: int, work: Work) -> None:
        """Zero the dropped differences, and rescale the others."""
        density = self.densities[i]
        if density < 1:
            delta /= delta.dtype.type(density)
            mask = kept(density, self.seed, i, self.name, start, start + len(delta))
            _keep(mask, delta, work.scratch(self, 6, len(delta), delta.dtype))

    @property
    def footprint(self) -> int:
        """Bytes per element, including random numbers."""
        return super().footprint + 6

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data, with densities and seed."""
        return {**super().to_json(), "densities": list(self.densities), "seed": self.seed}


def kept(density: float, seed: int, number: int, name: str, start: int, stop: int) -> Array:
    """Mask of the elements `[start, stop)` that DARE keeps: bool, shape (stop - start,).

    Args:
        density: Probability of keeping an element.
        seed: Seed of the random numbers.
        number: Index of the tensor among the parts, from 0.
        name: Name of the tensor.
        start, stop: Range of elements.

    >>> kept(0.5, 0, 0, "w", 0, 6).tolist() == kept(0.5, 0, 0, "w", 0, 4).tolist() + kept(0.5, 0, 0, "w", 4, 6).tolist()
    True
    """
    import numpy as np

    key = hashlib.blake2b(f"{seed}\0{number}\0{name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64), counter=start // _DRAWS)
    first = start % _DRAWS
    raw = generator.random_raw(-(-(first + stop - start) // 2)).astype("<u8", copy=False)
    draws = raw.view("<u4")[first : first + stop - start]
    found: Array = draws < round(density * 2**32)
    return found
