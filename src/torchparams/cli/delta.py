"""`torchparams delta`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Select, app, union
from torchparams.cli.plans import Base, DryRun, Force, Memory, carry_out


@app.command()
def delta(
    base: Base,
    source: Annotated[
        str,
        typer.Argument(metavar="TUNED", help="The checkpoint that came of the base.", show_default=False),
    ],
    target: Annotated[
        str, typer.Argument(metavar="DELTA", help="A file that ends in .safetensors.", show_default=False)
    ],
    select: Select = None,
    memory: Memory = "256MiB",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write only the tensors that differ from a base.

    torchparams apply makes the whole checkpoint of the two again.

    \b
    Examples:
      torchparams delta base.safetensors tuned.safetensors delta.safetensors
      torchparams delta base/ tuned/ delta.safetensors -s 'layers.{20..31}.**'
      torchparams apply base.safetensors delta.safetensors tuned-again.safetensors
    """
    from torchparams.edit.save import delta as planned

    plan = planned(source, base, target, union(select), memory=memory, overwrite=force)
    carry_out(plan, "writing", dry_run=dry_run, as_json=as_json)
