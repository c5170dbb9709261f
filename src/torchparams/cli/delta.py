"""`torchparams delta`."""

from __future__ import annotations

from torchparams.cli import options, plans
from torchparams.cli.options import argument, command
from torchparams.cli.plans import carry_out


@command
@plans.base
@argument("source", metavar="TUNED", help="A checkpoint tuned from the base.")
@argument("target", metavar="DELTA", help="Output file (.safetensors).")
@options.select
@plans.memory
@plans.force
@plans.dry_run
@options.as_json
def delta(
    base: str, source: str, target: str, select: str | None, memory: str, force: bool, dry_run: bool, as_json: bool
) -> None:
    """Write only the tensors that differ from a base.

    torchparams apply restores the complete checkpoint.

    \b
    Examples:
      torchparams delta base.safetensors tuned.safetensors delta.safetensors
      torchparams delta base/ tuned/ delta.safetensors -s 'layers.{20..31}.**'
      torchparams apply base.safetensors delta.safetensors tuned-again.safetensors
    """
    from torchparams.edit.save import delta as planned

    plan = planned(source, base, target, select, memory=memory, overwrite=force)
    carry_out(plan, "writing", dry_run=dry_run, as_json=as_json)
