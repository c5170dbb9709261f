"""Run a task over the tensors of a table, and name those without values."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torchparams.engines.base import Job, Unread, readable_jobs
from torchparams.engines.by_name import named
from torchparams.engines.distributed import engine_for
from torchparams.expressions.base import Stored
from torchparams.reading import Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.engines.base import Engine, Progress, Task
    from torchparams.expressions.casts import Losses
    from torchparams.parameters import Parameters
    from torchparams.sources.base import Source

Part = TypeVar("Part")
Result = TypeVar("Result")


def reading_of(params: Parameters) -> Reading:
    """Reading of a table; a live model is read once."""
    return params.reading() if params.source.live else Reading(params.infos.values())


def scan(
    source: Source,
    reading: Reading,
    task: Task[Part, Result],
    *,
    whole: bool,
    ordered: bool = True,
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Result | Unread, Losses | None]]:
    """Yield name, result and losses of casts for each tensor, in order of completion.

    Tensors without values, and codes of unknown encodings, are `Unread`.

    Args:
        source: Source of the tensors.
        reading: One reading of it: the tensors to read.
        task: Task to run.
        whole: Whether these are all tensors of the source.
        ordered: Whether the task's result depends on the order of the elements.
        engine: Engine to run on; by default, one that fits the source.
        progress: Callback with the bytes read so far and in total.

    Raises:
        SourceError: The source cannot be read.
    """
    coded = source.coded(reading if whole else None)
    codes = {name for name in reading.names if name in coded and not coded[name].numbers} if coded else set()
    for name in codes:
        yield name, Unread(name, coded[name].reason), None
    readable = [info for info in reading.infos if info.name not in codes] if codes else reading.infos
    jobs, cannot = readable_jobs(source, readable, reading.tensors)
    for each in cannot:
        yield each.name, each, None
    if not ordered:
        jobs = [job if type(job.rows[0]) is Stored else Job(job.key, (job.rows[0].unordered(),)) for job in jobs]
    engine = named(engine) or engine_for(jobs)
    for job, result, losses in engine.run(jobs, task, progress=progress):
        yield job.key, result, losses
