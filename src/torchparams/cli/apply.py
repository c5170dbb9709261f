"""`torchparams apply`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, app
from torchparams.cli.plans import Base, Destination, DryRun, Force, Memory, ShardSize, Shared, carry_out


@app.command()
def apply(
    base: Base,
    delta: Annotated[
        str,
        typer.Argument(
            metavar="DELTA", help="What torchparams delta wrote, or torchparams.save with a base.", show_default=False
        ),
    ],
    target: Destination,
    shared: Shared = None,
    max_shard_size: ShardSize = None,
    memory: Memory = "256MiB",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Put a delta back on its base, bit for bit.

    A base that is not the one of the delta is refused.

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
