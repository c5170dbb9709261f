"""One task run over the tensors of a table, those without values named."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torchparams.engines.base import Job, Unread, readable_jobs
from torchparams.engines.distributed import engine_for
from torchparams.expressions.base import Stored
from torchparams.records import Records

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.engines.base import Engine, Progress, Task
    from torchparams.expressions.casts import Losses
    from torchparams.parameters import Parameters
    from torchparams.sources.base import Source

Part = TypeVar("Part")
Result = TypeVar("Result")


def records_of(params: Parameters) -> Records:
    """Records of a table; a live model is read once."""
    return params.records() if params.source.live else Records(params.infos.values())


def scan(
    source: Source,
    records: Records,
    task: Task[Part, Result],
    *,
    whole: bool,
    ordered: bool = True,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Result | Unread, Losses | None]]:
    """Name, result and what casts lost, of every tensor, as each gets done.

    Codes of an encoding that is not known are `Unread`, and so is a tensor without values.

    Args:
        source: Where the tensors are.
        records: One reading of it: the tensors to read.
        task: What is done with each.
        whole: Whether these are all tensors of the source.
        ordered: Whether the task's result depends on the order of the elements.
        engine: What runs it; a `ThreadEngine` that maps files unless given.
        progress: Told bytes read and bytes in all.

    Raises:
        SourceError: The source cannot be read.
    """
    coded = source.coded(records if whole else None)
    codes = {name for name in records.names if name in coded and not coded[name].numbers} if coded else set()
    for name in codes:
        yield name, Unread(name, coded[name].reason), None
    readable = [info for info in records.infos if info.name not in codes] if codes else records.infos
    jobs, cannot = readable_jobs(source, readable, records.tensors)
    for each in cannot:
        yield each.name, each, None
    if not ordered:
        jobs = [job if type(job.rows[0]) is Stored else Job(job.key, (job.rows[0].unordered(),)) for job in jobs]
    engine = engine or engine_for(jobs)
    for job, result, losses in engine.run(jobs, task, progress=progress):
        yield job.key, result, losses
