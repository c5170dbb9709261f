"""`torchparams show`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, Target, app
from torchparams.cli.app import show as print_result
from torchparams.cli.complete import tensor_names
from torchparams.cli.targets import table


@app.command()
def show(
    target: Target,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The tensor's name.", show_default=False, autocompletion=tensor_names)
    ],
    as_json: AsJson = False,
) -> None:
    """Show one tensor: facts, a few values, its place.

    \b
    Examples:
      torchparams show model.safetensors conv1.weight
      torchparams show run.ckpt#model head.bias --json
    """
    from torchparams.measure.describe import show as described

    print_result(described(table(target, buffers=True), name), as_json)
