"""`torchparams ls`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import FINE, show, status_of
from torchparams.cli.complete import columns
from torchparams.cli.options import command
from torchparams.cli.targets import chosen, table


@command
@options.targets
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
    targets: tuple[str, ...],
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
) -> int:
    """List parameters: name, shape, dtype, size.

    Reads only the header of a checkpoint, so the size of the file does not matter. Several targets have a line each.

    \b
    Examples:
      torchparams ls model.safetensors
      torchparams ls model.pt --tree --depth 2
      torchparams ls shards/ -s '**.bias | **.norm.*'
      torchparams ls run.ckpt#optimizer.state --sort=-size --limit 10
      torchparams ls mypackage.models:build --buffers
      torchparams ls 'run/step-*'
      torchparams ls model.safetensors --json | jq '.parameters[].name'
    """
    from torchparams.io.patterns import expanded
    from torchparams.measure.listing import ls as listed

    names = expanded(targets)
    if len(names) > 1:
        if tree or expand or depth is not None or sort is not None or limit is not None or output is not None:
            raise click.BadParameter("several targets have a line each: name one target", param_hint="options")
        from torchparams.measure import several

        found = several.several(
            names,
            several.LISTED,
            lambda name: several.listed(chosen(table(name, buffers=buffers, raw=raw), select)),
        )
        show(found, as_json)
        return status_of(found)
    (target,) = names
    tree = tree or expand or depth is not None
    params = table(target, buffers=buffers, raw=raw)
    show(listed(params, select, tree=tree, depth=depth, fold=not expand, sort=sort, limit=limit), as_json, output)
    return FINE
