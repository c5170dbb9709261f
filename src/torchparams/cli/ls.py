"""`torchparams ls`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Output, Raw, Select, Target, app, show, union
from torchparams.cli.complete import columns
from torchparams.cli.targets import table


@app.command()
def ls(
    target: Target,
    select: Select = None,
    tree: Annotated[bool, typer.Option("--tree", help="By module, with subtotals; equal layers are folded.")] = False,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="With --tree: the deepest level shown, 1 for the top.", show_default=False
        ),
    ] = None,
    expand: Annotated[bool, typer.Option("--expand", help="With --tree: do not fold equal layers.")] = False,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Order by name, shape, dtype, numel, size or module, or as stored in the file; -COLUMN for descending "
            "(--sort=-size).",
            show_default=False,
            autocompletion=columns,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Most rows shown; the middle is left out and counted.", show_default=False
        ),
    ] = None,
    buffers: Annotated[bool, typer.Option("--buffers", help="List a live model's buffers too.")] = False,
    raw: Raw = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """List parameters: name, shape, dtype, size.

    Of a checkpoint only the header is read: one of any size is listed at once.

    \b
    Examples:
      torchparams ls model.safetensors
      torchparams ls model.pt --tree --depth 2
      torchparams ls shards/ -s '**.bias | **.norm.*'
      torchparams ls run.ckpt#optimizer.state --sort=-size --limit 10
      torchparams ls mypackage.models:build --buffers
      torchparams ls model.safetensors --json | jq '.parameters[].name'
    """
    from torchparams.measure.listing import ls as listed

    tree = tree or expand or depth is not None
    params = table(target, buffers=buffers, raw=raw)
    show(
        listed(params, union(select), tree=tree, depth=depth, fold=not expand, sort=sort, limit=limit), as_json, output
    )
