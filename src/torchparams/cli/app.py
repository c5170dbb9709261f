"""The application: what all commands share, and how errors are told."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from io import TextIOWrapper
from typing import Any, NoReturn, TextIO

import click

from torchparams import __version__
from torchparams.cli import COMMANDS
from torchparams.errors import TorchParamsError, nearest, printable

_COMPLETE = "_TORCHPARAMS_COMPLETE"  # the variable by which a shell asks for completions
FINE, EXIT_DIFFERENCE, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 130, 141


class _Commands(click.Group):
    """The commands, each imported once it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order of `--help`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(importlib.import_module(f"torchparams.cli.{cmd_name}"), cmd_name)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that a command line names first, and the arguments behind it."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            near = nearest(args[0], COMMANDS, 1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


def _version(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from torchparams.sketch import kernels

        click.echo(f"torchparams {__version__} (Python {sys.version.split()[0]}, kernels: {kernels.implementation()})")
        context.exit()


@click.group(
    "torchparams",
    cls=_Commands,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Print the version, and which kernels it runs.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def app(context: click.Context) -> None:
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
        click.echo(context.get_help())


def show(result: Any, as_json: bool = False, output: str | None = None) -> None:
    """Print a verb's result: its `report()` for people, or its `to_json()`. With `output`, write its rows there."""
    if output is not None:
        from torchparams.render.files import write_table

        write_table(result, output)
        if not as_json:
            click.echo(f"{len(result.table_rows()):,} rows  {output}")
            return
    if as_json:
        from torchparams.render.json import print_json

        print_json(result.to_json(), sys.stdout)
    else:
        from torchparams.render.terminal import print_report

        print_report(result.report(), sys.stdout)
    sys.stdout.flush()


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
        with app.make_context("torchparams", [part for part in arguments if part != "--debug"]) as context:
            status = app.invoke(context)
        return status if isinstance(status, int) else FINE
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except BrokenPipeError:
        # Nobody reads on: `torchparams ls … | head`.
        _silence(sys.stdout)
        return EXIT_PIPE
    except BaseException as error:
        return _status_of(error, debug)


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
    asked = os.environ.get(_COMPLETE)
    if asked:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(app, {}, "torchparams", _COMPLETE, asked))
    sys.exit(run(sys.argv[1:]))


def _status_of(error: BaseException, debug: bool) -> int:
    """The exit status for an error, which is told in one line, or by its traceback."""
    if debug:
        import traceback

        _tell("\n".join(map(printable, "".join(traceback.format_exception(error)).split("\n"))))
    if isinstance(error, click.Abort | KeyboardInterrupt):
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
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx is not None else "torchparams"
        text = error.format_message()
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
