"""Rows as expressions: what a tensor is computed from.

An expression knows its shape, its element type and its operands without reading a value, and computes any range of its
elements `[start, stop)`, in C order, in memory that does not depend on the size of the tensor.

| expression | value |
|---|---|
| `Stored` | a tensor of a source |
| `Retyped` | the bytes of a stored tensor under another type |
| `operations.Slice` | a part along one dimension |
| `operations.Concat` | several tensors, joined along one dimension |
| `operations.Cast` | a tensor cast to another element type; counts what is lost |
| `operations.Linear` | a weighted sum, in float32 or float64, rounded once |
| `operations.Elementwise` | a function of the elements of one or several tensors |

**To add an operation**, subclass `Expression`: give `super().__init__` its shape, type and operands, and write
`compute` and `summary`. The rest has a default that is right for most:

- `compute(start, stop, work, into)` asks its operands by `operand.compute(start, stop, work)`. What an operand gives is
  valid until that operand is asked again, and must not be written to. **Any range gives the bits of the whole**: the
  same element has the same value whatever the range that it is asked for with.
- `prepare(work)` is for facts of whole tensors that the first element depends on: a norm, a threshold, a small factor.
  It may walk an operand by `work.blocks(operand)`; `work.prepared(self)` gives in `compute` what it returned. It runs
  once for a tensor, however many threads compute parts of it.
- `granule` is a hint: ranges that begin at a multiple of so many elements are cheaper, such as whole rows.
  `resident` is the bytes that `prepare` keeps.

>>> import numpy as np
>>> from torchparams.dtypes import DType
>>> from torchparams.expressions.work import evaluate
>>> from torchparams.testing import MemorySource
>>> class Normalised(Expression):
...     '''A tensor divided by its norm.'''
...     def __init__(self, x):
...         super().__init__(x.shape, DType.of("F32"), (x,))
...     def prepare(self, work):
...         (x,) = self.operands
...         return sum(float(np.square(block, dtype=np.float64).sum()) for block in work.blocks(x)) ** 0.5
...     def compute(self, start, stop, work, into=None):
...         return (self.operands[0].compute(start, stop, work) / work.prepared(self)).astype(np.float32)
...     def summary(self):
...         return f"{self.operands[0].summary()} / its norm"
>>> x = Stored(MemorySource({"w": np.array([3.0, 4.0], np.float32)}), "w")
>>> evaluate(Normalised(x)), Normalised(x).summary()
(array([0.6, 0.8], dtype=float32), 'w / its norm')
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable, shorten

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.expressions.work import Work
    from torchparams.info import Location, ParameterInfo
    from torchparams.sources.base import Source

    Array = np.ndarray[Any, Any]


class Expression(ABC):
    """A tensor, and how it is computed.

    Args:
        shape: Its shape.
        dtype: Its element type.
        operands: The expressions that it is computed from.

    Attributes:
        numel: Count of elements.
        nbytes: Bytes of its elements, packed.
        granule: Ranges that begin at multiples of this many elements are cheaper.
        resident: Bytes that are held while its blocks are computed, beside the blocks.
    """

    granule: int = 1
    resident: int = 0

    def __init__(self, shape: Sequence[int], dtype: DType, operands: tuple[Expression, ...] = ()) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.operands = operands
        self.numel = prod(self.shape)
        self.nbytes = dtype.nbytes(self.numel)

    @abstractmethod
    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Elements `[start, stop)` in C order: shape (stop - start,), of the type `dtype.numpy`.

        Args:
            start, stop: The first element, and the one after the last.
            work: What the thread computes with.
            into: Memory of the caller that the elements may be put into, which spares a copy. The caller looks at what
                is returned, which may be other memory.
        """

    @abstractmethod
    def summary(self) -> str:
        """What it is, in a few words: `layer.0.weight as bfloat16`."""

    def prepare(self, work: Work) -> Any:
        """Facts of whole tensors that `compute` needs; called once for a tensor, before it."""
        return None

    def spans(self) -> list[Location] | None:
        """The byte ranges of files that are, one after the other, exactly its elements; None where there are none.

        What has them is copied from file to file, and never computed.
        """
        return None

    def leaves(self) -> Iterator[Stored]:
        """The tensors of sources that it is made of; one that is used twice comes twice."""
        for operand in self.operands:
            yield from operand.leaves()

    def walk(self) -> Iterator[Expression]:
        """All expressions that it is made of, operands first, itself last."""
        for operand in self.operands:
            yield from operand.walk()
        yield self

    @property
    def footprint(self) -> int:
        """Bytes of memory that one element of a block takes while it is computed."""
        return sum(operand.footprint for operand in self.operands) + 2 * max(self.dtype.itemsize, 4)

    @property
    def is_prepared(self) -> bool:
        """Whether it, or an operand, has something to prepare."""
        return any(type(part).prepare is not Expression.prepare for part in self.walk())

    @property
    def place(self) -> Location | None:
        """The one byte range of a file that is exactly its elements; None where there is none.

        A row that has one is read as bytes.
        """
        spans = self.spans()
        return spans[0] if spans is not None and len(spans) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON takes it."""
        return {"operation": type(self).__name__.lower(), "operands": [operand.to_json() for operand in self.operands]}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {list(self.shape)} {self.dtype}: {shorten(self.summary(), 100)}>"


class Stored(Expression):
    """A tensor of a source.

    Args:
        source: The source.
        name: Any spelling of its name there.
        info: Its record, where it is known already.

    Attributes:
        place: Its byte range in a file; None where it has none.
        held: The very tensor of a live source, where a reading has found it already; else None.

    Raises:
        UnknownName: The source has no such tensor.
        NotReadable: It is lazy: it has neither shape nor values.
        LimitExceeded: It has far more elements than there are bytes behind them.
    """

    place: Location | None = None
    held: Any = None

    def __init__(self, source: Source, name: str, info: ParameterInfo | None = None) -> None:
        self.info = info = source.info(source.resolve(name)) if info is None else info
        if info.shape is None:
            raise NotReadable(f"{info.name!r} {info.shapeless}", where=source.label)
        # Set here, not by the base class: a table may have a hundred thousand of these.
        self.shape = info.shape
        self.dtype = info.dtype
        self.operands = ()
        self.numel = info.numel
        self.nbytes = info.dtype.nbytes(info.numel)
        self.source = source
        source.check_size(info.name)
        self.place = source.span(info.name)
        if self.place is None and _is_materialised(source, info):
            # Of a compressed storage, all of it is inflated.
            self.resident = self.nbytes if info.storage is None else max(self.nbytes, info.storage.nbytes)

    @classmethod
    def at(cls, place: Location, source: Source, info: ParameterInfo) -> Stored:
        """A tensor whose elements are a byte range of a file, as `Source.span` defines it.

        For parts of a row, which are no rows of the source themselves.

        Args:
            place: The range.
            source: The source that it belongs to.
            info: Its record, with a shape.
        """
        made = cls.__new__(cls)
        made.info, made.source, made.place, made.operands = info, source, place, ()
        made.shape, made.dtype, made.numel = info.shape or (), info.dtype, info.numel
        made.nbytes = info.dtype.nbytes(info.numel)
        return made

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """The elements, read; straight into `into` where they lie in a file."""
        return work.read(self, start, stop, into)

    def spans(self) -> list[Location] | None:
        """Its byte range in the file, where there is one."""
        return None if self.place is None else [self.place]

    def leaves(self) -> Iterator[Stored]:
        """Itself."""
        yield self

    def walk(self) -> Iterator[Expression]:
        """Itself."""
        yield self

    @property
    def footprint(self) -> int:
        """One element, which is read; and once more where it has to be unpacked."""
        return max(self.dtype.itemsize, 2)

    @property
    def is_prepared(self) -> bool:
        """Never."""
        return False

    def summary(self) -> str:
        """Its name."""
        return self.info.name

    def to_json(self) -> dict[str, Any]:
        """Its name and its source."""
        return {"operation": "stored", "source": self.source.label, "name": self.info.name}


def _is_materialised(source: Source, info: ParameterInfo) -> bool:
    """Whether its values are a copy in memory: of compressed members, and of tensors that are not on the CPU."""
    if info.device == "file":
        return info.location is None
    return info.device != "cpu"


class Retyped(Expression):
    """The bytes of another as they are, under an element type and a shape that take as many.

    For types that are one thing under two names: `float4_e2m1fn` of the safetensors format, counted element by
    element, is torch's `float4_e2m1fn_x2`, counted in pairs.

    Args:
        x: The other, which lies in a file.
        dtype, shape: What it is to be.
    """

    def __init__(self, x: Expression, dtype: DType, shape: Sequence[int]) -> None:
        super().__init__(shape, dtype, (x,))
        assert self.nbytes == x.nbytes

    def spans(self) -> list[Location] | None:
        """Those of the other."""
        return self.operands[0].spans()

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """The bytes of whole elements."""
        return work.read_bytes(self.operands[0], self.dtype.nbytes(start), self.dtype.nbytes(stop))

    def summary(self) -> str:
        """The other's, and the type."""
        return f"{self.operands[0].summary()} as {self.dtype}"
