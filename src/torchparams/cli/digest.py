"""`torchparams digest`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Select, app, show, union
from torchparams.cli.targets import build, is_live


@app.command()
def digest(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Checkpoints, directories of shards, or package.module:callable; of several, what is there more than "
            "once is named across all of them.",
            show_default=False,
        ),
    ],
    select: Select = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write a manifest for verify.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show digests of tensors, and of all of them.

    Tensors that are there more than once are named.

    The same weights have the same digest in a .pt file, a .safetensors file and a model; buffers of a model
    count as its state dict has them. Tied tensors and copies are told apart, and what copies cost is shown.

    \b
    Examples:
      torchparams digest model.safetensors
      torchparams digest model.safetensors -o manifest.json     for torchparams verify
      torchparams digest base/ tuned/                           what the two have in common
      torchparams digest model.pt -s 'encoder.**' --json | jq -r .digest
      torchparams digest mypackage.models:build
    """
    from torchparams.measure.digest import digest as digest_of
    from torchparams.measure.digest import duplicates
    from torchparams.render.progress import progress

    if output is not None and len(targets) > 1:
        raise typer.BadParameter(f"a manifest is of one target, and there are {len(targets)}", param_hint="-o")
    things = [build(target, device="cpu") if is_live(target) else target for target in targets]
    with progress("hashing") as tell:
        made = digest_of(things[0], union(select), progress=tell) if len(things) == 1 else None
        several = duplicates(*things, selector=union(select), progress=tell) if made is None else None
    if made is not None and output is not None:
        for note in made.write(output):
            typer.echo(note, err=True)
    if made is None or output is None or as_json:
        show(made or several, as_json)
    else:
        typer.echo(f"{made.digest}  {output}")
