"""Write tensors that are sharded over the ranks of a process group: one rank writes, the others send their parts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torchparams.edit.write.execute import execute
from torchparams.engines.base import Job
from torchparams.engines.distributed import DistributedEngine
from torchparams.engines.fetching import Fetching, serve
from torchparams.engines.ranks import Ranks, described, fingerprint
from torchparams.errors import PlanError
from torchparams.expressions.sharded import shards_in
from torchparams.measure.hashing import DigestTask
from torchparams.render.tree import listed, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.edit.plan.layout import Output, Writable
    from torchparams.edit.plan.written import Written
    from torchparams.engines.base import Progress
    from torchparams.expressions.sharded import Sharded


def execute_together(plan: Writable, shards: Sequence[Sharded], progress: Progress | None = None) -> Written:
    """Run a plan with sharded tensors; all of their ranks must call this function.

    Other ranks may have a tensor with the same name that is not shared with the writer (a plain tensor, or a DTensor on
    another mesh). Its values must be equal on all ranks, so its digests are compared first.

    Args:
        plan: The plan, the same on every rank.
        shards: The sharded tensors in it.
        progress: Callback with the bytes written so far and in total, on the rank that writes.

    Raises:
        PlanError: A parameter has different values on the ranks, so one file cannot hold it.
        RanksError: A rank did not make the call, or failed in it.
    """
    team = Ranks(rank for shard in shards for rank in shard.layout.ranks)
    texts = (f"{output.name} {list(output.expression.shape)} {output.expression.dtype}" for output in plan.outputs)
    team.meet(f"write {plural(len(plan.outputs), 'tensor')} ({fingerprint(texts)})")
    notes = _compare_copies(plan, team)
    failed: BaseException | None = None
    written: Written | None = None
    if team.is_first:
        try:
            with Fetching(team, shards):
                written = execute(plan, progress)
        except Exception as error:  # the other ranks wait for this rank
            failed = error
    else:
        serve(team, shards)
    heard = team.gather((described(failed), written))
    if failed is not None:
        raise failed
    team.refuse([error for error, _ in heard])
    made: Written | None = heard[0][1]
    assert made is not None
    return replace(made, notes=(*made.notes, *notes))


def _compare_copies(plan: Writable, team: Ranks) -> list[str]:
    """Raise for parameters that differ between ranks; return notes for buffers that differ."""
    copies = [output for output in plan.outputs if _is_copy(output, team)]
    jobs = [Job(output.name, (output.expression,)) for output in copies]
    digests = DistributedEngine().map(jobs, DigestTask())
    heard = team.gather(digests)
    buffers = {
        output.name for output in copies if all(leaf.info.kind == "buffer" for leaf in output.expression.leaves())
    }
    different = [name for name in heard[0] if any(other.get(name) != heard[0][name] for other in heard[1:])]
    wrong = [name for name in different if name not in buffers]
    if wrong:
        raise PlanError(
            f"{plural(len(wrong), 'parameter has', 'parameters have')} different values on the ranks: {listed(wrong)}",
            where=plan.path,
            exists=f"one file would only hold the values of rank {team.members[0]}",
            hint="write them separately, each rank to its own path",
        )
    if different:
        return [f"different on the ranks: {listed(different)}; the values of rank {team.members[0]} are written"]
    return []


def _is_copy(output: Output, team: Ranks) -> bool:
    """Whether an output uses live tensors of which the other ranks have their own copies."""
    shards = shards_in(output.expression)
    if any(shard.layout.ranks != team.members for shard in shards):
        return True
    return not shards and any(leaf.source.borrowed for leaf in output.expression.leaves())
