"""The application: what all commands share, and how errors are told."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn, TextIO

import typer

from torchparams import __version__
from torchparams.cli import COMMANDS
from torchparams.errors import TorchParamsError, printable

FINE, EXIT_DIFFERENCE, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 130, 141

app = typer.Typer(
    name="torchparams",
    invoke_without_command=True,
    rich_markup_mode=None,  # plain help: examples keep their lines, and no command pays for a renderer
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A checkpoint (safetensors, .pt .pth .bin .ckpt), a directory of shards or its index, either with "
        "#path for a mapping inside it; or what makes a model: package.module:callable, path/to/file.py:callable.",
        show_default=False,
    ),
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        "-s",
        "--select",
        metavar="SELECTOR",
        help="Only these parameters: '**.bias', 'encoder.layers.{0..5}.**', '[ndim>=2] & ~:embedding'. Repeated, "
        "those that any of them hits.",
        show_default=False,
    ),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="The tensors of quantised parameters as they are stored: codes and scales apart.")
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Write the rows to a file instead, replacing an earlier one: .csv, .json or .parquet.",
        show_default=False,
    ),
]


def union(selectors: list[str] | None) -> str | None:
    """The text of the union of the selectors that `-s` gave; None without any."""
    return " | ".join(selectors) if selectors else None


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with a stable schema instead of a table.")]


def _version(value: bool) -> None:
    if value:
        from torchparams.sketch import kernels

        typer.echo(f"torchparams {__version__} (Python {sys.version.split()[0]}, kernels: {kernels.implementation()})")
        raise typer.Exit


@app.callback()
def _torchparams(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and which kernels it runs.", callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """The parameters of PyTorch networks: in a checkpoint on disk, or in a model.

    Nothing in a file is ever run, and torch is not needed to read one.

    \b
    Examples:
      torchparams ls model.safetensors                  what is in it
      torchparams ls run.ckpt#model -s '**.bias'        a part of a mapping in a checkpoint
      torchparams stats model.pt --by layer             are its values sound
      torchparams diff base/ tuned/ --by module         what a fine-tune changed
      torchparams convert model.pt model.safetensors    the same in another format
      torchparams explain mypackage.models:build        what parameters() gives, and what it does not
      torchparams audit mypackage.models:build          what bites those who train it
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def show(result: Any, as_json: bool = False, output: str | None = None) -> None:
    """Print a verb's result: its `report()` for people, or its `to_json()`. With `output`, write its rows there."""
    if output is not None:
        from torchparams.render.files import write_table

        write_table(result, output)
        if not as_json:
            typer.echo(f"{len(result.table_rows()):,} rows  {output}")
            return
    try:
        if as_json:
            from torchparams.render.json import print_json

            print_json(result.to_json(), sys.stdout)
        else:
            from torchparams.render.terminal import print_report

            print_report(result.report(), sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads on: `torchparams ls … | head`.
        _silence(sys.stdout)
        raise typer.Exit(EXIT_PIPE) from None


def _silence(stream: TextIO) -> None:
    """Let a stream that failed lead nowhere: Python would fail once more when it closes the stream."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(arguments: list[str]) -> int:
    """Run a command line and give its exit status: 0 fine, 1 a difference or a finding, 2 an error.

    >>> run(["ls", "nothing.safetensors"])
    2
    """
    debug = "--debug" in arguments  # also behind the command, where people add it once something went wrong
    try:
        _import_commands(arguments)
        status = app(
            args=[part for part in arguments if part != "--debug"], prog_name="torchparams", standalone_mode=False
        )
        return status if isinstance(status, int) else FINE
    except BaseException as error:
        return _status_of(error, debug)


def _import_commands(arguments: list[str]) -> None:
    """Make known the command that is asked for, or all where it is another thing: they cost more than a short list."""
    for command in arguments[:1] if arguments[:1] and arguments[0] in COMMANDS else COMMANDS:
        importlib.import_module(f"torchparams.cli.{command}")
    # `--help` lists them in one order, whichever came first.
    app.registered_commands.sort(key=lambda found: COMMANDS.index(found.callback.__module__.rpartition(".")[2]))


def main() -> NoReturn:
    """What the installed `torchparams` runs."""
    # A shell may start it without them: `torchparams ls … >&-`. What is written is then for nobody.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as above
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # escape what the encoding lacks: a table has bars, a name any character
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


# typer has no public name for the error of a wrong command line; what it has differs from version to version.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _status_of(error: BaseException, debug: bool) -> int:
    """The exit status for an error, which is told in one line, or by its traceback."""
    if debug:
        _tell("\n".join(map(printable, "".join(traceback.format_exception(error)).split("\n"))))
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if not isinstance(error, Exception):
        raise error
    if not debug:
        _tell(_message(error) + "\n")
    return EXIT_ERROR


def _tell(text: str) -> None:
    """Write to stderr, which may be a full disk or closed: the exit status is the same."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        _silence(sys.stderr)


def _message(error: Exception) -> str:
    from torchparams.render.terminal import has_colour, painted

    head = painted("torchparams:", "error") if has_colour(sys.stderr) else "torchparams:"
    if isinstance(error, _UsageError):
        context: Any = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "torchparams"
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        stop = "" if text.endswith("?") else "."
        return f"{head} {printable(text.rstrip('.'))}{stop} See {path} --help"
    if isinstance(error, TorchParamsError):
        return "\n".join((f"{head} {error}", *getattr(error, "__notes__", ())))
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        return f"{head} {printable(f'{error.filename}: {said}' if error.filename else said)}"
    if isinstance(error, MemoryError):
        return f"{head} out of memory"
    # A defect of ours, whatever it is.
    return f"{head} internal error: {type(error).__name__}: {printable(str(error))}. --debug shows where"
