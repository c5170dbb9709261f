"""`torchparams catalog`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import EXIT_ERROR, FINE, show
from torchparams.cli.complete import files
from torchparams.cli.options import command


@command
@options.targets
@click.option(
    "-o",
    "--output",
    metavar="DIRECTORY",
    required=True,
    shell_complete=files,
    help="Directory of Parquet files, such as catalog.parquet; the same command again goes on with it.",
)
@options.select
@click.option("--digest", is_flag=True, help="Add the digest of each tensor; reads all values.")
@click.option("--stats", is_flag=True, help="Add statistics of each tensor; reads all values.")
@options.engine
@options.as_json
def catalog(
    targets: tuple[str, ...],
    output: str,
    select: str | None,
    digest: bool,
    stats: bool,
    engine: str | None,
    as_json: bool,
) -> int:
    """List the parameters of many checkpoints in one table, for duckdb, polars and pandas.

    A checkpoint that cannot be read is a row with the reason, and the exit status is 2.

    \b
    Examples:
      torchparams catalog 'runs/*/checkpoint-*' -o catalog.parquet
      torchparams catalog 's3://bucket/run/step-*' -o catalog.parquet --digest --stats
      duckdb -c "SELECT file, sum(nbytes) FROM 'catalog.parquet/*.parquet' GROUP BY file"
    """
    from torchparams.measure.catalog import catalog as catalog_of
    from torchparams.render.progress import progress

    with progress("reading") as tell:
        found = catalog_of(targets, output, selector=select, digest=digest, stats=stats, engine=engine, progress=tell)
    show(found, as_json)
    return EXIT_ERROR if found.errors else FINE
