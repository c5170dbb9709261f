"""`torchparams explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from torchparams.cli.app import AsJson, app
from torchparams.cli.app import show as print_result
from torchparams.cli.targets import build, is_live


@app.command()
def explain(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="What makes the model, or a model: package.module:callable or path/to/file.py:callable.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="One tensor, module or attribute: layers.0.weight, or as in Python, model.layers[0].weight.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain what parameters(), buffers() and state_dict() of a model hold.

    Each tensor is listed with the Python expression that reaches it and the calls that give it; then everything that is
    not among the parameters, with the reason. The model is built on the meta device, without memory.

    \b
    Examples:
      torchparams explain mypackage.models:build
      torchparams explain path/to/net.py:Net
      torchparams explain path/to/net.py                         what could stand behind the colon
      torchparams explain mypackage.models:build layers.0.weight
      torchparams explain mypackage.models:build 'model.layers[0].weight'
      torchparams explain torch.nn:Transformer
      torchparams explain mypackage.models:build --json | jq '.absent[].why'
    """
    from torchparams.lint.explain import explain as explained

    model = build(target) if is_live(target) else target
    print_result(explained(model) if name is None else explained(model, name), as_json)
