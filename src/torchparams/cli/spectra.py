"""`torchparams spectra`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import show
from torchparams.cli.options import command
from torchparams.cli.targets import source_of


@command
@options.target
@options.select
@click.option(
    "--exact",
    metavar="N",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Largest min(rows, columns) for exact singular values; larger matrices are estimated.",
)
@click.option(
    "--stacked",
    metavar="SELECTOR",
    help="Tensors that are stacks of matrices, such as experts; one row per matrix.",
)
@click.option(
    "--sort",
    metavar="COLUMN",
    help="Sort by name, spectral_norm, nuclear_norm, stable_rank, effective_rank, condition, tail_exponent, edge or "
    "spikes; -COLUMN for descending (--sort=-condition).",
)
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=1),
    help="Maximum number of rows; the middle is omitted and counted.",
)
@options.engine
@options.output
@options.as_json
def spectra(
    target: str,
    select: str | None,
    exact: int,
    stacked: str | None,
    sort: str | None,
    limit: int | None,
    engine: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Show singular values of matrices: norms, ranks, condition number, and exponent of the tail.

    The kernel of a convolution, of shape (out, in, ...), is flattened to (out, in * ...). Vectors and scalars are
    omitted.

    \b
    Examples:
      torchparams spectra model.safetensors
      torchparams spectra model.safetensors -s '**.q_proj.weight' --sort=-condition
      torchparams spectra moe.safetensors -s '**.experts.**' --stacked '**.experts.*'
      torchparams spectra model.safetensors -o spectra.parquet    for polars, duckdb, pandas
    """
    from torchparams.measure.spectra import spectra as spectra_of
    from torchparams.render.progress import progress

    with progress("reading") as tell:
        found = spectra_of(
            source_of(target),
            select,
            exact=exact,
            stacked=stacked,
            sort=sort,
            limit=limit,
            engine=engine,
            progress=tell,
        )
    show(found, as_json, output)
