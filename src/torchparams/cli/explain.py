"""`torchparams explain`."""

from __future__ import annotations

from torchparams.cli import options
from torchparams.cli.app import show as print_result
from torchparams.cli.options import argument, command
from torchparams.cli.targets import build, is_live


@command
@argument(
    "target",
    metavar="TARGET",
    help="A model, or a function that makes one: package.module:callable or path/to/file.py:callable.",
)
@argument(
    "name",
    metavar="[NAME]",
    required=False,
    shell_complete=None,
    help="A tensor, module or attribute: layers.0.weight, or in Python notation, model.layers[0].weight.",
)
@options.as_json
def explain(target: str, name: str | None, as_json: bool) -> None:
    """Explain what parameters(), buffers() and state_dict() of a model hold.

    Lists each tensor with the Python expression that reaches it and the calls that return it; then every tensor outside
    parameters(), with the reason. The model is built on the meta device, without memory.

    \b
    Examples:
      torchparams explain mypackage.models:build
      torchparams explain path/to/net.py:Net
      torchparams explain path/to/net.py                         list its classes and functions
      torchparams explain mypackage.models:build layers.0.weight
      torchparams explain mypackage.models:build 'model.layers[0].weight'
      torchparams explain torch.nn:Transformer
      torchparams explain mypackage.models:build --json | jq '.absent[].why'
    """
    from torchparams.lint.explain import explain as explained

    model = build(target) if is_live(target) else target
    print_result(explained(model) if name is None else explained(model, name), as_json)
