"""Writes what the ranks of a process group keep together: the lowest rank writes, the others serve their parts."""

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
    """Run a plan with sharded tensors; all of their ranks call it.

    A tensor that other ranks have under the same name and do not share with the writer (a plain one, or a DTensor on
    another mesh) has to be the same there: its digests are compared first.

    Args:
        plan: The plan, the same on every rank.
        shards: The sharded tensors in it.
        progress: Told bytes written, on the rank that writes.

    Raises:
        PlanError: A parameter is another tensor on other ranks: what is written would lack it.
        RanksError: A rank does not make the call, or fails in it.
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
        except Exception as error:  # the others wait for this rank
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
    """Refuse parameters that are different tensors on the ranks; notes on buffers that are."""
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
            f"{plural(len(wrong), 'parameter is', 'parameters are')} different tensors on the ranks: {listed(wrong)}",
            where=plan.path,
            exists=f"one file would hold those of rank {team.members[0]} alone",
            hint="write them apart, each rank to a path of its own",
        )
    if different:
        return [f"different on the ranks: {listed(different)}; those of rank {team.members[0]} are written"]
    return []


def _is_copy(output: Output, team: Ranks) -> bool:
    """Whether an output is made of live tensors that other ranks of the team have for themselves."""
    shards = shards_in(output.expression)
    if any(shard.layout.ranks != team.members for shard in shards):
        return True
    return not shards and any(leaf.source.borrowed for leaf in output.expression.leaves())
