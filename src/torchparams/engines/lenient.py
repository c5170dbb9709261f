"""Runs that do not end at a tensor without values: what cannot be read is a result among the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.engines.base import Job
from torchparams.engines.sketches import SketchFold, merged
from torchparams.engines.threads import ThreadEngine
from torchparams.errors import LimitExceeded, NotReadable
from torchparams.sources.base import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np

    from torchparams.engines.base import Engine, Progress
    from torchparams.info import Location, ParameterInfo
    from torchparams.io.blocks import Block
    from torchparams.sketch import Sketch


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor whose values cannot be had, and why.

    Attributes:
        name: Its canonical name.
        reason: Why, in words.
    """

    name: str
    reason: str

    @classmethod
    def because(cls, name: str, error: NotReadable | LimitExceeded) -> Unread:
        """The record of `error`, without the name of the place, which is known."""
        return cls(name, error.what if error.hint is None else f"{error.what}; {error.hint}")


class LenientSource(Source):
    """Another source, which gives an array without elements for a tensor whose values cannot be had.

    Damage is still an error: only `NotReadable` and `LimitExceeded` are held back.

    Attributes:
        unread: Canonical name → why; of the tensors asked for so far.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.label, self.format, self.live = source.label, source.format, source.live
        self.unread: dict[str, Unread] = {}

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Those of the other."""
        return self.source.infos()

    def span(self, name: str) -> Location | None:
        """That of the other."""
        return self.source.span(name)

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """The values, or an array without elements."""
        try:
            return self.source.numpy(name)
        except (NotReadable, LimitExceeded) as error:
            import numpy as np

            self.unread[name] = Unread.because(name, error)
            return np.zeros(0, np.uint8)


class _Fold(SketchFold):
    """A `SketchFold` whose result says so where there was nothing to count."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.info.dtype)
        self._name = job.info.name
        source = job.operands[0][0]
        assert isinstance(source, LenientSource)
        self._unread = source.unread

    def update(self, block: Block) -> None:
        if self._name not in self._unread:
            super().update(block)

    def finish(self) -> Any:
        return self._unread.get(self._name) or super().finish()


def lenient_sketches(
    source: Source,
    infos: Iterable[ParameterInfo],
    derive: Callable[[ParameterInfo, Sketch], Any],
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Any]]:
    """Name, and what `derive` makes of record and sketch, for every tensor as it gets done; else an `Unread`.

    Args:
        source: Where the tensors are.
        infos: Their records.
        derive: Called in any thread, once for each tensor that can be read. The sketch is let go unless it keeps it.
        engine: What runs it; a `ThreadEngine` unless given.
        progress: Told bytes read and bytes in all.

    Raises:
        SourceError: A file is damaged, or was written to meanwhile.

    >>> import numpy as np
    >>> from torchparams.testing import MemorySource
    >>> source = MemorySource({"w": np.array([1.0, 2.0])})
    >>> list(lenient_sketches(source, source.infos().values(), lambda info, sketch: sketch.mean))
    [('w', 1.5)]
    """
    from torchparams.sketch.codes import Coding

    lenient = LenientSource(source)
    jobs: list[Job] = []
    unread: list[Unread] = []
    for info in infos:
        try:
            Coding.of(info.dtype)
            if info.device == "meta":  # says so itself, before the engine goes through terabytes of nothing
                source.numpy(info.name)
            jobs.append(Job.of_infos((lenient, info)))
        except NotReadable as error:
            unread.append(Unread.because(info.name, error))

    def combine(job: Job, parts: Sequence[Any]) -> Any:
        lost = next((part for part in parts if isinstance(part, Unread)), None)
        return lost or derive(job.info, merged(job, parts))

    for record in unread:
        yield record.name, record
    for job, result in (engine or ThreadEngine()).run(jobs, _Fold, combine, progress=progress):
        yield job.key, result
