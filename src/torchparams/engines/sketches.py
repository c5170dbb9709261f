"""Sketches of the tensors of a source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.engines.base import Task, Unread, jobs_of
from torchparams.engines.distributed import engine_for
from torchparams.errors import NotReadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torchparams.dtypes import DType
    from torchparams.engines.base import Engine, Job, Progress
    from torchparams.io.blocks import Block
    from torchparams.sketch import Sketch
    from torchparams.sources.base import Source


class SketchFold:
    """The fold that makes a sketch.

    Args:
        dtype: The element type of the job's one tensor.

    Raises:
        NotReadable: It is packed or quantised, not of numbers.
    """

    def __init__(self, dtype: DType) -> None:
        from torchparams.sketch.codes import Coding

        Coding.of(dtype)
        self._dtype = dtype
        self._counter: Any = None

    def update(self, block: Block) -> None:
        """Count a block."""
        if self._counter is None:
            from torchparams.sketch.counter import Counter

            self._counter = Counter(self._dtype, packed=block.packed)
        self._counter.update(block.buffer, block.numel)

    def finish(self) -> Sketch:
        """The sketch of all blocks."""
        from torchparams.sketch import Sketch

        return Sketch.empty(self._dtype) if self._counter is None else Sketch(self._dtype, self._counter.finish())


class SketchTask(Task["Sketch", "Sketch"]):
    """The task that makes the sketch of every tensor."""

    def begin(self, job: Job) -> SketchFold:
        """Count from nothing."""
        return SketchFold(job.dtype)

    def combine(self, job: Job, parts: Sequence[Sketch]) -> Sketch:
        """Add the parts."""
        return parts[0] if len(parts) == 1 else parts[0].merge(parts)


def sketches(
    source: Source,
    names: Iterable[str] | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Sketch]]:
    """Name and sketch of every tensor, or of `names`, as they get done.

    Args:
        source: Where the tensors are.
        names: Canonical names; None for all.
        engine: The engine that runs it; a `ThreadEngine` unless given.
        progress: Called with bytes read and bytes in all.

    Raises:
        UnknownName: The source has no such tensor.
        NotReadable: A tensor's values cannot be read, or are not numbers.
        TruncatedFile: A file ended before a tensor did.

    >>> import numpy as np
    >>> from torchparams.testing import MemorySource
    >>> [(name, sketch.mean) for name, sketch in sketches(MemorySource({"w": np.array([1.0, 2.0])}))]
    [('w', 1.5)]
    """
    jobs = jobs_of(source, names)
    engine = engine or engine_for(jobs, mapped=False)
    for job, result, _ in engine.run(jobs, SketchTask(), progress=progress):
        if isinstance(result, Unread):
            raise result.error or NotReadable(result.reason, where=source.label)
        yield job.key, result
