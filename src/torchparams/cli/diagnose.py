"""`torchparams diagnose`."""

from __future__ import annotations

import click

from torchparams.cli import options
from torchparams.cli.app import EXIT_DIFFERENCE, show
from torchparams.cli.options import argument, command


@command
@argument(
    "run",
    metavar="RUN",
    help="Directory of a record or of checkpoints named by their steps, or a pattern such as 'run/step-*'.",
)
@options.as_json
def diagnose(run: str, as_json: bool) -> None:
    """Find what went wrong first in a training: which parameter, and when.

    Shows the first finding, the records before it, other parameters that changed, and the other findings. Exits with 1
    if there is a finding.

    \b
    Examples:
      torchparams diagnose run/
      torchparams diagnose 'outputs/checkpoint-*' --json
    """
    from torchparams.record.diagnose import diagnose as diagnosis_of

    found = diagnosis_of(run)
    show(found, as_json)
    if not found.ok:
        raise click.exceptions.Exit(EXIT_DIFFERENCE)
