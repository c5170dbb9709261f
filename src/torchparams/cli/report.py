"""`torchparams report`."""

from __future__ import annotations

from pathlib import Path

import click

from torchparams.cli import options
from torchparams.cli.app import show
from torchparams.cli.complete import files
from torchparams.cli.options import argument, command
from torchparams.cli.targets import source_of


@command
@options.target
@argument("other", metavar="[OTHER]", required=False, help="Second target, to show the difference.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    shell_complete=files,
    help="HTML file to write; an existing file is replaced.",
)
@click.option("--open", "browse", is_flag=True, help="Open it in a browser.")
@options.select
@click.option(
    "--rename",
    metavar="REGEX=TEXT",
    multiple=True,
    help="Rename parameters of OTHER, as in diff; by default, as diff proposes.",
)
@click.option(
    "--spectra", metavar="SELECTOR", help="Compute the singular values of these matrices: '**.attn.**[ndim=2]'."
)
@click.option(
    "--pictures",
    metavar="SELECTOR",
    help="Show pictures of these tensors: '**.{q,k}_proj.*'.",
)
@click.option("--buffers", is_flag=True, help="Include the buffers of a live model.")
@options.raw
@options.as_json
def report(
    target: str,
    other: str | None,
    output: str,
    browse: bool,
    select: str | None,
    rename: tuple[str, ...],
    spectra: str | None,
    pictures: str | None,
    buffers: bool,
    raw: bool,
    as_json: bool,
) -> None:
    """Write one HTML file that shows all parameters.

    The file opens from disk and needs no network: a heat map of layers and roles, modules by size, distributions,
    a page for each tensor, and the selector language. With OTHER, it shows the difference. Of a training (the record of
    a tp.Recorder, a directory of checkpoints, or a pattern), it shows the numbers over the steps, with a slider.

    \b
    Examples:
      torchparams report model.safetensors -o report.html --open
      torchparams report mypackage.models:build -o report.html --buffers
      torchparams report base/ tuned/ -o difference.html
      torchparams report run/ -o report.html                              a record or checkpoints, over the steps
      torchparams report 'outputs/checkpoint-*' -o report.html
      torchparams report model.safetensors quantised/ -o error.html       the error of a quantisation, in dB
      torchparams report model.safetensors -o report.html --pictures '**.layers.{-1}.**[ndim=2]'
    """
    from torchparams.page.report import report as report_of
    from torchparams.record.history import has_steps
    from torchparams.render.progress import progress

    with progress("reading") as tell:
        found = report_of(
            target if has_steps(target) else source_of(target, raw=raw),
            output,
            select,
            other=None if other is None else source_of(other, raw=raw),
            rename=rename or "auto",
            spectra=spectra,
            pictures=pictures,
            buffers=buffers,
            progress=tell,
        )
    show(found, as_json)
    if browse:
        import webbrowser

        webbrowser.open(Path(output).resolve().as_uri())
