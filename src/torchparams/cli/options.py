"""Shared options, arguments and decorators of commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from torchparams.cli.complete import files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Argument(click.Argument):
    """Argument with help text, which click before 8.5 supports for options only."""

    def __init__(self, declarations: Sequence[str], *, metavar: str, about: str, **attributes: Any) -> None:
        super().__init__(declarations, metavar=metavar, **attributes)
        self.row = (metavar.strip("[]"), f"{about}  [required]" if self.required else about)


class Command(click.Command):
    """Command whose help lists arguments before options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of arguments and options."""
        rows = [parameter.row for parameter in self.params if isinstance(parameter, Argument)]
        if rows:
            with formatter.section("Arguments"):
                formatter.write_dl(rows)
        super().format_options(ctx, formatter)


def command(function: Callable[..., Any]) -> Command:
    """Decorator that makes a command: the function's name is the command's, and its docstring the help."""
    return click.command(cls=Command)(function)


def argument(
    name: str, *, help: str, shell_complete: Any = files, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a positional argument; completes paths unless `shell_complete` is given."""
    return click.argument(name, cls=Argument, about=help, shell_complete=shell_complete, **attributes)


def _union(context: click.Context, option: click.Parameter, selectors: tuple[str, ...]) -> str | None:
    return " | ".join(selectors) if selectors else None


target = argument(
    "target",
    metavar="TARGET",
    help="A checkpoint (.safetensors .pt .pth .bin .ckpt), a directory of shards or its index, optionally with "
    "#path for "
    "a nested mapping; or a model: package.module:callable, path/to/file.py:callable.",
)
targets = argument(
    "targets",
    metavar="TARGET...",
    nargs=-1,
    required=True,
    help="A checkpoint, a directory of shards or its index, either with #path for a mapping inside it; or code that "
    "makes a model: package.module:callable, path/to/file.py:callable. Several targets, and patterns such as "
    "'run/step-*' or 's3://bucket/run/step-*', have a line each.",
)
select = click.option(
    "-s",
    "--select",
    metavar="SELECTOR",
    multiple=True,
    callback=_union,
    help="Only these parameters: '**.bias', 'encoder.layers.{0..5}.**', '[ndim>=2] & ~:embedding'. Repeat for a union.",
)
engine = click.option(
    "--engine",
    metavar="ray[:ADDRESS]",
    help="Run on a Ray cluster: the one at ADDRESS, the one of this machine, or a new local one. Every node reads the "
    "files under the same paths.",
)
raw = click.option("--raw", is_flag=True, help="Show quantised parameters as stored: codes and scales separately.")
output = click.option(
    "-o",
    "--output",
    metavar="FILE",
    shell_complete=files,
    help="Write the rows to a .csv, .json or .parquet file instead, replacing an existing one.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON with a stable schema instead of a table.")
