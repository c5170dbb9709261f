"""The contract of engines: run a task on jobs, and return the results.

A **job** names rows that are read together, in step: one row, or several with equally many elements. A **task** defines
the work: for each job, or each part of a large one, the engine asks it for a **fold**, passes the blocks to the fold in
order, and asks the fold for its result. The task then combines the results of a job's parts, in order.

A row is an expression. A row that is a byte range of a file is read as bytes; any other row is computed block by block,
in memory that depends neither on its size nor on its number of operands.

A job is cut at the same elements for any number of threads. So a fold that is a function of its blocks gives the same
result everywhere, even if it rounds.

To add an engine, subclass `Engine` and write `run`; its tests subclass `torchparams.testing.EngineTests`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from torchparams.errors import LimitExceeded, MismatchError, NotReadable
from torchparams.expressions.base import Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression
    from torchparams.expressions.casts import Losses
    from torchparams.info import ParameterInfo
    from torchparams.io.threads import Progress as Progress
    from torchparams.sources.base import Source

Part = TypeVar("Part")
Result = TypeVar("Result")
PartOut = TypeVar("PartOut", covariant=True)


@dataclass(slots=True, eq=False)  # not frozen: there may be 100,000, and frozen ones take twice as long to create
class Job:
    """Rows that are read together, in step. Do not modify a job.

    Attributes:
        key: Name of the result.
        rows: Expressions with equally many elements.
        nbytes: Bytes of all rows.
    """

    key: str
    rows: tuple[Expression, ...]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        rows = self.rows
        if len(rows) != 1 and len({row.numel for row in rows}) != 1:
            pairs = ", ".join(f"{row.summary()} of {_origin(row)} has {row.numel}" for row in rows)
            raise MismatchError(f"tensors read in step must have equally many elements: {pairs}")
        self.nbytes = 0  # computed once, because a run needs it at every step
        for row in rows:
            self.nbytes += row.nbytes

    @staticmethod
    def of(*operands: tuple[Source, str], key: str | None = None) -> Job:
        """Create the job of reading one tensor, or several of equal numel.

        Args:
            operands: Source and name of each tensor.
            key: Name of the result; by default, the name of the first tensor.

        Raises:
            MismatchError: The tensors have different numel.
            NotReadable: A tensor is lazy, without values.
            UnknownName: A source has no such tensor.

        >>> import numpy as np
        >>> from torchparams.testing import MemorySource
        >>> Job.of((MemorySource({"w": np.ones(3)}), "w")).numel
        3
        """
        found = [(source, source.resolve(name)) for source, name in operands]
        return Job(found[0][1] if key is None else key, tuple(source.row(name) for source, name in found))

    @property
    def numel(self) -> int:
        """Number of elements of each row."""
        return self.rows[0].numel

    @property
    def dtype(self) -> DType:
        """Dtype of the first row."""
        return self.rows[0].dtype


def _origin(row: Expression) -> str:
    return next((leaf.source.label for leaf in row.leaves()), "nothing")


class Fold(Protocol[PartOut]):
    """Work on the blocks of a job, or of a part of one. A single thread uses it."""

    @property
    def update(self) -> Callable[..., None]:
        """Method that receives the next block of each row: `update(block)`, or `update(of_a, of_b)`.

        The blocks hold the same range of elements. They come in order, without gaps.
        """

    def finish(self) -> PartOut:
        """Return the result; called once, after the last block. A tensor without elements has no blocks."""


class Task(ABC, Generic[Part, Result]):
    """Work to do on every job. Tasks can be pickled, so that engines can send them to other processes.

    Attributes:
        order: `any` where a job may be cut into parts with a fold each; `stream` where one fold must see all of a job,
            from its first element to its last. Then a single large tensor is not spread over threads.
    """

    order: Literal["any", "stream"] = "any"

    @abstractmethod
    def begin(self, job: Job) -> Fold[Part]:
        """Create the fold for a job, or for a part of one. May be called in any thread."""

    @abstractmethod
    def combine(self, job: Job, parts: Sequence[Part]) -> Result:
        """Combine the results of a job's parts, at least one, in order. May be called in any thread."""

    def takes(self, job: Job) -> bool:
        """Whether `many` supports a job with one row. It must give the same result as a fold."""
        return False

    def many(self, jobs: Sequence[Job], buffer: memoryview | None, starts: Sequence[int]) -> Sequence[Result]:
        """Compute the results of many small jobs at once; engines may call this instead of `begin` and `combine`.

        Args:
            jobs: Jobs for which `takes` is True.
            buffer: Bytes of the rows, as in a file: C order, contiguous, little-endian. Valid only during the call.
                None if the rows are in live memory.
            starts: Offset of each row in the buffer, or its address.
        """
        raise NotImplementedError


