"""`torchparams diff`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import EXIT_DIFFERENCE, show
from torchparams.cli.options import argument, command
from torchparams.cli.targets import source_of


@command
@argument("a", metavar="A", help="A checkpoint, or a model as package.module:callable.")
@argument("b", metavar="B", help="A checkpoint or model to compare with.")
@options.select
@click.option(
    "--rename",
    metavar="REGEX=TEXT",
    multiple=True,
    help="Rename B's parameters first; repeatable, applied in order. auto: apply the rename that torchparams proposes.",
)
@click.option("--numeric", is_flag=True, help="Compare values, also across dtypes, instead of bits.")
@click.option(
    "--by",
    metavar="WHAT",
    multiple=True,
    help="Group by module, layer, dtype, the first N components of names, or a SELECTOR; repeatable.",
)
@click.option(
    "--sort",
    metavar="COLUMN",
    help="Sort by name, numel, changed, share, max, relative or cosine; -COLUMN for descending (--sort=-relative).",
)
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help="Maximum number of rows; rows in the middle are omitted."
)
@options.engine
@options.raw
@options.output
@options.as_json
def diff(
    a: str,
    b: str,
    select: str | None,
    rename: tuple[str, ...],
    numeric: bool,
    by: tuple[str, ...],
    sort: str | None,
    limit: int | None,
    engine: str | None,
    raw: bool,
    output: str | None,
    as_json: bool,
) -> None:
    """Compare two checkpoints or models, tensor by tensor.

    Every element is compared. Exits with 0 if all tensors are equal, 1 if not, 2 on an error.

    \b
    Examples:
      torchparams diff base.safetensors tuned.safetensors
      torchparams diff base/ tuned/ --by layer
      torchparams diff base.pt lightning.ckpt#state_dict --rename auto
      torchparams diff a.pt b.pt --rename '^encoder\\.=backbone.' -s 'backbone.**'
      torchparams diff model-fp32.safetensors model-bf16.safetensors --numeric
      torchparams diff a.safetensors b.safetensors --sort=-relative --limit 10
      torchparams diff a.safetensors b.safetensors --json | jq '.tensors[].name'
    """
    from torchparams.measure.diff import diff as difference_of
    from torchparams.render.progress import progress

    mine, yours = (source_of(target, raw=raw) for target in (a, b))
    with progress("comparing") as tell:
        found = difference_of(
            mine,
            yours,
            select,
            rename="auto" if rename == ("auto",) else rename or None,
            numeric=numeric,
            by=by or None,
            sort=sort,
            limit=limit,
            engine=engine,
            progress=tell,
        )
    show(found, as_json, output)
    if not found.same:
        raise click.exceptions.Exit(EXIT_DIFFERENCE)
