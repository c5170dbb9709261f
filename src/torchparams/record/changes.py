"""Norms of the changes between two checkpoints, in one pass over both.

`diff` sums exactly, and counts much more; its rows give the norms where sums of squares could overflow or underflow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchparams.engines.base import Job, Task, Unread
from torchparams.engines.by_name import named
from torchparams.engines.distributed import engine_for
from torchparams.errors import LimitExceeded, NotReadable
from torchparams.measure.diff import diff
from torchparams.sketch.moments import square_distance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.engines.base import Engine
    from torchparams.io.blocks import Block
    from torchparams.parameters import Parameters

QUICK = ("float32", "bfloat16", "float16")
"""Dtypes whose squares fit into float64."""


def changes(a: Parameters, b: Parameters, engine: Engine | str | None = None) -> dict[str, float]:
    """L2 norms of the differences of the parameters that two tables share, by name; shapes are equal.

    A norm is not finite if an element is not.

    Args:
        a, b: Tables of parameters.
        engine: Engine to run on; by default, a `ThreadEngine` that memory-maps files.

    Raises:
        SourceError: A source cannot be read.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> a, b = ({"w": np.array([3, x], np.float32)} for x in (4, 3))
    >>> changes(tp.of(a), tp.of(b))
    {'w': 1.0}
    """
    in_a, in_b = a.infos, b.infos
    both = [name for name, info in in_a.items() if name in in_b and info.shape == in_b[name].shape]
    codes = {name for params in (a, b) for name, coded in params.source.coded().items() if not coded.numbers}
    jobs, others = [], []
    for name in both:
        if name in codes:
            continue
        if in_a[name].dtype != in_b[name].dtype or str(in_a[name].dtype) not in QUICK:
            others.append(name)
            continue
        try:
            jobs.append(Job(name, (a.source.row(name, in_a[name]), b.source.row(name, in_b[name]))))
        except (NotReadable, LimitExceeded):
            continue
    engine = named(engine) or engine_for(jobs)
    found = {}
    for job, result, _ in engine.run(jobs, ChangeTask()):
        if not isinstance(result, Unread):
            found[job.key] = math.sqrt(result)
    if others:
        for row in diff(a.select(others), b.select(others), numeric=True, engine=engine):
            if row.compared is not None and not row.opaque:
                found[row.name] = row.compared.distance
    return found


class ChangeTask(Task[float, float]):
    """Task that adds the squares of the differences of two tensors."""

    def begin(self, job: Job) -> ChangeFold:
        """Start an empty sum."""
        return ChangeFold(str(job.dtype))

    def combine(self, job: Job, parts: Sequence[float]) -> float:
        """Add the sums."""
        return sum(parts)


class ChangeFold:
    """Fold that adds the squares of differences.

    Args:
        dtype: Dtype of both tensors.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._sum = 0.0

    def update(self, a: Block, b: Block) -> None:
        """Add a block of each tensor."""
        self._sum += square_distance(self._dtype, b.data, a.data)

    def finish(self) -> float:
        """Return the sum of squares."""
        return self._sum
