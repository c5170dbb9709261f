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
@click.option("--tree", is_flag=True, help="Group by module, with subtotals; equal layers are folded.")
@click.option(
    "--depth", metavar="N", type=click.IntRange(min=1), help="With --tree: maximum depth, 1 for top-level modules."
)
@click.option("--expand", is_flag=True, help="With --tree: do not fold equal layers.")
@click.option(
    "--sort",
    metavar="COLUMN",
    shell_complete=columns,
    help="Sort by name, shape, dtype, numel, size or module, or as stored in the file; -COLUMN for descending "
    "(--sort=-size).",
)
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help="Maximum number of rows; rows in the middle are omitted."
)
@click.option("--buffers", is_flag=True, help="Include the buffers of a live model.")
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

    Reads only the header of a checkpoint, so the size of the file does not matter.

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
