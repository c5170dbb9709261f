"""`torchparams show`."""

from __future__ import annotations

from torchparams.cli import options
from torchparams.cli.app import show as print_result
from torchparams.cli.complete import tensor_names
from torchparams.cli.options import argument, command
from torchparams.cli.targets import table


@command
@options.target
@argument("name", metavar="NAME", shell_complete=tensor_names, help="Name of a tensor, or of a metadata entry (epoch).")
@options.raw
@options.as_json
def show(target: str, name: str, raw: bool, as_json: bool) -> None:
    """Show one tensor or metadata entry, with its values.

    \b
    Examples:
      torchparams show model.safetensors conv1.weight
      torchparams show run.ckpt#model head.bias --json
      torchparams show run.ckpt epoch
    """
    from torchparams.measure.describe import show as described

    print_result(described(table(target, buffers=True, raw=raw), name), as_json)
