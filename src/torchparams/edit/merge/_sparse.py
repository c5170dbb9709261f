"""Task vectors, what fine-tuning has added to a base: summed as they are, thinned out, or with their signs elected."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from torchparams.expressions.combination import Combination

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression
    from torchparams.expressions.work import Work

    Array = np.ndarray[Any, Any]

_DIGIT = 16  # bits of a magnitude that are counted in one pass
_DRAWS = 8  # random numbers of 32 bits that one step of the generator's counter gives


class TaskVectors(Combination):
    """A base, and the sum of what each of several tensors differs from it: Ilharco et al. 2022, arXiv:2212.04089.

    `base + scale · Σ weight_i · (tensor_i − base)`. With `elect`, the sum is the disjoint mean of TIES (Yadav et al.
    2023, arXiv:2306.01708) instead: of each element, only differences of one sign count, the one under which the
    weighted differences add up to the greater magnitude (positive where both do alike), and their sum is divided by
    the sum of their weights.

    Args:
        base: The base.
        parts: The tensors, of its shape.
        weights: A number for each; with `elect`, none below zero.
        scale: What their sum is multiplied by.
        elect: Whether signs are elected.
        dtype: The result's type; that of the base unless given.
        accumulate: `float32` or `float64`: the type that everything is computed in.

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
        """What elements of a part differ from the base by: an array that may be written to."""
        values = self.wide(self.operands[i + 1], 1, start, stop, work)
        values -= base
        return values

    def thin(self, i: int, delta: Array, start: int, work: Work) -> None:
        """Set to zero, in place, what is not to count of the differences of a part."""
        return  # all counts

    def combine(self, start: int, stop: int, work: Work) -> Array:
        """The base and the sum."""
        import numpy as np

        kind = self.accumulate.numpy.type
        with np.errstate(all="ignore"):
            base = self.wide(self.operands[0], 0, start, stop, work)
            # Of each sign, the sum and that of the weights; without an election, one sum of all.
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
        """As a call."""
        weights = [f"{weight:g}" for weight in self.weights]
        shown = weights if len(weights) <= 4 else [*weights[:2], "…", weights[-1]]
        return f"{self.title} [{', '.join(shown)}]·{self.called()}"

    def to_json(self) -> dict[str, Any]:
        """With the weights."""
        return {
            **super().to_json(),
            "method": self.title,
            "weights": list(self.weights),
            "scale": self.scale,
            "elect": self.elect,
        }


def _count(delta: Array, weight: Any, sums: list[Array], scratch: Array) -> None:
    """Add weighted differences to the sum of their sign, and the weight to the sum of its weights."""
    import numpy as np

    positive, negative, of_positive, of_negative = sums
    of_positive += np.multiply(delta > 0, weight, out=scratch)
    of_negative += np.multiply(delta < 0, weight, out=scratch)
    delta *= weight
    # A NaN is of neither sign, and becomes one of both sums.
    positive += np.maximum(delta, 0, out=scratch)
    negative += np.minimum(delta, 0, out=scratch)


def _elected(sums: list[Array], scratch: Array) -> Array:
    """The mean of those of the greater sum; zero where there are none."""
    import numpy as np

    positive, negative, of_positive, of_negative = sums
    up = _bits(np.add(positive, negative, out=scratch) >= 0, scratch)
    _choose(up, positive, negative)
    _choose(up, of_positive, of_negative)
    of_positive += of_positive == 0  # there the sum is zero, or NaN
    positive /= of_positive
    return positive


# Masks of all bits, for what indexing by bools and np.where do in ten times as long.
def _bits(mask: Array, scratch: Array) -> Array:
    """All bits where a mask holds, none elsewhere, in the memory of `scratch`: integers of its elements' size."""
    import numpy as np

    found: Array = np.negative(mask.view(np.int8), out=scratch.view(f"i{scratch.itemsize}"))
    return found


def _keep(mask: Array, values: Array, scratch: Array) -> None:
    """Set to zero, in place, where a mask does not hold."""
    values.view(f"i{values.itemsize}")[...] &= _bits(mask, scratch)


def _choose(mask: Array, values: Array, others: Array) -> None:
    """Put others in the place of values, bit by bit, where a mask of all bits has none; the others stay."""
    mine, theirs = values.view(mask.dtype), others.view(mask.dtype)
    mine ^= theirs
    mine &= mask
    mine ^= theirs


