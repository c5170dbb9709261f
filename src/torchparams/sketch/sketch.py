"""Sketches: all elementwise statistics of a tensor, in an object that supports addition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from torchparams.dtypes import DType
from torchparams.errors import FileFormatError, MismatchError
from torchparams.sketch.blocks import byte_blocks
from torchparams.sketch.codes import Coding, count_of
from torchparams.sketch.counter import Counter
from torchparams.sketch.distribution import histogram, quantiles
from torchparams.sketch.exact import ratio, root
from torchparams.sketch.form import VERSION, counted_of, form_of
from torchparams.sketch.kernels import UNIT, Array, Counted, merge_counts


class Sketch:
    """Counts of the values of one or more tensors, by bit pattern.

    Sketches of one dtype **add**: `a + b` is the sketch of the elements of both. Addition is associative and
    commutative, `Sketch.empty(dtype)` is its identity, and everything is exact. Two sketches of the same elements are
    equal, however the elements were split, ordered, merged or distributed over threads.

    For dtypes of at most 16 bits, all statistics are exact, because every pattern is counted. For wider dtypes, *codes*
    are counted: sign, exponent and 7 bits of mantissa (for float32, the top 16 bits; integers below 256 have their own
    code). Minimum, maximum, the counts of zeros, NaN and ±Inf, and the sums of values, magnitudes and squares are exact
    for every dtype. So only `quantile`, `histogram`, `entropy` and `distinct` can be approximate; their docstrings give
    the error.

    Means, sums, norms, quantiles and histograms cover the **finite** values; `min` and `max` cover all but NaN.
    Statistics of nothing are NaN. -0.0 counts as zero.

    A complex element counts as two values, its real and imaginary part, because complex numbers have no order or sign.

    Create one with `Sketch.of`, `Sketch.of_bytes`, or a `Builder`.

    Attributes:
        dtype: Dtype of the elements.
        codes: Codes that occur, ascending: uint16, for float64 uint32.
        counts: Number of values of each code: uint32, or uint64 if needed.

    >>> import numpy as np
    >>> a, b = Sketch.of(np.array([1, 2], np.float16)), Sketch.of(np.array([3, np.inf], np.float16))
    >>> both = a + b
    >>> both.numel, both.mean, both.max, both.posinf
    (4, 2.0, inf, 1)
    """

    __slots__ = (
        "_coding",
        "_derived",
        "_max",
        "_min",
        "_neginf",
        "_posinf",
        "_sums",
        "_total",
        "_zeros",
        "codes",
        "counts",
        "dtype",
    )

    dtype: DType
    codes: Array
    counts: Array

    def __init__(self, dtype: object, counted: Counted) -> None:
        self.dtype = DType.of(dtype)
        self._coding = Coding.of(self.dtype)
        self.codes = _frozen(counted.codes, np.uint32 if self._coding.kind == "f64" else np.uint16)
        self._total = int(counted.counts.sum(dtype=np.uint64))  # number of values: two per complex element
        small = self._total < 1 << 32 or int(counted.counts.max()) < 1 << 32
        self.counts = _frozen(counted.counts, np.uint32 if small else np.uint64)
        self._zeros, self._posinf, self._neginf = counted.zeros, counted.posinf, counted.neginf
        self._min, self._max = counted.min, counted.max
        self._sums: tuple[int, int, int] | None = (counted.sum, counted.abs, counted.square)
        self._derived: dict[str, Any] = {}
        if self._coding.exact:
            self._sums = None  # computed on demand: many sketches are only added
            found = self._coding.extremes(self.codes, self.counts)
            self._zeros, self._posinf, self._neginf, self._min, self._max = found

    # --- constructors ----------------------------------------------------------------------

    @classmethod
    def empty(cls, dtype: object) -> Sketch:
        """The sketch of no elements, the identity of `+`.

        Raises:
            NotReadable: The dtype is packed or quantised, so its bits are not numbers.

        >>> Sketch.empty("bfloat16").numel
        0
        """
        return cls(dtype, Counted(np.zeros(0, np.uint32), np.zeros(0, np.uint64)))

    @classmethod
    def of(cls, array: Array) -> Sketch:
        """The sketch of an array of any shape and layout. It is read in blocks, never copied as a whole.

        Args:
            array: NumPy array, of a dtype of NumPy or ml_dtypes.

        Raises:
            NotReadable: The dtype is packed or quantised, so its bits are not numbers.
            TorchParamsError: The dtype is unknown.

        >>> Sketch.of(np.arange(6, dtype=np.int64).reshape(2, 3).T).std()
        1.8708286933869707
        """
        counter = Counter(array.dtype)
        for block in byte_blocks(array):
            counter.update(block)
        return cls(counter.dtype, counter.finish())

    @classmethod
    def of_bytes(cls, data: Any, dtype: object, numel: int | None = None) -> Sketch:
        """The sketch of contiguous little-endian elements, as stored in a file.

        Args:
            data: Buffer of bytes.
            dtype: Dtype of the elements. Sub-byte elements are packed: the first of two 4-bit elements in the low half
                of a byte; four 6-bit elements in three bytes, the first in the lowest bits.
            numel: Number of elements; only needed if the last byte of packed elements is not full.

        >>> Sketch.of_bytes(bytes([0x21]), "float4_e2m1fn").max  # patterns 1 and 2: 0.5 and 1.0
        1.0
        """
        counter = Counter(dtype, packed=True)
        counter.update(data, numel)
        return cls(counter.dtype, counter.finish())

    @classmethod
    def merge(cls, sketches: Iterable[Sketch], dtype: object | None = None) -> Sketch:
        """Sum of many sketches, faster than repeated addition.

        Args:
            sketches: Sketches of one dtype, or of several if `dtype` is given.
            dtype: Dtype of the sum. `float64` accepts all dtypes; see `widen`.

        Raises:
            MismatchError: The sketches have different dtypes; or there are none, and no `dtype`.

        >>> Sketch.merge([Sketch.of(np.ones(2, np.float16)), Sketch.of(np.ones(3, np.float32))], "float64").l1
        5.0
        """
        parts = list(sketches)
        if dtype is None:
            if not parts:
                raise MismatchError("no sketches to merge", hint="pass dtype= for an empty sketch")
            dtype = parts[0].dtype
        wanted = DType.of(dtype)
        if wanted == "float64":
            parts = [part.widen() for part in parts]
        for part in parts:
            if part.dtype != wanted:
                raise MismatchError(
                    f"cannot add a sketch of {part.dtype} to one of {wanted}",
                    hint='merge them as Sketch.merge(sketches, "float64")',
                )
        if not parts:
            return cls.empty(wanted)
        codes, counts = merge_counts([(part.codes, part.counts) for part in parts])
        if parts[0]._coding.exact:
            return cls(wanted, Counted(codes, counts))
        lows = [part._min for part in parts if part._min is not None]
        highs = [part._max for part in parts if part._max is not None]
        sums = [part.sums for part in parts]
        return cls(
            wanted,
            Counted(
                codes,
                counts,
                sum(part._zeros for part in parts),
                sum(part._posinf for part in parts),
                sum(part._neginf for part in parts),
                min(lows, default=None),
                max(highs, default=None),
                *(sum(column) for column in zip(*sums, strict=True)),
            ),
        )

    def __add__(self, other: object) -> Sketch:
        if not isinstance(other, Sketch):
            return NotImplemented
        return Sketch.merge([self, other])

    def widen(self) -> Sketch:
        """Convert to a sketch of float64, which can be added to any other widened sketch.

        Counts, sums, minimum and maximum stay exact (64-bit integer extremes are rounded to float64). Codes of float64
        keep 7 bits of mantissa, so quantiles of exact dtypes become approximate.

        >>> Sketch.of(np.array([1, 2, 4], np.int8)).widen().mean == 7 / 3
        True
        """
        if self.dtype == "float64":
            return self
        codes, counts = self._coding.widened(self.codes, self.counts)
        shift = self._coding.unit - UNIT["f64"]
        total, magnitudes, squares = self.sums
        return Sketch(
            "float64",
            Counted(
                codes,
                counts,
                self._zeros,
                self._posinf,
                self._neginf,
                None if self._min is None else float(self._min),
                None if self._max is None else float(self._max),
                total << shift,
                magnitudes << shift,
                squares << (2 * shift),
            ),
        )

    # --- counts ----------------------------------------------------------------------------

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self._total // self._coding.parts

    @property
    def zeros(self) -> int:
        """Number of zeros, of either sign."""
        return self._zeros

    @property
    def nan(self) -> int:
        """Number of NaN."""
        return self._total - self.finite - self._posinf - self._neginf

    @property
    def posinf(self) -> int:
        """Number of +Inf."""
        return self._posinf

    @property
    def neginf(self) -> int:
        """Number of -Inf."""
        return self._neginf

    @property
    def finite(self) -> int:
        """Number of finite values."""
        found: int | None = self._derived.get("finite")
        if found is None:
            cumulative = self.ordered[1]
            found = self._derived["finite"] = int(cumulative[-1]) if len(cumulative) else 0
        return found

    @property
    def exact(self) -> bool:
        """Whether every value has its own code, so that all statistics are exact."""
        return self._coding.exact

    @property
    def saturated(self) -> int | None:
        """Number of values at the largest finite magnitude, for floats of at most 16 bits; None for other dtypes.

        Saturating casts put values there that were too large.
        """
        largest = self._coding.largest
        if largest is None or self.linf < largest:
            return None if largest is None else 0
        return count_of(self.counts, abs(self._coding.values(self.codes)) == largest)

    @property
    def distinct(self) -> int:
        """Number of different values; all NaN count as one, and so do both zeros.

        A lower bound (the number of codes) for dtypes wider than 16 bits.
        """
        values, _ = self.ordered
        changes = int(np.count_nonzero(values[1:] != values[:-1])) + min(len(values), 1)
        # A code of a wide float that holds infinities may also hold NaN.
        return changes + sum(n > 0 for n in (self.nan, self._posinf, self._neginf))

    @property
    def constant(self) -> bool:
        """Whether there are elements, all equal, without NaN."""
        total = self._total
        same = self.finite == total and self._min == self._max
        return total > 0 and (same or total in (self._posinf, self._neginf))

    @property
    def entropy(self) -> float:
        """Shannon entropy of the bit patterns, Σ p·log2(1/p), in bits per value; 0 without values.

        For dtypes wider than 16 bits, the entropy of the codes, which is a lower bound.

        Patterns with equal counts form one term: m·n/N · log2(N/n) for m patterns of n values each, among N values.
        Terms are added in float64 in ascending order of n. So the result does not depend on the patterns themselves,
        and is exactly 0 for a constant tensor.
        """
        found = 0.0
        for n, m in zip(*(each.tolist() for each in np.unique(self.counts, return_counts=True)), strict=True):
            found += m * n / self._total * math.log2(self._total / n)
        return found

    # --- extremes and moments --------------------------------------------------------------

    @property
    def min(self) -> float | int:
        """Minimum, ignoring NaN; NaN if there are no other values."""
        if self._neginf:
            return -math.inf
        return self._min if self._min is not None else math.inf if self._posinf else math.nan

    @property
    def max(self) -> float | int:
        """Maximum, ignoring NaN; NaN if there are no other values."""
        if self._posinf:
            return math.inf
        return self._max if self._max is not None else -math.inf if self._neginf else math.nan

    @property
    def finite_range(self) -> tuple[float | int, float | int] | None:
        """Minimum and maximum of the finite values, or None."""
        return None if self._min is None or self._max is None else (self._min, self._max)

    @property
    def sums(self) -> tuple[int, int, int]:
        """Exact sums of the finite values, of their magnitudes and of their squares.

        The sums are integers in units of 2^`unit` (for squares, 2^(2·`unit`)).

        >>> sketch = Sketch.of(np.array([0.5, -1.5], np.float32))
        >>> [s * 2.0**sketch.unit for s in sketch.sums[:2]], sketch.sums[2] * 2.0**sketch.unit * 2.0**sketch.unit
        ([-1.0, 2.0], 2.5)
        """
        if self._sums is None:
            self._sums = self._coding.sums(self.codes, self.counts)
        return self._sums

    @property
    def unit(self) -> int:
        """Exponent of the unit of `sums`: that of the smallest subnormal, 0 for integers."""
        return self._coding.unit

    @property
    def mean(self) -> float:
        """Mean of the finite values: the exact quotient, rounded once."""
        return ratio(self.sums[0], self.finite, self.unit)

    def std(self, correction: int = 1) -> float:
        """Standard deviation of the finite values, rounded once.

        Computed as sqrt((n·Σx² - (Σx)²) / (n·(n - correction))), in integers up to the root, without cancellation.

        Args:
            correction: 1 for the sample variance, torch's default; 0 for the population variance.
        """
        n, (total, _, squares) = self.finite, self.sums
        if n <= max(correction, 0):
            return math.nan
        return root(n * squares - total * total, n * (n - correction), self.unit)

    @property
    def l1(self) -> float:
        """Sum of the magnitudes of the finite values, rounded once."""
        return ratio(self.sums[1], 1, self.unit)

    @property
    def l2(self) -> float:
        """Root of the sum of the squares of the finite values, rounded once."""
        return root(self.sums[2], 1, self.unit)

    @property
    def linf(self) -> float | int:
        """Largest magnitude of the finite values; 0 without any."""
        return 0.0 if self._min is None or self._max is None else max(abs(self._min), abs(self._max))

    # --- distribution ----------------------------------------------------------------------

    @property
    def ordered(self) -> tuple[Array, Array]:
        """Finite values that occur, ascending, as float64, with cumulative counts.

        For dtypes wider than 16 bits, these are the middles of codes, limited to the minimum and maximum.
        """
        found: tuple[Array, Array] | None = self._derived.get("ordered")
        if found is None:
            codes, counts = self._coding.ascending(self.codes, self.counts)
            values = self._coding.values(codes)
            if not (finite := np.isfinite(values)).all():
                values, counts = values[finite], counts[finite]
            if not self._coding.exact and len(values) and self._min is not None and self._max is not None:
                values = np.minimum(np.maximum(values, float(self._min)), float(self._max))
            values = values + 0.0  # -0.0 is 0
            found = self._derived["ordered"] = values, np.cumsum(counts, dtype=np.uint64)
        return found

    @overload
    def quantile(self, q: float) -> float: ...
    @overload
    def quantile(self, q: Sequence[float]) -> list[float]: ...
    def quantile(self, q: float | Sequence[float]) -> float | list[float]:
        """Quantiles of the finite values, interpolated linearly as by `torch.quantile`.

        The quantile q of n values is at position q·(n - 1) of the sorted values. For dtypes of at most 16 bits, both
        neighbours are exact. For wider dtypes, each is within a relative 2^-8 of the true value (for subnormal values,
        within 2^-133 for float32 and 2^-1029 for float64), and never outside minimum and maximum; integers of magnitude
        below 256 are exact.

        Args:
            q: One or more numbers from 0 to 1.

        Raises:
            ValueError: A number is not between 0 and 1.

        >>> Sketch.of(np.array([1, 2, 10], np.int8)).quantile([0.25, 0.5, 1])
        [1.5, 2.0, 10.0]
        """
        several = isinstance(q, Sequence)
        wanted = list(map(float, q)) if several else [float(q)]  # type: ignore[arg-type]  # it is one of the two
        if not all(0 <= each <= 1 for each in wanted):
            raise ValueError(f"a quantile must be between 0 and 1, not {q}")
        if self.finite:
            found = quantiles(*self.ordered, (float(self._min or 0), float(self._max or 0)), wanted)
        else:
            found = [math.nan] * len(wanted)
        return found if several else found[0]

    def histogram(
        self, bins: int = 100, range: tuple[float, float] | None = None, *, clip: bool = False
    ) -> tuple[Array, Array]:
        """Counts of the finite values in intervals of equal width, like `numpy.histogram`.

        Each interval includes its lower edge, the last one also its upper edge. Values outside `range` are not counted.
        For dtypes wider than 16 bits, a value within a relative 2^-7 of an edge may be counted on its other side.

        Args:
            bins: Number of intervals.
            range: Lowest and highest edge; by default, the minimum and maximum of the finite values.
            clip: Count finite values outside `range` in the outermost intervals.

        Returns:
            The counts, uint64 of shape (bins,), and the edges, float64 of shape (bins + 1,).

        Raises:
            ValueError: `bins` is less than 1, or the range is not finite and ascending.

        >>> counts, edges = Sketch.of(np.array([0, 1, 1, 4], np.float32)).histogram(4)
        >>> counts.tolist(), edges.tolist()
        ([1, 2, 0, 1], [0.0, 1.0, 2.0, 3.0, 4.0])
        """
        low, high = map(float, range or self.finite_range or (0.0, 1.0))
        if bins < 1 or not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(
                f"a histogram needs at least one bin and finite, ascending edges, not {bins} bins from {low} to {high}"
            )
        return histogram(*self.ordered, (low, high), bins, clip=clip)

    # --- comparison and serialisation ------------------------------------------------------

    def _state(self) -> tuple[Any, ...]:
        return (
            self.dtype,
            self.codes.tobytes(),
            self.counts.tobytes(),
            self._zeros,
            self._posinf,
            self._neginf,
            self._min,
            self._max,
            None if self._coding.exact else self._sums,
        )

    def __eq__(self, other: object) -> bool:
        return self._state() == other._state() if isinstance(other, Sketch) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # equal by value, and too large to hash by it

    def __repr__(self) -> str:
        about = "none finite"
        if self.finite:
            low, high = self.finite_range or (math.nan, math.nan)
            about = f"mean {self.mean:.4g}, std {self.std():.4g}, {low:.4g} to {high:.4g}"
        counted = ((self.nan, "NaN"), (self._posinf, "+Inf"), (self._neginf, "-Inf"))
        odd = "".join(f", {count} {what}" for count, what in counted if count)
        return f"<Sketch of {self.numel} {self.dtype}: {about}{odd}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Sketch.from_json, (self._form(),)

    def to_json(self) -> dict[str, Any]:
        """The complete sketch as JSON data; `from_json` restores it, also on another machine.

        Large integers are hexadecimal text, because some JSON readers keep only 53 bits.

        >>> Sketch.of(np.array([True, False, True])).to_json()
        {'sketch': 1, 'dtype': 'bool', 'codes': [0, 1], 'counts': [1, 2]}
        """
        return {key: value.tolist() if key in ("codes", "counts") else value for key, value in self._form().items()}

    def _form(self) -> dict[str, Any]:
        """What `to_json` gives, with arrays, which pickle many times as fast as lists."""
        rest: tuple[Any, ...] = ()
        if not self._coding.exact:
            rest = (self._zeros, self._posinf, self._neginf, self._min, self._max, *self.sums)
        return form_of(self.dtype, Counted(self.codes, self.counts, *rest), exact=self._coding.exact)

    @staticmethod
    def from_json(form: Mapping[str, Any]) -> Sketch:
        """Restore a sketch from the result of `to_json`.

        Raises:
            FileFormatError: The data is not a sketch.

        >>> Sketch.from_json({"sketch": 1, "dtype": "int8", "codes": [0, 255], "counts": [1, 1]}).mean
        -0.5
        """
        if not isinstance(form, Mapping) or form.get("sketch") != VERSION:
            raise FileFormatError(
                f"not a sketch of version {VERSION}",
                hint="pass the result of Sketch.to_json, an object with the key 'sketch'",
            )
        try:
            return Sketch(form["dtype"], counted_of(form))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FileFormatError(f"cannot read the sketch: {type(error).__name__}: {error}") from None


def _frozen(array: Array, dtype: type[np.unsignedinteger[Any]]) -> Array:
    small = array.astype(dtype, copy=False)
    if small.flags.writeable:
        small = small.copy() if small is array else small
        small.flags.writeable = False
    return small
