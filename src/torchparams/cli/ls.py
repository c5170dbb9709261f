"""`torchparams ls`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import show
from torchparams.cli.complete import columns
from torchparams.cli.options import command
from torchparams.cli.targets import table


@command
@options.target
@options.select
@click.option("--tree", is_flag=True, help="By module, with subtotals; equal layers are folded.")
@click.option(
    "--depth", metavar="N", type=click.IntRange(min=1), help="With --tree: the deepest level shown, 1 for the top."
)
@click.option("--expand", is_flag=True, help="With --tree: do not fold equal layers.")
@click.option(
    "--sort",
    metavar="COLUMN",
    shell_complete=columns,
    help="Order by name, shape, dtype, numel, size or module, or as stored in the file; -COLUMN for descending "
    "(--sort=-size).",
)
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help="Most rows shown; the middle is left out and counted."
)
@click.option("--buffers", is_flag=True, help="List a live model's buffers too.")
@options.raw
@options.output
@options.as_json
def ls(
    target: str,
    select: str | None,
    tree: bool,
    depth: int | None,
    expand: bool,
    sort: str | None,
    limit: int | None,
    buffers: bool,
    raw: bool,
    output: str | None,
    as_json: bool,
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
    show(listed(params, select, tree=tree, depth=depth, fold=not expand, sort=sort, limit=limit), as_json, output)