class Folding(Task[Part, Result]):
    """A task made of two functions, for engines in this process.

    Args:
        begin, combine: See `Task`.
        order: See `Task`.

    >>> import numpy as np
    >>> from torchparams.engines import ThreadEngine, jobs_of
    >>> from torchparams.testing import MemorySource
    >>> class Count:
    ...     def __init__(self): self.numel = 0
    ...     def update(self, block): self.numel += block.numel
    ...     def finish(self): return self.numel
    >>> jobs = jobs_of(MemorySource({"w": np.ones((2, 3))}))
    >>> ThreadEngine().map(jobs, Folding(lambda job: Count(), lambda job, parts: sum(parts)))
    {'w': 6}
    """

    def __init__(
        self,
        begin: Callable[[Job], Fold[Part]],
        combine: Callable[[Job, Sequence[Part]], Result],
        order: Literal["any", "stream"] = "any",
    ) -> None:
        self._begin, self._combine, self.order = begin, combine, order

    def begin(self, job: Job) -> Fold[Part]:
        """Call the first function."""
        return self._begin(job)

    def combine(self, job: Job, parts: Sequence[Part]) -> Result:
        """Call the second function."""
        return self._combine(job, parts)


@dataclass(frozen=True, slots=True)
class Unread:
    """Row whose values cannot be read.

    Attributes:
        name: Key of the job.
        reason: Reason in words.
        error: The error.
    """

    name: str
    reason: str
    error: NotReadable | LimitExceeded | None = field(default=None, compare=False, repr=False)

    @classmethod
    def because(cls, name: str, error: NotReadable | LimitExceeded) -> Unread:
        """Create from an error, without its location, which is known."""
        return cls(name, error.what if error.hint is None else f"{error.what}; {error.hint}", error)


class Done(NamedTuple, Generic[Result]):
    """Finished job.

    Attributes:
        job: The job.
        result: Result of the task, or an `Unread` if a row cannot be read.
        lost: Losses of casts inside the rows, or None.
    """

    job: Job
    result: Result | Unread
    lost: Losses | None = None


class Engine(ABC):
    """Runs jobs.

    Attributes:
        label: Name in messages.
    """

    label: str

    @abstractmethod
    def run(
        self, jobs: Iterable[Job], task: Task[Part, Result], *, progress: Progress | None = None
    ) -> Iterator[Done[Result]]:
        """Yield every job with its result, as they finish, in any order.

        A row without values (`NotReadable`), or beyond a limit (`LimitExceeded`), gives an `Unread` as result. Damage
        raises an error. Leaving the iterator early, any exception, and Ctrl-C stop the work: afterwards, none of its
        threads is running.

        Args:
            jobs: Jobs to run.
            task: Work to do on each.
            progress: Callback with the bytes done so far and in total, called at most ten times a second, and at the
                end.

        Raises:
            TruncatedFile: A file ended inside a tensor.
            SourceError: A file cannot be read, or changed while it was read.
        """

    def map(
        self, jobs: Iterable[Job], task: Task[Part, Result], *, progress: Progress | None = None
    ) -> dict[str, Result]:
        """Results of `run` by key, in job order.

        Raises:
            NotReadable, LimitExceeded: A row cannot be read.
        """
        listed = list(jobs)
        found: dict[str, Result] = {}
        for job, result, _ in self.run(listed, task, progress=progress):
            if isinstance(result, Unread):
                raise result.error or NotReadable(result.reason, where=job.key)
            found[job.key] = result
        return {job.key: found[job.key] for job in listed}


def jobs_of(source: Source, names: Iterable[str] | None = None) -> list[Job]:
    """One job per tensor of a source, or per given name.

    Raises:
        UnknownName: The source has no such tensor.
        NotReadable: A tensor is lazy, without values.

    >>> import numpy as np
    >>> from torchparams.testing import MemorySource
    >>> [job.key for job in jobs_of(MemorySource({"a": np.ones(3), "b": np.ones(2)}))]
    ['a', 'b']
    """
    infos = source.infos()
    if names is None:
        return [Job(info.name, (source.row(info.name, info),)) for info in infos.values()]
    listed = [infos[name] if name in infos else infos[source.resolve(name)] for name in names]
    return [Job(info.name, (source.row(info.name, info),)) for info in listed]


def readable_jobs(
    source: Source, infos: Iterable[ParameterInfo], held: Mapping[str, Any] | None = None
) -> tuple[list[Job], list[Unread]]:
    """One job per tensor with values; and the other tensors, with the reason.

    Args:
        source: Source of the tensors.
        infos: Infos of the tensors.
        held: Tensors by canonical name, if a reading of a live source already found them.

    >>> import numpy as np
    >>> from torchparams.testing import MemorySource
    >>> source = MemorySource({"a": np.ones(3)})
    >>> jobs, unread = readable_jobs(source, source.infos().values())
    >>> [job.key for job in jobs], unread
    (['a'], [])
    """
    jobs: list[Job] = []
    unread: list[Unread] = []
    for info in infos:
        try:
            if info.device == "meta":  # raises before an engine would loop over terabytes of nothing
                source.numpy(info.name)
            row = source.row(info.name, info)
            if held is not None and isinstance(row, Stored):
                row.held = held[info.name]
            jobs.append(Job(info.name, (row,)))
        except (NotReadable, LimitExceeded) as error:
            unread.append(Unread.because(info.name, error))
    return jobs, unread


def stored_bits(dtype: DType, packed: bool) -> int:
    """Bits per element in a block."""
    return dtype.bits if packed or dtype.bits >= 8 else 8
