"""The contract of engines: jobs of rows go in, and a task's results come out.

A **job** names the rows that are read together: one, or several with the same count of elements in step. A **task**
says what is done with them: for each job, or each part of a large one, the engine makes a **fold**, gives it the blocks
one after the other, and asks it for its result; the task combines the results of a job's parts, in order, to its own.

A row is an expression. One that is a byte range of a file is read as bytes; any other is computed block by block, in
memory that depends neither on its size nor on how many tensors it is made of.

A job is cut at the same elements for any number of threads. So a fold that is a function of its blocks gives the same
numbers everywhere, even if its sums are rounded.

To add an engine, subclass `Engine`, write `run`, and let its tests subclass `torchparams.testing.EngineTests`.
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


@dataclass(slots=True, eq=False)  # not frozen: there may be a hundred thousand, and that would double their time
class Job:
    """Rows that are read together, in step. Nothing changes one after it is made.

    Attributes:
        key: The name of the result.
        rows: Expressions, each with as many elements as the others.
        nbytes: Bytes of all of them.
    """

    key: str
    rows: tuple[Expression, ...]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        rows = self.rows
        if len(rows) != 1 and len({row.numel for row in rows}) != 1:
            pairs = ", ".join(f"{row.summary()} of {_origin(row)} has {row.numel}" for row in rows)
            raise MismatchError(f"tensors that are read in step have one count of elements: {pairs}")
        self.nbytes = 0  # asked for at every step of a run, so it is counted once
        for row in rows:
            self.nbytes += row.nbytes

    @staticmethod
    def of(*operands: tuple[Source, str], key: str | None = None) -> Job:
        """The job of reading one tensor, or several of equal numel.

        Args:
            operands: A source, and the name of a tensor in it; for each tensor.
            key: The name of the result; that of the first tensor unless given.

        Raises:
            MismatchError: The tensors have different numel.
            NotReadable: A tensor is lazy and has no values.
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
        """Count of elements of each row."""
        return self.rows[0].numel

    @property
    def dtype(self) -> DType:
        """Element type of the first row."""
        return self.rows[0].dtype


def _origin(row: Expression) -> str:
    return next((leaf.source.label for leaf in row.leaves()), "nothing")


class Fold(Protocol[PartOut]):
    """The work on the blocks of a job, or of a part of one. One thread uses it, from begin to end."""

    @property
    def update(self) -> Callable[..., None]:
        """A method that takes the next block of each row: `update(block)`, or `update(of_a, of_b)`.

        They hold the same elements each. Blocks come in order, without gaps.
        """

    def finish(self) -> PartOut:
        """The result; called once, after the last block. A tensor without elements has no block."""


class Task(ABC, Generic[Part, Result]):
    """Work to do on every job. It pickles, so that engines can send it to other processes.

    Attributes:
        order: `any` where a job may be cut into parts with a fold each; `stream` where one fold must see all of a job,
            from its first element to its last. Then a single large tensor is not spread over threads.
    """

    order: Literal["any", "stream"] = "any"

    @abstractmethod
    def begin(self, job: Job) -> Fold[Part]:
        """Make the fold of a job, or of one of its parts. Called in any thread."""

    @abstractmethod
    def combine(self, job: Job, parts: Sequence[Part]) -> Result:
        """Make a job's result from those of its parts, at least one, in order. Called in any thread."""

    def takes(self, job: Job) -> bool:
        """Whether `many` takes a job, which has one row: its result there is the one that a fold would give."""
        return False

    def many(self, jobs: Sequence[Job], buffer: memoryview | None, starts: Sequence[int]) -> Sequence[Result]:
        """Make the results of many small jobs at once; an engine may call it in place of `begin` and `combine`.

        Args:
            jobs: Jobs that `takes` has said yes to.
            buffer: Bytes that the row of each lies in, as in a file: in C order, contiguous, little-endian. They are
                valid only during the call. None where the rows lie in live memory.
            starts: Where in the buffer the row of each job begins; or its address.
        """
        raise NotImplementedError


class Folding(Task[Part, Result]):
    """A task of two functions, for engines that run in this process.

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
        """What the first function gives."""
        return self._begin(job)

    def combine(self, job: Job, parts: Sequence[Part]) -> Result:
        """What the second function gives."""
        return self._combine(job, parts)


@dataclass(frozen=True, slots=True)
class Unread:
    """A row whose values cannot be read.

    Attributes:
        name: The job's key.
        reason: The reason, in words.
        error: The error itself.
    """

    name: str
    reason: str
    error: NotReadable | LimitExceeded | None = field(default=None, compare=False, repr=False)

    @classmethod
    def because(cls, name: str, error: NotReadable | LimitExceeded) -> Unread:
        """The record of an error, without its place, which is known."""
        return cls(name, error.what if error.hint is None else f"{error.what}; {error.hint}", error)


class Done(NamedTuple, Generic[Result]):
    """A job that is done.

    Attributes:
        job: The job.
        result: What the task made of it; an `Unread` where a row cannot be read.
        lost: What casts within its rows lost; None where nothing was.
    """

    job: Job
    result: Result | Unread
    lost: Losses | None = None


class Engine(ABC):
    """Where and how jobs run.

    Attributes:
        label: The name in messages.
    """

    label: str

    @abstractmethod
    def run(
        self, jobs: Iterable[Job], task: Task[Part, Result], *, progress: Progress | None = None
    ) -> Iterator[Done[Result]]:
        """Give every job with its result as it gets done, in no particular order.

        A row that has no values (`NotReadable`), or more than a limit allows (`LimitExceeded`), is a result: an
        `Unread`. Damage is an error. Leaving the iterator early, an exception in anything that is called here, and
        Ctrl-C all stop the work: when control is back, no thread of it runs any more.

        Args:
            jobs: What is to be read.
            task: What is done with it.
            progress: Called with bytes done and bytes in all, at most ten times a second, and at the end.

        Raises:
            TruncatedFile: A file ended before a tensor did.
            SourceError: A file was written to while it was read, or cannot be read.
        """

    def map(
        self, jobs: Iterable[Job], task: Task[Part, Result], *, progress: Progress | None = None
    ) -> dict[str, Result]:
        """The results of `run` by the jobs' keys, in the order of the jobs.

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
    """One job for each tensor of a source, or for each of `names`.

    Raises:
        UnknownName: The source has no such tensor.
        NotReadable: A tensor is lazy and has no values.

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
    """One job for each tensor that has values, and the others with the reason.

    Args:
        source: The source.
        infos: Records of the tensors.
        held: Canonical name → tensor, where a reading of a live source has found them: none is looked up again.

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
            if info.device == "meta":  # says so itself, before an engine goes through terabytes of nothing
                source.numpy(info.name)
            row = source.row(info.name, info)
            if held is not None and isinstance(row, Stored):
                row.held = held[info.name]
            jobs.append(Job(info.name, (row,)))
        except (NotReadable, LimitExceeded) as error:
            unread.append(Unread.because(info.name, error))
    return jobs, unread


def stored_bits(dtype: DType, packed: bool) -> int:
    """Bits that one element takes in a block."""
    return dtype.bits if packed or dtype.bits >= 8 else 8
