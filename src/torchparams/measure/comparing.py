"""Compare two tensors block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torchparams.engines.base import Job, Task, Unread
from torchparams.engines.by_name import named
from torchparams.engines.distributed import engine_for
from torchparams.errors import LimitExceeded, NotReadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.engines.base import Engine, Progress
    from torchparams.expressions.casts import Losses
    from torchparams.info import ParameterInfo
    from torchparams.io.blocks import Block
    from torchparams.sketch.compared import Compared
    from torchparams.sources.base import Source

    Array = np.ndarray[Any, Any]

Operand = tuple["Source", "ParameterInfo"]


def compare_pairs(
    pairs: Iterable[tuple[str, Operand, Operand]],
    *,
    numeric: bool = False,
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Compared | Unread, Losses | None]]:
    """Compare pairs of tensors of equal shape, and yield each result with the losses of casts inside the rows.

    Equal tensors get no norms or sums.

    Args:
        pairs: Key of the result, then source and info of each tensor.
        numeric: Compare values. Otherwise compare bits; both tensors then have the same dtype.
        engine: Engine to run on; by default, a `ThreadEngine` that memory-maps files.
        progress: Callback with the bytes read so far and in total.

    Raises:
        SourceError: A file is damaged, or changed while it was read.
    """
    jobs: list[Job] = []
    for key, *operands in pairs:
        try:
            jobs.append(Job(key, tuple(source.row(info.name, info) for source, info in operands)))
        except (NotReadable, LimitExceeded) as error:
            yield key, Unread.because(key, error), None
    engine = named(engine) or engine_for(jobs)
    again: list[Job] = []
    for job, result, lost in engine.run(jobs, CompareTask(numeric, skipping=True), progress=progress):
        if isinstance(result, Unread):
            yield job.key, result, None
        elif result.complete or not result.compared.changed:
            yield job.key, _of_interest(result.compared), lost
        else:
            again.append(job)
    # Second pass for the few tensors that have equal blocks before the first difference.
    for job, result, lost in engine.run(again, CompareTask(numeric, skipping=False)):
        yield job.key, result if isinstance(result, Unread) else _of_interest(result.compared), lost


def _of_interest(compared: Compared) -> Compared:
    # For equal tensors, sums would cover only the blocks with -0.0 against 0.0: drop them.
    return compared if compared.changed else type(compared)()


@dataclass(frozen=True, slots=True)
class Part:
    """Comparison of one part of two tensors.

    Attributes:
        compared: Counts and sums.
        complete: Whether all blocks are in the sums of squares; skipped equal blocks are not.
    """

    compared: Compared
    complete: bool


class CompareTask(Task[Part, Part]):
    """Task that compares two tensors.

    Args:
        numeric: Compare values instead of bits.
        skipping: Skip blocks that are equal before the first difference: equal tensors need no norms.
    """

    def __init__(self, numeric: bool, *, skipping: bool) -> None:
        self.numeric, self.skipping = numeric, skipping

    def begin(self, job: Job) -> CompareFold:
        """Start an empty comparison."""
        return CompareFold(job, self.numeric, self.skipping)

    def combine(self, job: Job, parts: Sequence[Part]) -> Part:
        """Merge the parts."""
        from torchparams.sketch.compared import Compared

        if len(parts) == 1:
            return parts[0]
        return Part(Compared.total(part.compared for part in parts), all(part.complete for part in parts))


class CompareFold:
    """Fold that compares the two tensors of a job.

    Args:
        job: Job with two rows.
        numeric, skipping: See `CompareTask`.
    """

    def __init__(self, job: Job, numeric: bool, skipping: bool) -> None:
        a, b = job.rows
        self._dtypes = a.dtype, b.dtype
        self._numeric = numeric
        self._compare: _Bits | _Opaque | _Numbers | None = None
        self._skipping = skipping and a.dtype == b.dtype
        self._complete = True

    def update(self, a: Block, b: Block) -> None:
        """Compare a block of each tensor."""
        if self._skipping and a.packed == b.packed:
            from torchparams.sketch.compared import equal

            if equal(a.buffer, b.buffer):
                self._complete = False
                return
            self._skipping = False
        if self._compare is None:
            self._compare = (_compare_values if self._numeric else _compare_bits)(*self._dtypes)
        self._compare.update(a, b)

    def finish(self) -> Part:
        """Result over all blocks."""
        from torchparams.sketch.compared import Compared

        return Part(Compared() if self._compare is None else self._compare.finish(), self._complete)


def can_compare_values(a: DType, b: DType) -> bool:
    """Whether elements of both dtypes are numbers.

    >>> from torchparams.dtypes import DType
    >>> can_compare_values(DType.of("bf16"), DType.of("int8")), can_compare_values(DType.of("bf16"), DType.of("qint8"))
    (True, False)
    """
    return "opaque" not in (a.kind, b.kind)


# --- comparison by dtype -------------------------------------------------------------------------


class _Bits:
    """Compares values of one dtype."""

    def __init__(self, dtype: DType) -> None:
        from torchparams.sketch.compare import Values, comparison

        self._narrow = dtype.bits < 8
        self._comparison = comparison(Values.of(dtype))
        self.finish = self._comparison.finish

    def update(self, a: Block, b: Block) -> None:
        if self._narrow:
            self._comparison.update(_unpacked(a), _unpacked(b))
        else:
            self._comparison.update(a.buffer, b.buffer)


def _unpacked(block: Block) -> Array | memoryview:
    import numpy as np

    return block.values().view(np.uint8) if block.packed else block.buffer


class _Opaque:
    """Counts changes of bits that are not numbers, such as quantised dtypes."""

    def __init__(self, dtype: DType) -> None:
        self._width = max(dtype.itemsize, 1)
        self._changed = 0

    def update(self, a: Block, b: Block) -> None:
        import numpy as np

        differ = (a.data.reshape(-1, self._width) != b.data.reshape(-1, self._width)).any(1)
        self._changed += int(np.count_nonzero(differ))

    def finish(self) -> Compared:
        from torchparams.sketch.compared import Compared

        return Compared(changed=self._changed)


class _Numbers:
    """Compares values of two dtypes, each converted to a dtype that holds it exactly."""

    def __init__(self, a: DType, b: DType) -> None:
        from torchparams.sketch.compare import Values, comparison

        self._types = number_types(a, b)
        values = [Values.of(dtype) for dtype in self._types]
        self._parts = max(each.parts for each in values)
        x, y = (each if each.parts == self._parts else replace(each, parts=self._parts) for each in values)
        self._comparison = comparison(x, others=y)
        self.finish = self._comparison.finish

    def update(self, a: Block, b: Block) -> None:
        x, y = (self._bytes(block, dtype) for block, dtype in zip((a, b), self._types, strict=True))
        self._comparison.update(x, y)

    def _bytes(self, block: Block, dtype: DType) -> Array:
        import numpy as np

        made = as_numbers(block, dtype)
        if self._parts == 2 and dtype.kind != "complex":  # an integer beside a complex number
            made = np.stack([made, np.zeros_like(made)], axis=1)
        return made.reshape(-1).view(np.uint8)


def number_types(a: DType, b: DType) -> tuple[DType, DType]:
    """Dtypes for comparing values of two dtypes; a common one if it holds all values of both.

    >>> from torchparams.dtypes import DType
    >>> def show(*names): return [str(dtype) for dtype in number_types(*map(DType.of, names))]
    >>> show("bool", "int8"), show("int8", "bf16"), show("int32", "bf16"), show("int64", "float16")
    (['int64', 'int64'], ['float32', 'float32'], ['float64', 'float64'], ['int64', 'float64'])
    """
    from torchparams.dtypes import DType
    from torchparams.expressions.casts import exact

    kinds = {a.kind, b.kind}
    if kinds & {"float", "complex"}:
        single = all(exact(each, DType.of("complex64" if each.kind == "complex" else "float32")) for each in (a, b))
        names = ("complex64", "complex128") if "complex" in kinds else ("float32", "float64")
        common, keep = DType.of(names[not single]), {"int64", "uint64"}
    else:
        common, keep = DType.of("int64" if "int" in kinds or "uint64" not in (a, b) else "uint64"), {"uint64"}
    return a if a in keep else common, b if b in keep else common


def as_numbers(block: Block, dtype: DType) -> Array:
    """Elements of a block in another dtype, with -0.0 as 0.0, and one bit pattern for all NaN."""
    import numpy as np

    from torchparams.expressions.casts import widen

    if block.dtype == "complex32":  # NumPy has no complex32
        values = block.data.view(np.float16).astype(np.float32).view(np.complex64)
    else:
        values = block.values()
    if dtype == "float32" and block.dtype.bits <= 16:
        made: Array = widen(values, block.dtype)
    else:
        with np.errstate(invalid="ignore"):  # signalling NaN
            # ml_dtypes cannot cast to complex dtypes.
            wide = values if values.dtype.kind == "c" or dtype.kind != "complex" else values.astype(np.float64)
            made = wide.astype(dtype.numpy)
    if dtype.kind in ("float", "complex"):
        parts = made.view(made.real.dtype)
        with np.errstate(invalid="ignore"):  # a cast from float16 keeps them
            parts += 0.0
        odd = np.isnan(parts)
        if odd.any():
            parts[odd] = np.nan
    return made


def _compare_bits(a: DType, b: DType) -> _Bits | _Opaque:
    assert a == b
    return _Opaque(a) if a.kind == "opaque" else _Bits(a)


def _compare_values(a: DType, b: DType) -> _Numbers | _Opaque:
    return _Numbers(a, b) if can_compare_values(a, b) else _Opaque(a)
