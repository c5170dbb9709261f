"""`torchparams stats`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import EXIT_DIFFERENCE, show, status_of
from torchparams.cli.options import command
from torchparams.cli.targets import source_of


@command
@options.targets
@options.select
@click.option(
    "--by",
    metavar="WHAT",
    multiple=True,
    help="Group by module, layer, dtype, or a SELECTOR (one row for the rest); repeatable.",
)
@click.option("-q", "--quantiles", metavar="Q,Q…", help="Quantiles to show, such as 0.01,0.5,0.99.")
@click.option(
    "--sort",
    metavar="COLUMN",
    help="Sort by name, numel, zeros, nonfinite, min, max, mean, std, l1, l2, linf, entropy or distinct; -COLUMN for "
    "descending (--sort=-std).",
)
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help="Maximum number of rows; rows in the middle are omitted."
)
@click.option("--wide", is_flag=True, help="Show all columns; needs more than 80 characters.")
@click.option("--buffers", is_flag=True, help="Include the buffers of a live model.")
@click.option("--check", is_flag=True, help="Exit with 1 if there are flags.")
@click.option(
    "--rules",
    metavar="KIND,KIND…",
    help="With --check: only these flags: non-finite, zero, constant, saturated, scale.",
)
@options.engine
@options.raw
@options.output
@options.as_json
def stats(
    targets: tuple[str, ...],
    select: str | None,
    by: tuple[str, ...],
    quantiles: str | None,
    sort: str | None,
    limit: int | None,
    wide: bool,
    buffers: bool,
    check: bool,
    rules: str | None,
    engine: str | None,
    raw: bool,
    output: str | None,
    as_json: bool,
) -> None:
    """Compute statistics, and flag suspicious tensors.

    Flags are NaN and ±Inf, constant and saturated tensors, and scales far from those of sibling layers.

    Every value is read once. Numbers are exact, except for dtypes wider than 16 bits: their quantiles and histograms
    have a relative error of up to 1/256, and the entropy and distinct values of --wide are lower bounds.

    \b
    Examples:
      torchparams stats model.safetensors
      torchparams stats shards/ --by layer
      torchparams stats model.pt --by '**.bias' --by '**.norm*.*'
      torchparams stats run.ckpt#optimizer.state -s '**.exp_avg_sq' --sort=-max --limit 10
      torchparams stats model.safetensors -s '[ndim>=2]' -q 0.001,0.5,0.999
      torchparams stats mypackage.models:build --buffers
      torchparams stats model.safetensors --check --rules non-finite,zero
      torchparams stats 'run/step-*' --check            a line each, one exit status
      torchparams stats model.safetensors -o stats.parquet    for polars, duckdb, pandas
      torchparams stats model.safetensors --json | jq '.flags'
    """
    from torchparams.io.patterns import expanded
    from torchparams.measure.flags import KINDS, kinds_in
    from torchparams.measure.stats import numbers_in
    from torchparams.measure.stats import stats as statistics_of
    from torchparams.render.progress import progress

    if rules is not None and not check:
        raise click.BadParameter("it needs --check", param_hint="--rules")
    wanted = KINDS if rules is None else kinds_in(rules)
    names = expanded(targets)
    if len(names) > 1:
        if not check or by or quantiles or sort or limit or wide or output is not None:
            raise click.BadParameter(
                "Several targets need --check, which shows a line for each; name one target for its table"
            )
        from torchparams.measure import several

        with progress("reading") as tell:
            checked = several.several(
                names,
                several.CHECKED,
                lambda name: several.checked(
                    statistics_of(source_of(name, raw=raw), select, buffers=buffers, engine=engine, progress=tell),
                    wanted,
                ),
            )
        show(checked, as_json)
        raise click.exceptions.Exit(status_of(checked))
    (target,) = names
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
            engine=engine,
            progress=tell,
        )
    show(found, as_json, output)
    if check and any(flag.kind in wanted for flag in found.flags):
        raise click.exceptions.Exit(EXIT_DIFFERENCE)
