"""Rules about models that several ranks share: replicas, shards, flat parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.lint.findings import AuditRule, Hit
from torchparams.names import common
from torchparams.render.tree import listed, plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchparams.lint.context import Context


def _requires_grad(context: Context) -> Iterator[Hit]:
    if context.across is None:
        return
    names = tuple(name for name, flags in context.across.trainable.items() if len(set(flags)) > 1)
    if names:
        what = f"{plural(len(names), 'parameter is', 'parameters are')} frozen on some ranks and trainable on others"
        yield Hit(names, what, "tp.freeze(model, …)  # the same on every rank, before wrapping", _path(names))


def _different(context: Context) -> Iterator[Hit]:
    if context.across is None or not context.across.different:
        return
    different = context.across.different
    names = tuple(different)
    ranks = sorted({rank for those in different.values() for rank in those})
    first = context.across.team.members[0]
    what = (
        f"{plural(len(names), 'parameter has', 'parameters have')} other values on {_ranks(ranks)} than on rank {first}"
    )
    fix = "for p in model.parameters(): torch.distributed.broadcast(p.detach(), 0)  # unless they are different experts"
    yield Hit(names, what, fix, _path(names))


def _frozen_in_flat(context: Context) -> Iterator[Hit]:
    groups: dict[int, list[str]] = {}
    for name, info in context.infos.items():
        if info.sharding is not None and info.sharding.part is not None:
            groups.setdefault(info.sharding.part.group, []).append(name)
    for names in groups.values():
        frozen = tuple(name for name in names if not context.infos[name].requires_grad)
        if frozen and len(frozen) < len(names):
            what = (
                f"{plural(len(frozen), 'frozen parameter shares', 'frozen parameters share')} a flat parameter with "
                f"{plural(len(names) - len(frozen), 'trainable one')}"
            )
            fix = "FullyShardedDataParallel(model, auto_wrap_policy=…)  # frozen and trainable modules apart"
            yield Hit(frozen, what, fix, _path(frozen))


def _path(names: tuple[str, ...]) -> str:
    return common(name.rpartition(".")[0] for name in names)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"the ranks {listed(map(str, ranks), 8)}"


_DDP = (
    "rank = torch.distributed.get_rank()\n"
    "model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))\n"
)
_FSDP = (
    "from torch.distributed.fsdp import FullyShardedDataParallel\n"
    "from torch.distributed.fsdp.wrap import ModuleWrapPolicy\n\n"
    "model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))\n"
    "model[0].requires_grad_(False)\n"
    "options = {'use_orig_params': True, 'device_id': torch.device('cpu')}\n"
)

RULES = (
    AuditRule(
        "D101",
        "frozen-somewhere",
        "error",
        "A parameter that is frozen on some ranks and trainable on others",
        "the ranks wait for each other's gradients, and some never come: training hangs, or replicas drift apart",
        _requires_grad,
        _DDP + "model.module[0].weight.requires_grad_(rank == 0)\n",
        _DDP,
        "Rules about ranks run where several share a model: with `DistributedDataParallel`, DTensors or FSDP. Then "
        "all ranks make the call.",
        ranks=2,
    ),
    AuditRule(
        "D102",
        "replicas-differ",
        "error",
        "A parameter whose replicas have different values",
        "each rank trains another model, and the averaged gradients fit none of them",
        _different,
        _DDP + "nn.init.constant_(model.module[0].bias, rank)\n",
        _DDP + "nn.init.constant_(model.module[0].bias, 1.0)\n",
        "Where ranks keep different experts under one name, that is meant: suppress it for them. Buffers are not "
        "compared: running statistics differ between ranks.",
        ranks=2,
    ),
    AuditRule(
        "D103",
        "frozen-in-flat",
        "note",
        "A frozen parameter in a flat parameter with trainable ones",
        "FSDP1 gathers it, and keeps memory for its gradient, as if it were trained",
        _frozen_in_flat,
        _FSDP + "model = FullyShardedDataParallel(model, **options)\n",
        _FSDP + "model = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), **options)\n",
        ranks=2,
    ),
)
