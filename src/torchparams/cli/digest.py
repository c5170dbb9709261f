"""`torchparams digest`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import FINE, show, status_of
from torchparams.cli.complete import files
from torchparams.cli.options import argument, command
from torchparams.cli.targets import source_of


@command
@argument(
    "targets",
    metavar="TARGET...",
    nargs=-1,
    required=True,
    help="Checkpoints, directories of shards, or package.module:callable. Several targets, and patterns such as "
    "'run/step-*', have a line each, and are searched for duplicates together.",
)
@options.select
@click.option("-o", "--output", metavar="FILE", shell_complete=files, help="Write a manifest, for torchparams verify.")
@options.engine
@options.as_json
def digest(targets: tuple[str, ...], select: str | None, output: str | None, engine: str | None, as_json: bool) -> int:
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
    from torchparams.io.patterns import expanded
    from torchparams.measure.digest import Digests, duplicates_among
    from torchparams.measure.digest import digest as digest_of
    from torchparams.render.progress import progress

    names = expanded(targets)
    if output is not None and len(names) > 1:
        raise click.BadParameter(f"a manifest covers one target, but there are {len(names)}", param_hint="-o")
    kept: list[Digests] = []
    if len(names) > 1:
        from torchparams.measure import several

        with progress("hashing") as tell:
            made = several.several(
                names,
                several.DIGESTED,
                lambda name: several.digested(digest_of(source_of(name), select, engine=engine, progress=tell), kept),
            )
        show(several.Shared(made.columns, made.answers, duplicates_among(kept)), as_json)
        return status_of(made)
    (target,) = names
    with progress("hashing") as tell:
        found = digest_of(source_of(target), select, engine=engine, progress=tell)
    if output is not None:
        for note in found.write(output):
            click.echo(note, err=True)
    if output is None or as_json:
        show(found, as_json)
    else:
        click.echo(f"{found.digest}  {output}")
    return FINE
