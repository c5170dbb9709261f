"""Reading two tensors in step, and comparing them block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torchparams.engines.base import Job, Task, Unread
from torchparams.engines.threads import ThreadEngine
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
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Compared | Unread, Losses | None]]:
    """The comparison of each pair of tensors of one shape, as it gets done, and what casts within the rows lost.

    Where two are equal, nothing is counted or summed up.

    Args:
        pairs: A key for the result; source and record of the one tensor, and of the other.
        numeric: Whether values decide; else bits do, and the two have one dtype.
        engine: What runs it; a `ThreadEngine` that maps files unless given.
        progress: Told bytes read and bytes in all.

    Raises:
        SourceError: A file is damaged, or was written to meanwhile.
    """
    jobs: list[Job] = []
    for key, *operands in pairs:
        try:
            jobs.append(Job(key, tuple(source.row(info.name, info) for source, info in operands)))
        except (NotReadable, LimitExceeded) as error:
            yield key, Unread.because(key, error), None
    engine = engine or ThreadEngine(mapped=True)  # comparing is faster than copying
    again: list[Job] = []
    for job, result, lost in engine.run(jobs, CompareTask(numeric, skipping=True), progress=progress):
        if isinstance(result, Unread):
            yield job.key, result, None
        elif result.complete or not result.compared.changed:
            yield job.key, _of_interest(result.compared), lost
        else:
            again.append(job)
    # Few: tensors that begin alike, or have large parts alike, and differ elsewhere.
    for job, result, lost in engine.run(again, CompareTask(numeric, skipping=False)):
        yield job.key, result if isinstance(result, Unread) else _of_interest(result.compared), lost


def _of_interest(compared: Compared) -> Compared:
    # Of equal values, sums are of the blocks that were looked into: none, all, or those where -0.0 met 0.0.
    return compared if compared.changed else type(compared)()


@dataclass(frozen=True, slots=True)
class Part:
    """What a part of two tensors has in common.

    Attributes:
        compared: What was counted and summed up.
        complete: Whether all of it was: else, blocks that are equal are not in the sums of squares.
    """

    compared: Compared
    complete: bool


class CompareTask(Task[Part, Part]):
    """The task that compares two tensors.

    Args:
        numeric: Whether values decide, or bits.
        skipping: Look at no values before there is a difference: of tensors that are equal nobody needs a norm.
    """

    def __init__(self, numeric: bool, *, skipping: bool) -> None:
        self.numeric, self.skipping = numeric, skipping

    def begin(self, job: Job) -> CompareFold:
        """Nothing is compared yet."""
        return CompareFold(job, self.numeric, self.skipping)

    def combine(self, job: Job, parts: Sequence[Part]) -> Part:
        """Add the parts."""
        from torchparams.sketch.compared import Compared

        if len(parts) == 1:
            return parts[0]
        return Part(Compared.total(part.compared for part in parts), all(part.complete for part in parts))


class CompareFold:
    """The fold that compares a job's two tensors.

    Args:
        job: The two.
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
        """Compare a block of each."""
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
        """The comparison of all blocks."""
        from torchparams.sketch.compared import Compared

        return Part(Compared() if self._compare is None else self._compare.finish(), self._complete)


def can_compare_values(a: DType, b: DType) -> bool:
    """Whether elements of the two types are numbers, and so comparable as such.

    >>> from torchparams.dtypes import DType
    >>> can_compare_values(DType.of("bf16"), DType.of("int8")), can_compare_values(DType.of("bf16"), DType.of("qint8"))
    (True, False)
    """
    return "opaque" not in (a.kind, b.kind)


# --- how two types are compared ------------------------------------------------------------------


class _Bits:
    """Values of one type."""

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
    """Bits that are not numbers by themselves: counted, and no more."""

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
    """Values of two types as numbers, each in a type that holds all of them."""

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
        if self._parts == 2 and dtype.kind != "complex":  # whole numbers beside complex ones
            made = np.stack([made, np.zeros_like(made)], axis=1)
        return made.reshape(-1).view(np.uint8)


def number_types(a: DType, b: DType) -> tuple[DType, DType]:
    """The types in which values of two types are compared: one and the same, if it holds all values of both.

    >>> from torchparams.dtypes import DType
    >>> def show(*names): return [str(dtype) for dtype in number_types(*map(DType.of, names))]
    >>> show("bool", "int8"), show("int8", "bf16"), show("int64", "float16")
    (['int64', 'int64'], ['float64', 'float64'], ['int64', 'float64'])
    """
    from torchparams.dtypes import DType

    kinds = {a.kind, b.kind}
    if kinds & {"float", "complex"}:
        common, keep = DType.of("complex128" if "complex" in kinds else "float64"), {"int64", "uint64"}
    else:
        common, keep = DType.of("int64" if "int" in kinds or "uint64" not in (a, b) else "uint64"), {"uint64"}
    return a if a in keep else common, b if b in keep else common


def as_numbers(block: Block, dtype: DType) -> Array:
    """The elements of a block in another type; -0.0 as 0.0, and every NaN of the same bits."""
    import numpy as np

    if block.dtype == "complex32":  # which numpy lacks
        values = block.data.view(np.float16).astype(np.float32).view(np.complex64)
    else:
        values = block.values()
    with np.errstate(invalid="ignore"):  # signalling NaN
        # ml_dtypes has no way from its types to complex128.
        wide = values if values.dtype.kind == "c" or dtype.kind != "complex" else values.astype(np.float64)
        made: Array = wide.astype(dtype.numpy)
    if dtype.kind in ("float", "complex"):
        parts = made.view(np.float64)
        parts += 0.0
        parts[np.isnan(parts)] = np.nan
    return made


def _compare_bits(a: DType, b: DType) -> _Bits | _Opaque:
    assert a == b
    return _Opaque(a) if a.kind == "opaque" else _Bits(a)


def _compare_values(a: DType, b: DType) -> _Numbers | _Opaque:
    return _Numbers(a, b) if can_compare_values(a, b) else _Opaque(a)