class Trimmed(TaskVectors):
    """Of each tensor's differences, only those of the greatest magnitude: the trim of TIES, arXiv:2306.01708.

    Kept are the ⌊density · numel⌋ greatest, at least one, and all others that are as great as the least of them.
    Magnitudes are those in the type that is computed in; the threshold among them is exact. It is found by counting
    the magnitudes' bits, 16 at a time from the highest, in as many passes.

    Args:
        base, parts, weights, scale, elect, dtype, accumulate: See `TaskVectors`.
        densities: For each part, the share of its differences that is kept: above 0, up to 1.

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
        """The bits of the least magnitude that is kept, of each part."""
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
                above = np.cumsum(count[::-1])[::-1]  # of each digit, how many have it or a greater one
                digit = int(np.flatnonzero(above >= wanted[i])[-1])
                wanted[i] -= int(above[digit] - count[digit])
                prefixes[i] = prefixes[i] << _DIGIT | digit
        return [np.dtype(f"u{bits // 8}").type(prefix) for prefix in prefixes]

    def thin(self, i: int, delta: Array, start: int, work: Work) -> None:
        """Zero what is below the threshold."""
        least = work.prepared(self)[i]
        if least:
            scratch = work.scratch(self, 6, len(delta), delta.dtype)
            _keep(_magnitudes(delta, scratch) >= least, delta, scratch)

    @property
    def footprint(self) -> int:
        """With the magnitudes and their digits, which are counted as indices of 8 bytes."""
        return super().footprint + 2 * self.accumulate.itemsize + 10

    def to_json(self) -> dict[str, Any]:
        """With the densities."""
        return {**super().to_json(), "densities": list(self.densities)}


class _Counts:
    """How often each digit comes. Few are kept waiting for more: one count costs as much as there are digits."""

    def __init__(self) -> None:
        import numpy as np

        self._counts = np.zeros(1 << _DIGIT, np.int64)
        self._waiting: list[Array] = []
        self._size = 0

    def add(self, digits: Array) -> None:
        """Count some."""
        self._waiting.append(digits)
        self._size += len(digits)
        if self._size >= 4 << _DIGIT:
            self.finish()

    def finish(self) -> Array:
        """The counts, shape (2^16,)."""
        import numpy as np

        if self._waiting:
            found = np.bincount(np.concatenate(self._waiting))
            self._counts[: len(found)] += found
            self._waiting, self._size = [], 0
        return self._counts


def _magnitudes(values: Array, scratch: Array) -> Array:
    """The bits of the magnitudes: as integers they are in the order of the magnitudes, NaN above all."""
    import numpy as np

    bits = values.view(f"u{values.itemsize}")
    found: Array = np.bitwise_and(bits, bits.dtype.type(np.iinfo(bits.dtype).max >> 1), out=scratch.view(bits.dtype))
    return found


class Dropped(TaskVectors):
    """Of each tensor's differences, a random part, made up for by the rest: DARE, Yu et al. 2023, arXiv:2311.03099.

    Each difference is kept with the probability `density` and divided by it, or else set to zero. Which are kept
    depends on the seed, the part's number, the tensor's name and the element's place alone: the numbers are those of
    Philox4x64 (Salmon et al. 2011, doi:10.1145/2063384.2063405), whose key is a hash of the first three and whose
    counter begins at the place.

    Args:
        base, parts, weights, scale, elect, dtype, accumulate: See `TaskVectors`.
        densities: For each part, the probability that a difference is kept: above 0, up to 1.
        seed: Seed of the random numbers.
        name: The tensor's name.

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
        """Zero some, and divide the others."""
        density = self.densities[i]
        if density < 1:
            delta /= delta.dtype.type(density)
            mask = kept(density, self.seed, i, self.name, start, start + len(delta))
            _keep(mask, delta, work.scratch(self, 6, len(delta), delta.dtype))

    @property
    def footprint(self) -> int:
        """With the random numbers."""
        return super().footprint + 6

    def to_json(self) -> dict[str, Any]:
        """With the densities and the seed."""
        return {**super().to_json(), "densities": list(self.densities), "seed": self.seed}


def kept(density: float, seed: int, number: int, name: str, start: int, stop: int) -> Array:
    """Which of the elements `[start, stop)` of a tensor DARE keeps: bools, shape (stop - start,).

    Args:
        density: The probability of each.
        seed: Of the random numbers.
        number: That of the part, from 0.
        name: The tensor's name.
        start, stop: The elements.

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
