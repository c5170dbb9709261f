"""Base classes of expressions, which compute tensors from stored tensors.

An expression knows its shape, dtype and operands without reading values. It computes any range `[start, stop)` of its
elements, in C order, in memory that does not depend on the size of the tensor.

| expression | value |
|---|---|
| `Stored` | a tensor of a source |
| `Retyped` | the bytes of a stored tensor, with another dtype |
| `operations.Slice` | a range along one dimension |
| `operations.Concat` | tensors joined along one dimension |
| `operations.Cast` | a cast to another dtype, with a count of its losses |
| `operations.Linear` | a weighted sum, in float32 or float64, rounded once |
| `operations.Elementwise` | an elementwise function of one or more tensors |

**To add an operation**, subclass `Expression`: pass shape, dtype and operands to `super().__init__`, and write
`compute` and `summary`. The other methods have defaults that fit most operations:

- `compute(start, stop, work, into)` reads its operands by `operand.compute(start, stop, work)`. The returned array is
  valid until the same operand computes again, and must not be written to. **Every range must give the bits of the
  whole**: the value of an element may not depend on the range it is computed in.
- `prepare(work)` computes facts about whole tensors that elements depend on: a norm, a threshold, a small factor. It
  may read an operand by `work.blocks(operand)`. In `compute`, `work.prepared(self)` gives its result. It runs once per
  tensor, even if several threads compute parts.
- `granule` is a hint: ranges that start at a multiple of it are cheaper, such as whole rows. `resident` is the number
  of bytes that `prepare` keeps.

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
from typing import TYPE_CHECKING, Any, Protocol

from torchparams.errors import NotReadable, shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import torch

    from torchparams.dtypes import DType
    from torchparams.expressions.casts import Losses
    from torchparams.info import Location, ParameterInfo
    from torchparams.left_out import LeftOut

    Array = np.ndarray[Any, Any]


class Readable(Protocol):
    """The members of a source that a stored tensor needs; `sources.base.Source` describes them."""

    @property
    def label(self) -> str:
        """Name in messages."""

    @property
    def format(self) -> str:
        """The kind of source: `module`, `mapping`, or a file format's name."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the source; empty for a source in memory."""

    @property
    def live(self) -> bool:
        """Whether the next listing may differ from this one."""

    @property
    def borrowed(self) -> bool:
        """Whether the values lie in memory that others own and may write to."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the source that its table does not list."""

    def resolve(self, name: str) -> str:
        """Canonical name for any spelling."""

    def info(self, name: str) -> ParameterInfo:
        """Info of a canonical name."""

    def check_size(self, name: str) -> None:
        """Raise if a tensor has far more elements than bytes behind them."""

    def span(self, name: str) -> Location | None:
        """Byte range that holds exactly the elements."""

    def numpy(self, name: str) -> Array:
        """Values as a NumPy array."""

    def tensor(self, name: str) -> torch.Tensor:
        """Values as a torch tensor."""

    def value(self, name: str) -> Any:
        """The live tensor itself, or a tensor that is read."""

    def fingerprint(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and modification time (ns) of every file."""

    def check_unchanged(self) -> None:
        """Raise if a file was changed after it was listed."""

    def close(self) -> None:
        """Close open files."""


class Work(ABC):
    """The work state that an expression needs while a thread computes it; see `work.ThreadWork`.

    Attributes:
        block: Elements per block of the current expression.
        strict: Whether scales that are not finite raise an error, because the values are written.
    """

    block: int
    strict: bool

    @property
    @abstractmethod
    def state(self) -> Mapping[int, Any]:
        """Prepared results by `id` of the expression; other threads can reuse them."""

    @abstractmethod
    def read(self, leaf: Stored, start: int, stop: int, into: Array | None = None) -> Array:
        """Read elements of a stored tensor, into `into` if possible."""

    @abstractmethod
    def read_bytes(self, x: Expression, start: int, stop: int) -> Array:
        """Bytes `[start, stop)` of a stored tensor, packed as in a file; works for dtypes that NumPy lacks."""

    @abstractmethod
    def blocks(self, x: Expression, *, begin: bool = False) -> Iterator[Array]:
        """All elements of an expression, block by block; each block is valid until the next.

        Args:
            x: The current expression, or an operand of it.
            begin: Prepare it first.
        """

    @abstractmethod
    def prepared(self, x: Expression) -> Any:
        """Result of `x.prepare`."""

    @abstractmethod
    def scratch(self, x: Expression, slot: int, count: int, dtype: np.dtype[Any]) -> Array:
        """Reusable memory for an expression, kept from block to block and for later expressions.

        Allocating it per block would cost as much as the computation: the system zeroes new pages.

        Args:
            x: Expression that asks.
            slot: Index of the buffer.
            count: Number of elements.
            dtype: Dtype of the elements.
        """

    @abstractmethod
    def compute_into(self, x: Expression, start: int, stop: int, out: Array) -> None:
        """Compute elements `[start, stop)` of an expression into `out`.

        For operands that are computed one after the other: they share memory, so that memory does not grow with their
        number.
        """

    @abstractmethod
    def latest(self, x: Expression, key: int, compute: Callable[[], Array]) -> Array:
        """Cached result of `compute` for the key, for tiles that blocks share. Few expressions are cached at a time."""

    @abstractmethod
    def count(self, x: Expression, lost: Losses) -> None:
        """Add the losses of a cast."""


class Expression(ABC):
    """A tensor, and the way it is computed.

    Args:
        shape: Shape of the result.
        dtype: Dtype of the result.
        operands: Expressions that it is computed from.

    Attributes:
        numel: Number of elements.
        nbytes: Bytes of the elements, packed.
        granule: Ranges that start at a multiple of this number of elements are cheaper.
        resident: Bytes kept in memory during the computation, besides blocks.
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
        """Compute elements `[start, stop)` in C order: shape (stop - start,), dtype `dtype.numpy`.

        Args:
            start, stop: Range of elements.
            work: Work state of the thread.
            into: Optional array for the result, to avoid a copy. The result may still be in other memory: use the
                returned array.
        """

    @abstractmethod
    def summary(self) -> str:
        """Short description, such as `layer.0.weight as bfloat16`."""

    def prepare(self, work: Work) -> Any:
        """Compute facts about whole tensors that `compute` needs; called once per tensor."""
        return None

    def unordered(self) -> Expression:
        """Return the same elements in the order that is cheapest to compute, in any shape.

        It is for results that do not depend on the order: a matrix that is stored transposed need not be turned.
        """
        return self

    def spans(self) -> list[Location] | None:
        """File ranges that hold exactly the elements, in order; None if there are none.

        A tensor with such ranges is copied from file to file without computing it.
        """
        return None

    def leaves(self) -> Iterator[Stored]:
        """Stored tensors of the expression; one that is used twice is yielded twice."""
        for operand in self.operands:
            yield from operand.leaves()

    def walk(self) -> Iterator[Expression]:
        """All expressions inside this one, operands first, itself last."""
        for operand in self.operands:
            yield from operand.walk()
        yield self

    @property
    def footprint(self) -> int:
        """Bytes of memory per element of a block, including intermediate results."""
        return sum(operand.footprint for operand in self.operands) + 2 * max(self.dtype.itemsize, 4)

    @property
    def is_prepared(self) -> bool:
        """Whether it, or an operand, has a `prepare` step."""
        return any(type(part).prepare is not Expression.prepare for part in self.walk())

    @property
    def place(self) -> Location | None:
        """File range that holds exactly the elements, if it is a single one; otherwise None.

        A row with a range is read as bytes.
        """
        spans = self.spans()
        return spans[0] if spans is not None and len(spans) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data."""
        return {"operation": type(self).__name__.lower(), "operands": [operand.to_json() for operand in self.operands]}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {list(self.shape)} {self.dtype}: {shorten(self.summary(), 100)}>"


class Stored(Expression):
    """Tensor of a source.

    Args:
        source: Readable of the tensor.
        name: Name of the tensor, canonical or raw.
        info: Info of the tensor, if already known.

    Attributes:
        place: Its byte range in a file; None where it has none.
        held: The very tensor of a live source, where a reading has found it already; else None.

    Raises:
        UnknownName: The source has no such tensor.
        NotReadable: The tensor is lazy, without shape and values.
        LimitExceeded: The tensor has far more elements than stored bytes.
    """

    place: Location | None = None
    held: Any = None

    def __init__(self, source: Readable, name: str, info: ParameterInfo | None = None) -> None:
        self.info = info = source.info(source.resolve(name)) if info is None else info
        if info.shape is None:
            raise NotReadable(f"{info.name!r} {info.shapeless}", where=source.label)
        # Set directly for speed: a table may have 100,000 of these.
        self.shape = info.shape
        self.dtype = info.dtype
        self.operands = ()
        self.numel = info.numel
        self.nbytes = info.dtype.nbytes(info.numel)
        self.source = source
        source.check_size(info.name)
        self.place = source.span(info.name)
        if self.place is None and _is_materialised(source, info):
            # A compressed storage is decompressed as a whole.
            self.resident = self.nbytes if info.storage is None else max(self.nbytes, info.storage.nbytes)

    @classmethod
    def at(cls, place: Location, source: Readable, info: ParameterInfo) -> Stored:
        """A tensor whose elements are a byte range of a file, as `Source.span` defines it.

        For parts of a row, which are no rows of the source themselves.

        Args:
            place: The range.
            source: The source that it belongs to.
            info: Its info, with a shape.
        """
        made = cls.__new__(cls)
        made.info, made.source, made.place, made.operands = info, source, place, ()
        made.shape, made.dtype, made.numel = info.shape or (), info.dtype, info.numel
        made.nbytes = info.dtype.nbytes(info.numel)
        return made

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Read the elements, directly into `into` if they are a file range."""
        return work.read(self, start, stop, into)

    def spans(self) -> list[Location] | None:
        """File range of the tensor, if it has one."""
        return None if self.place is None else [self.place]

    def leaves(self) -> Iterator[Stored]:
        """Yield itself."""
        yield self

    def walk(self) -> Iterator[Expression]:
        """Yield itself."""
        yield self

    @property
    def footprint(self) -> int:
        """Bytes per element, including unpacking."""
        return max(self.dtype.itemsize, 2)

    @property
    def is_prepared(self) -> bool:
        """Always False."""
        return False

    def summary(self) -> str:
        """Name of the tensor."""
        return self.info.name

    def to_json(self) -> dict[str, Any]:
        """The expression as JSON data: name and source."""
        return {"operation": "stored", "source": self.source.label, "name": self.info.name}


def _is_materialised(source: Readable, info: ParameterInfo) -> bool:
    """Whether reading makes a full copy in memory: compressed members, and tensors outside the CPU."""
    if info.device == "file":
        return info.location is None
    return info.device != "cpu"


class Retyped(Expression):
    """Bytes of another tensor, with a dtype and shape of the same size.

    For dtypes that are the same under two names: safetensors counts `float4_e2m1fn` element by element; torch counts
    the same bytes in pairs, as `float4_e2m1fn_x2`.

    Args:
        x: Tensor stored in a file.
        dtype, shape: Dtype and shape of the result.
    """

    def __init__(self, x: Expression, dtype: DType, shape: Sequence[int]) -> None:
        super().__init__(shape, dtype, (x,))
        assert self.nbytes == x.nbytes

    def spans(self) -> list[Location] | None:
        """File ranges of the operand."""
        return self.operands[0].spans()

    def compute(self, start: int, stop: int, work: Work, into: Array | None = None) -> Array:
        """Bytes of the range."""
        return work.read_bytes(self.operands[0], self.dtype.nbytes(start), self.dtype.nbytes(stop))

    def summary(self) -> str:
        """Summary of the operand, with the dtype."""
        return f"{self.operands[0].summary()} as {self.dtype}"
