"""What an engine is: it takes jobs, reads their tensors in blocks, and says what came out.

A **job** names the tensors that are read together: one, or several of equal numel in step. For each
job, or for each part of a large one, the engine makes a **fold**, gives it the blocks one after the
other, and asks it for its result; the results of a job's parts, in the order of their places, are
combined to the job's own.

    engine.run(jobs, begin=lambda job: MyFold(job), combine=lambda job, parts: sum(parts))

Where a job is cut does not depend on how many threads there are. So a fold that is a function of
its blocks gives the same numbers everywhere, even if its sums are rounded.

To add an engine, subclass `Engine`, write `run`, and let its tests subclass
`torchparams.testing.EngineTests`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torchparams.errors import MismatchError, NotReadable

if TYPE_CHECKING:
    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

    Array = np.ndarray[Any, Any]

Part = TypeVar("Part")
Result = TypeVar("Result")
PartOut = TypeVar("PartOut", covariant=True)

Progress = Callable[[int, int], None]
"""Told bytes read so far and bytes in all; called in the thread that iterates over the results."""


@dataclass(frozen=True, slots=True)
class Job:
    """Tensors that are read together, in step.

    Attributes:
        key: What the result is known by: the name of the (first) tensor, unless it was given.
        operands: Where each tensor comes from, and its record.
        nbytes: Bytes of all its tensors.
    """

    key: str
    operands: tuple[tuple[Source, ParameterInfo], ...]
    nbytes: int

    @staticmethod
    def of(*operands: tuple[Source, str], key: str | None = None) -> Job:
        """The job of reading one tensor, or several of equal numel.

        Args:
            operands: A source, and the canonical name in it; for each tensor.
            key: What the result is known by.

        Raises:
            MismatchError: The tensors have different numel.
            NotReadable: A tensor is lazy and has no values.
            UnknownName: A source has no such tensor.

        >>> import numpy as np
        >>> from torchparams.testing import MemorySource
        >>> Job.of((MemorySource({"w": np.ones(3)}), "w")).numel
        3
        """
        found = tuple((source, source.info(source.resolve(name))) for source, name in operands)
        return Job.of_infos(*found, key=key)

    @staticmethod
    def of_infos(*operands: tuple[Source, ParameterInfo], key: str | None = None) -> Job:
        """The same for records that are known already: cheaper where there are thousands."""
        for source, info in operands:
            if info.shape is None:
                raise NotReadable(f"{info.name} {info.shapeless}", where=source.label)
        if len(operands) != 1 and len({info.numel for _, info in operands}) != 1:
            pairs = ", ".join(f"{info.name} of {source.label} has {info.numel}" for source, info in operands)
            raise MismatchError(f"tensors that are read in step have one count of elements: {pairs}")
        nbytes = 0  # asked for at every step of a run, so it is counted once
        for _, info in operands:
            nbytes += info.dtype.nbytes(info.numel)
        return Job(operands[0][1].name if key is None else key, operands, nbytes)

    @property
    def info(self) -> ParameterInfo:
        """The record of the first tensor."""
        return self.operands[0][1]

    @property
    def numel(self) -> int:
        """Count of elements of each tensor."""
        return self.info.numel


class Fold(Protocol[PartOut]):
    """What is done with the blocks of a job, or of a part of one. One thread uses it, from begin to end."""

    @property
    def update(self) -> Callable[..., None]:
        """A method that takes the next block of each operand: `update(block)`, or `update(of_a, of_b)`.

        They hold the same elements each. Blocks come in order, without gaps.
        """

    def finish(self) -> PartOut:
        """The result; called once, after the last block. A tensor without elements has none."""


class Engine(ABC):
    """Where and how jobs run.

    Attributes:
        label: What messages call it.
    """

    label: str

    @abstractmethod
    def run(
        self,
        jobs: Iterable[Job],
        begin: Callable[[Job], Fold[Part]],
        combine: Callable[[Job, Sequence[Part]], Result],
        *,
        ordered: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Job, Result]]:
        """Give every job and its result, as they get done: in no particular order.

        Leaving the iterator early, an exception in anything that is called here, and Ctrl-C all stop the
        work: when control is back, no thread of it runs any more.

        Args:
            jobs: What is to be read.
            begin: Makes the fold of a job, or of each of its parts. May be called in any thread.
            combine: Makes the job's result from those of its parts, in the order of their places. There is at least
                one. May be called in any thread.
            ordered: Whether one fold must see all of a job, from its first element to its last. Then a single large
                tensor is not spread over threads.
            progress: Told how far it is, at most ten times a second, and at the end.

        Raises:
            TruncatedFile: A file ended before a tensor did.
            SourceError: A file was written to while it was read; or a source cannot give a tensor.
        """

    def map(
        self,
        jobs: Iterable[Job],
        begin: Callable[[Job], Fold[Part]],
        combine: Callable[[Job, Sequence[Part]], Result],
        *,
        ordered: bool = False,
        progress: Progress | None = None,
    ) -> dict[str, Result]:
        """The results of `run` by the jobs' keys, in the order of the jobs."""
        listed = list(jobs)
        found = {
            job.key: result for job, result in self.run(listed, begin, combine, ordered=ordered, progress=progress)
        }
        return {job.key: found[job.key] for job in listed}


def jobs_of(source: Source, names: Iterable[str] | None = None) -> list[Job]:
    """One job for each tensor of a source, or for each of `names`.

    Raises:
        UnknownName: The source has no such tensor.

    >>> import numpy as np
    >>> from torchparams.testing import MemorySource
    >>> [job.key for job in jobs_of(MemorySource({"a": np.ones(3), "b": np.ones(2)}))]
    ['a', 'b']
    """
    infos = source.infos()
    if names is None:
        return [Job.of_infos((source, info)) for info in infos.values()]
    return [Job.of_infos((source, infos[name] if name in infos else infos[source.resolve(name)])) for name in names]


def stored_bits(dtype: DType, packed: bool) -> int:
    """Bits that one element takes in a block."""
    return dtype.bits if packed or dtype.bits >= 8 else 8
