"""`torchparams history`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import show
from torchparams.cli.options import argument, command


@command
@argument(
    "run",
    metavar="RUN",
    help="Directory of a record or of checkpoints named by their steps, or a pattern such as 'run/step-*'.",
)
@options.select
@click.option("--steps", metavar="A:B", help="Only steps from A to B; either may be omitted.")
@click.option(
    "--show",
    "column",
    metavar="COLUMN",
    default="update_ratio",
    show_default=True,
    help="Number whose curves are printed: weight_norm, mean, std, max_abs, zeros, nonfinite, grad_norm, "
    "grad_nonfinite, update_norm, update_ratio or dead_rows.",
)
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=1),
    help="Maximum number of rows; the middle is omitted and counted.",
)
@options.output
@options.as_json
def history(
    run: str,
    select: str | None,
    steps: str | None,
    column: str,
    limit: int | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Show statistics of parameters over the steps of a training.

    Reads a record of tp.Recorder, or checkpoints; then differences between consecutive checkpoints are the updates.

    \b
    Examples:
      torchparams history run/
      torchparams history run/ -s '**.q_proj.weight' --show grad_norm
      torchparams history 'outputs/checkpoint-*' --steps 1000:5000
      torchparams history run/ -o history.parquet    for polars, duckdb, pandas
    """
    from torchparams.record.history import history as history_of
    from torchparams.render.progress import progress

    with progress("reading") as tell:
        found = history_of(run, select, steps=_range(steps), progress=tell).showing(column, limit)
    show(found, as_json, output)


def _range(text: str | None) -> tuple[int | None, int | None] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    try:
        low = int(first) if first else None
        return (low, int(last) if last else None) if colon else (low, low)
    except ValueError:
        raise click.BadParameter(f"a range of steps is A:B, not {text!r}", param_hint="--steps") from None
