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
    """Fold that builds a sketch.

    Args:
        dtype: Dtype of the job's single row.

    Raises:
        NotReadable: The dtype is packed or quantised, so its bits are not numbers.
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
        """Sketch of all blocks."""
        from torchparams.sketch import Sketch

        return Sketch.empty(self._dtype) if self._counter is None else Sketch(self._dtype, self._counter.finish())


class SketchTask(Task["Sketch", "Sketch"]):
    """Task that builds the sketch of each tensor."""

    def begin(self, job: Job) -> SketchFold:
        """Start an empty sketch."""
        return SketchFold(job.dtype)

    def combine(self, job: Job, parts: Sequence[Sketch]) -> Sketch:
        """Merge the sketches of the parts."""
        return parts[0] if len(parts) == 1 else parts[0].merge(parts)


def sketches(
    source: Source,
    names: Iterable[str] | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Sketch]]:
    """Yield the name and sketch of each tensor, as they finish.

    Args:
        source: Source of the tensors.
        names: Canonical names; None for all.
        engine: Engine to run on; by default, a `ThreadEngine`.
        progress: Callback with the bytes read so far and in total.

    Raises:
        UnknownName: The source has no such tensor.
        NotReadable: The values of a tensor cannot be read, or are not numbers.
        TruncatedFile: A file ended inside a tensor.

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
