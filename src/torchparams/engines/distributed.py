"""Engine for live sharded models: runs on every rank, over the existing process group.

A job over sharded tensors runs in one of two ways:

- **Folded in place**: each rank folds its own parts (of replicas, one copy). Then the ranks exchange the results of the
  parts, and each rank combines them for a share of the jobs. Sketches and exact sums do not depend on how elements are
  cut, so the result equals that of the whole tensor, bit for bit. All jobs together take one gather of parts, and one
  of results: if every rank combined everything after the first, that would take longer than the second.
- **Fetched**: if the fold needs the elements in order (`digest`), if a row computes with a sharded tensor (a cast, a
  merge), or if ranks hold summands (`Partial`), the lowest rank of the tensor runs the job, and asks the others for
  elements, block by block.

Jobs over plain tensors run on each rank separately, because each rank has its own tensor.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from zlib import crc32

from torchparams.engines.base import Done, Engine, Job, Task, Unread
from torchparams.engines.fetching import Fetching, serve
from torchparams.engines.ranks import Ranks, described, fingerprint
from torchparams.engines.threads import ThreadEngine
from torchparams.errors import NotReadable, RanksError
from torchparams.expressions.base import Stored
from torchparams.expressions.sharded import Sharded, part_of, shards_in
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torchparams.engines.base import Fold, Progress
    from torchparams.expressions.base import Expression
    from torchparams.expressions.casts import Losses

Part = TypeVar("Part")
Result = TypeVar("Result")


def engine_for(jobs: Sequence[Job], *, mapped: bool = True) -> Engine:
    """Default engine for jobs: threads of this process, together with the other ranks if tensors are sharded.

    Args:
        jobs: Jobs to run.
        mapped: See `ThreadEngine`.
    """
    inner = ThreadEngine(mapped=mapped)
    return DistributedEngine(inner) if any(map(_shards_of, jobs)) else inner


def _shards_of(job: Job) -> list[Sharded]:
    # Nearly all rows are stored tensors, and there may be 100,000.
    return [shard for row in job.rows if type(row) is not Stored for shard in shards_in(row)]


class DistributedEngine(Engine):
    """Runs jobs over sharded tensors on the ranks that hold them; every rank makes the call.

    Verbs use it automatically for models with DTensors or FSDP's flat parameters. All ranks of these tensors call `run`
    with the same jobs. The ranks first meet, so a call that some ranks do not make ends in an error after
    `limits.RANKS_SECONDS`. Then they fold, and gather twice, parts and results (four collectives of torch, for any
    number of jobs). Jobs without sharded tensors need no communication.

    Every rank gets the same results for sharded tensors, and its own for plain ones. Only the lowest rank reports
    progress.

    Args:
        inner: Engine that reads on each rank; by default, a `ThreadEngine` that memory-maps files.
        seconds: Time to wait for the other ranks; `limits.RANKS_SECONDS` by default.
    """

    label = "distributed"

    def __init__(self, inner: Engine | None = None, *, seconds: float | None = None) -> None:
        self.inner = ThreadEngine(mapped=True) if inner is None else inner
        self.seconds = seconds

    def run(
        self, jobs: Iterable[Job], task: Task[Part, Result], *, progress: Progress | None = None
    ) -> Iterator[Done[Result]]:
        """See `Engine.run`. All ranks of the sharded tensors must call it.

        Raises:
            RanksError: A rank does not make the same call in time, or fails.
        """
        own: list[Job] = []
        folded: list[_Folded] = []
        fetched: list[_Fetched] = []
        unread: list[Done[Any]] = []
        members: set[int] = set()
        for job in jobs:
            shards = _shards_of(job)
            if not shards:
                own.append(job)
                continue
            members.update(rank for shard in shards for rank in shard.layout.ranks)
            ranks = {shard.layout.ranks for shard in shards}
            if len(ranks) > 1:
                which = " and ".join(f"{shard.name} by {_spelled(shard.layout.ranks)}" for shard in shards[:2])
                error = NotReadable(f"the tensors are on different ranks: {which}", where=shards[0].label)
                unread.append(Done(job, Unread.because(job.key, error)))
            elif task.order == "any" and _is_cut_alike(job):
                folded.append(_Folded(job))
            else:
                fetched.append(_Fetched(job, ranks.pop()))
        yield from unread
        if not members:
            yield from self.inner.run(own, task, progress=progress)
            return
        team = Ranks(members)
        progress = progress if team.is_first else None
        team.meet(_call(task, team, [*folded, *fetched]), self.seconds)
        results: list[Done[Any]] = []
        parts: dict[str, Any] = {}
        served: dict[str, Any] = {}
        failed: BaseException | None = None
        try:
            parts = self._fold(folded, task, progress)
            results = list(self.inner.run(own, task, progress=None if folded or fetched else progress))
        except Exception as error:  # the other ranks wait for this one
            failed = error
        if fetched:
            team.agree(failed)
            try:
                served = self._fetch(fetched, task, progress)
            except Exception as error:  # as above
                failed = error
        # Each rank combines a share of the jobs: the parts are sent as bytes, and only that rank reads them.
        sent: dict[int, dict[str, Any]] = {}
        for each in folded:
            if each.job.key in parts:
                sent.setdefault(each.home, {})[each.job.key] = parts[each.job.key]
        packed = {rank: pickle.dumps(several, pickle.HIGHEST_PROTOCOL) for rank, several in sent.items()}
        heard = dict(zip(team.members, team.gather((described(failed), packed, served)), strict=True))
        if failed is not None:
            raise failed
        team.refuse([error for error, _, _ in heard.values()])
        combined: dict[str, tuple[Any, Losses | None]] = {}
        try:
            for_here = {rank: packed.get(team.here) for rank, (_, packed, _) in heard.items()}
            given = {rank: {} if data is None else pickle.loads(data) for rank, data in for_here.items()}
            for each in folded:
                if each.home == team.here:
                    found = {rank: given[rank].get(each.job.key) for rank in each.ranks}
                    combined[each.job.key] = each.combine(task, found)
        except Exception as error:  # as above
            failed = error
        told = dict(zip(team.members, team.gather((described(failed), combined)), strict=True))
        if failed is not None:
            raise failed
        team.refuse([error for error, _ in told.values()])
        yield from results
        for each in folded:
            yield Done(each.job, *told[each.home][1][each.job.key])
        for fetch in fetched:
            yield Done(fetch.job, *heard[fetch.ranks[0]][2][fetch.job.key])

    def _fold(
        self, folded: Sequence[_Folded], task: Task[Any, Any], progress: Progress | None
    ) -> dict[str, tuple[list[Any] | Unread, Losses | None]]:
        """Results of this rank's parts before combining, with the losses of casts, by key."""
        mine = [job for each in folded if (job := each.part()) is not None]
        run = self.inner.run(mine, _Parts(task), progress=progress)
        return {job.key: (result, lost) for job, result, lost in run}

    def _fetch(
        self, fetched: Sequence[_Fetched], task: Task[Any, Any], progress: Progress | None
    ) -> dict[str, tuple[Any, Losses | None]]:
        """Run the jobs of this rank, and serve elements for the others; returns the results by key."""
        found: dict[str, tuple[Any, Losses | None]] = {}
        # All ranks use the same order, larger teams first, so that ranks in two teams meet in the same order.
        for ranks in sorted({each.ranks for each in fetched}, key=lambda ranks: (-len(ranks), ranks)):
            jobs = [each.job for each in fetched if each.ranks == ranks]
            shards = [shard for job in jobs for shard in _shards_of(job)]
            team = Ranks(ranks)
            if not team.is_first:
                serve(team, shards)
                continue
            with Fetching(team, shards):
                for job, result, lost in self.inner.run(jobs, task, progress=progress):
                    found[job.key] = result, lost
        return found


