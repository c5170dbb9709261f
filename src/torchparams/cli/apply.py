"""`torchparams apply`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, app, show
from torchparams.cli.convert import Base, Destination, DryRun, Force, Memory, ShardSize, Shared


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
    from torchparams.render.progress import progress

    plan = apply_delta(
        base, delta, target, shared=shared, max_shard_size=max_shard_size, memory=memory, overwrite=force
    )
    if dry_run:
        show(plan, as_json)
        return
    with progress("writing") as tell:
        written = plan.run(tell)
    show(written, as_json)
