"""Bitwise equality of the rows of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.engines.base import Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.engines.base import Job
    from torchparams.io.blocks import Block


class SameBits(Task[bool, bool]):
    """Task that compares two rows of one dtype bit by bit.

    >>> import numpy as np
    >>> from torchparams.engines import Job, ThreadEngine
    >>> from torchparams.testing import MemorySource
    >>> source = MemorySource({"a": np.zeros(3), "b": np.zeros(3)})
    >>> ThreadEngine().map([Job.of((source, "a"), (source, "b"))], SameBits())
    {'a': True}
    """

    def begin(self, job: Job) -> _Fold:
        """Start a comparison."""
        return _Fold()

    def combine(self, job: Job, parts: Sequence[bool]) -> bool:
        """Whether all parts are equal."""
        return all(parts)


class _Fold:
    def __init__(self) -> None:
        self._same = True

    def update(self, a: Block, b: Block) -> None:
        import numpy as np

        if not self._same:
            return
        if a.packed == b.packed:
            self._same = bool(np.array_equal(a.data, b.data))
        else:  # one of them has one byte per element
            self._same = bool(np.array_equal(a.values().view(np.uint8), b.values().view(np.uint8)))

    def finish(self) -> bool:
        return self._same
