"""The options and arguments that commands share, and the decorators that define a command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from torchparams.cli.complete import files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Argument(click.Argument):
    """An argument with a line of help, which click before 8.5 gives to options only."""

    def __init__(self, declarations: Sequence[str], *, metavar: str, about: str, **attributes: Any) -> None:
        super().__init__(declarations, metavar=metavar, **attributes)
        self.row = (metavar.strip("[]"), f"{about}  [required]" if self.required else about)


class Command(click.Command):
    """A command whose help lists arguments before options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of arguments and options."""
        rows = [parameter.row for parameter in self.params if isinstance(parameter, Argument)]
        if rows:
            with formatter.section("Arguments"):
                formatter.write_dl(rows)
        super().format_options(ctx, formatter)


def command(function: Callable[..., Any]) -> Command:
    """Make a command of a function: its name, its docstring as the help, its decorators as options and arguments."""
    return click.command(cls=Command)(function)


def argument(
    name: str, *, help: str, shell_complete: Any = files, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A positional argument, which is a path unless `shell_complete` proposes something else."""
    return click.argument(name, cls=Argument, about=help, shell_complete=shell_complete, **attributes)


def _union(context: click.Context, option: click.Parameter, selectors: tuple[str, ...]) -> str | None:
    return " | ".join(selectors) if selectors else None


target = argument(
    "target",
    metavar="TARGET",
    help="A checkpoint (safetensors, .pt .pth .bin .ckpt), a directory of shards or its index, either with #path for "
    "a mapping inside it; or what makes a model: package.module:callable, path/to/file.py:callable.",
)
select = click.option(
    "-s",
    "--select",
    metavar="SELECTOR",
    multiple=True,
    callback=_union,
    help="Only these parameters: '**.bias', 'encoder.layers.{0..5}.**', '[ndim>=2] & ~:embedding'. Repeated, "
    "those that any of them hits.",
)
raw = click.option(
    "--raw", is_flag=True, help="The tensors of quantised parameters as they are stored: codes and scales apart."
)
output = click.option(
    "-o",
    "--output",
    metavar="FILE",
    shell_complete=files,
    help="Write the rows to a file instead, replacing an earlier one: .csv, .json or .parquet.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON with a stable schema instead of a table.")
