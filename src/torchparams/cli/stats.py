"""`torchparams stats`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import EXIT_DIFFERENCE, show
from torchparams.cli.options import command
from torchparams.cli.targets import source_of


@command
@options.target
@options.select
@click.option(
    "--by",
    metavar="WHAT",
    multiple=True,
    help="A row for each module, layer or dtype; or for each SELECTOR given so, and one for the rest.",
)
@click.option("-q", "--quantiles", metavar="Q,Q…", help="Quantiles to show, such as 0.01,0.5,0.99.")
@click.option(
    "--sort",
    metavar="COLUMN",
    help="Order by name, numel, zeros, nonfinite, min, max, mean, std, l1, l2, linf, entropy or distinct; -COLUMN for "
    "descending (--sort=-std).",
)
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help="Most rows shown; the middle is left out and counted."
)
@click.option("--wide", is_flag=True, help="Every column: more than 80 characters have room for.")
@click.option("--buffers", is_flag=True, help="Take a live model's buffers too.")
@click.option("--check", is_flag=True, help="Exit with 1 where there is something to look at.")
@click.option(
    "--rules",
    metavar="KIND,KIND…",
    help="With --check: only for these kinds: non-finite, zero, constant, saturated, scale.",
)
@options.raw
@options.output
@options.as_json
def stats(
    target: str,
    select: str | None,
    by: tuple[str, ...],
    quantiles: str | None,
    sort: str | None,
    limit: int | None,
    wide: bool,
    buffers: bool,
    check: bool,
    rules: str | None,
    raw: bool,
    output: str | None,
    as_json: bool,
) -> None:
    """Show statistics, and what is odd in them.

    Odd are NaN and ±Inf, constant and saturated tensors, scales far from those of their siblings.

    Every value is read once. Numbers are exact; only of types wider than 16 bits, quantiles and histograms are within
    1/256, and what --wide says of bits and distinct values is a lower bound.

    \b
    Examples:
      torchparams stats model.safetensors
      torchparams stats shards/ --by layer
      torchparams stats model.pt --by '**.bias' --by '**.norm*.*'
      torchparams stats run.ckpt#optimizer.state -s '**.exp_avg_sq' --sort=-max --limit 10
      torchparams stats model.safetensors -s '[ndim>=2]' -q 0.001,0.5,0.999
      torchparams stats mypackage.models:build --buffers
      torchparams stats model.safetensors --check --rules non-finite,zero
      torchparams stats model.safetensors -o stats.parquet    for polars, duckdb, pandas
      torchparams stats model.safetensors --json | jq '.flags'
    """
    from torchparams.measure.flags import KINDS, kinds_in
    from torchparams.measure.stats import numbers_in
    from torchparams.measure.stats import stats as statistics_of
    from torchparams.render.progress import progress

    if rules is not None and not check:
        raise click.BadParameter("it limits --check, which is not given", param_hint="--rules")
    wanted = KINDS if rules is None else kinds_in(rules)
    with progress("reading") as tell:
        found = statistics_of(
            source_of(target, raw=raw),
            select,
            by=by or None,
            quantiles=None if quantiles is None else numbers_in(quantiles),
            sort=sort,
            limit=limit,
            wide=wide,
            buffers=buffers,
            progress=tell,
        )
    show(found, as_json, output)
    if check and any(flag.kind in wanted for flag in found.flags):
        raise click.exceptions.Exit(EXIT_DIFFERENCE)