def _call(task: Task[Any, Any], team: Ranks, jobs: Sequence[_Folded | _Fetched]) -> str:
    """Description of the call, equal on all ranks that make the same call.

    Smaller teams may hold further tensors, such as experts, with different names per rank.
    """
    common = [each.job for each in jobs if each.ranks == team.members]
    verb = type(task).__name__.removesuffix("Task").lower()
    texts = (f"{job.key} {[(list(row.shape), str(row.dtype)) for row in job.rows]}" for job in common)
    return f"{verb} of {plural(len(common), 'sharded tensor')} ({fingerprint(texts)})"


def _spelled(ranks: Sequence[int]) -> str:
    return f"ranks {', '.join(map(str, ranks[:8]))}{' …' if len(ranks) > 8 else ''}"


def _is_cut_alike(job: Job) -> bool:
    """Whether every rank can cut the same part of each row of a job."""
    layouts = []
    for row in job.rows:
        if isinstance(row, Sharded):
            if row.reduce is not None:
                return False
            layouts.append(row.layout)
        elif shards_in(row):
            return False
    first = layouts[0]
    if any(layout != first for layout in layouts[1:]):
        return False
    return all(isinstance(row, Sharded) or first.grid in (row.shape, (row.numel,)) for row in job.rows)


class _Fetched(NamedTuple):
    """Job that one rank runs, with the ranks that hold its tensors."""

    job: Job
    ranks: tuple[int, ...]


class _Folded:
    """Job that is folded in parts, one per rank.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        shard = next(row for row in job.rows if isinstance(row, Sharded))
        self.layout = shard.layout
        self.ranks = shard.layout.ranks
        # The name decides which replica is folded, so that the work is spread over ranks.
        turn = crc32(job.key.encode(errors="surrogatepass"))
        self.owners = shard.layout.owners(turn) or self.ranks[:1]
        self.home = self.ranks[turn % len(self.ranks)]  # combines the parts

    def part(self) -> Job | None:
        """Job of this rank's part; None if another rank folds a replica, or the part has no elements.

        For a tensor without elements, the first rank makes the result.
        """
        import torch.distributed as dist

        here = dist.get_rank()
        if here not in self.owners:
            return None
        box = self.layout.boxes[here]
        rows: list[Expression] = [
            row.local if isinstance(row, Sharded) else part_of(row, self.layout.grid, box) for row in self.job.rows
        ]
        return Job(self.job.key, tuple(rows))

    def combine(self, task: Task[Any, Any], found: Mapping[int, Any]) -> tuple[Any, Losses | None]:
        """Combine the results of all parts, and the losses of casts.

        Args:
            task: The task.
            found: Parts and losses by rank, or None.

        Raises:
            RanksError: A rank sent no part.
        """
        parts: list[Any] = []
        lost: Losses | None = None
        for rank in self.owners:
            if found[rank] is None:
                raise RanksError(
                    f"rank {rank} sent no part of {self.job.key!r}", hint="pass the same arguments on every rank"
                )
            part, more = found[rank]
            if isinstance(part, Unread):
                return part, None
            parts += part
            lost = more if lost is None else lost if more is None else lost + more
        return task.combine(self.job, parts), lost


class _Parts(Task[Any, "list[Any]"]):
    """Task that returns the results of another task's parts without combining them."""

    def __init__(self, task: Task[Any, Any]) -> None:
        self._task = task
        self.order = task.order

    def begin(self, job: Job) -> Fold[Any]:
        """Create the fold of the inner task."""
        return self._task.begin(job)

    def combine(self, job: Job, parts: Sequence[Any]) -> list[Any]:
        """Return the parts."""
        return list(parts)
