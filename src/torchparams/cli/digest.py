"""`torchparams digest`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import show
from torchparams.cli.complete import files
from torchparams.cli.options import argument, command
from torchparams.cli.targets import build, is_live


@command
@argument(
    "targets",
    metavar="TARGET...",
    nargs=-1,
    required=True,
    help="Checkpoints, directories of shards, or package.module:callable. Several targets are searched for duplicates "
    "together.",
)
@options.select
@click.option("-o", "--output", metavar="FILE", shell_complete=files, help="Write a manifest, for torchparams verify.")
@options.as_json
def digest(targets: tuple[str, ...], select: str | None, output: str | None, as_json: bool) -> None:
    """Compute digests of tensors, and find duplicates.

    Equal weights have equal digests in a .pt file, a .safetensors file and a model.

    A model counts like its state dict. Tied tensors are told apart from copies, and the extra size of copies is shown.

    \b
    Examples:
      torchparams digest model.safetensors
      torchparams digest model.safetensors -o manifest.json     for torchparams verify
      torchparams digest base/ tuned/                           duplicates across both
      torchparams digest model.pt -s 'encoder.**' --json | jq -r .digest
      torchparams digest mypackage.models:build
    """
    from torchparams.measure.digest import digest as digest_of
    from torchparams.measure.digest import duplicates
    from torchparams.render.progress import progress

    if output is not None and len(targets) > 1:
        raise click.BadParameter(f"a manifest covers one target, but there are {len(targets)}", param_hint="-o")
    things = [build(target, device="cpu") if is_live(target) else target for target in targets]
    with progress("hashing") as tell:
        made = digest_of(things[0], select, progress=tell) if len(things) == 1 else None
        several = duplicates(*things, selector=select, progress=tell) if made is None else None
    if made is not None and output is not None:
        for note in made.write(output):
            click.echo(note, err=True)
    if made is None or output is None or as_json:
        show(made or several, as_json)
    else:
        click.echo(f"{made.digest}  {output}")
