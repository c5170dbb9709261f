"""`torchparams apply`."""

from __future__ import annotations

from torchparams.cli import options, plans
from torchparams.cli.options import argument, command
from torchparams.cli.plans import carry_out


@command
@plans.base
@argument("delta", metavar="DELTA", help="A delta file, written by torchparams delta or torchparams.save.")
@plans.destination
@plans.shared
@plans.max_shard_size
@plans.memory
@plans.force
@plans.dry_run
@options.as_json
def apply(
    base: str,
    delta: str,
    target: str,
    shared: str | None,
    max_shard_size: str | None,
    memory: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Apply a delta to its base, bit for bit.

    Raises an error if the delta belongs to another base.

    \b
    Examples:
      torchparams apply base.safetensors delta.safetensors tuned.safetensors
      torchparams apply base/ delta.safetensors tuned/ --max-shard-size 5GB
      torchparams apply base.safetensors delta.safetensors tuned.pt --dry-run
    """
    from torchparams.edit.save import apply_delta

    plan = apply_delta(
        base, delta, target, shared=shared, max_shard_size=max_shard_size, memory=memory, overwrite=force
    )
    carry_out(plan, "writing", dry_run=dry_run, as_json=as_json)
