"""`torchparams show`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Raw, Target, app
from torchparams.cli.app import show as print_result
from torchparams.cli.complete import tensor_names
from torchparams.cli.targets import table


@app.command()
def show(
    target: Target,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The name of a tensor, or of another entry (epoch).",
            show_default=False,
            autocompletion=tensor_names,
        ),
    ],
    raw: Raw = False,
    as_json: AsJson = False,
) -> None:
    """Show one tensor, or another entry: facts, values.

    \b
    Examples:
      torchparams show model.safetensors conv1.weight
      torchparams show run.ckpt#model head.bias --json
      torchparams show run.ckpt epoch
    """
    from torchparams.measure.describe import show as described

    print_result(described(table(target, buffers=True, raw=raw), name), as_json)
