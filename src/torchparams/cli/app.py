"""The application: options of all commands, and error messages."""

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
from torchparams.io.paths import public

_COMPLETE = "_TORCHPARAMS_COMPLETE"  # environment variable for shell completion
FINE, EXIT_DIFFERENCE, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 130, 141


class _Commands(click.Group):
    """Commands, each imported at first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names, in the order of `--help`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(importlib.import_module(f"torchparams.cli.{cmd_name}"), cmd_name)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Command at the start of a command line, and its arguments."""
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
    help="Print the version and the kernels in use.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors.")
@click.pass_context
def app(context: click.Context) -> None:
    """Inspect, compare and edit the parameters of PyTorch checkpoints and models.

    Files are never executed, and reading one does not need torch.

    \b
    Examples:
      torchparams ls model.safetensors                  list its tensors
      torchparams ls run.ckpt#model -s '**.bias'        select in a nested mapping
      torchparams stats model.pt --by layer             check its values
      torchparams diff base/ tuned/ --by module         compare by module
      torchparams convert model.pt model.safetensors    change the format
      torchparams explain mypackage.models:build        what parameters() holds
      torchparams audit mypackage.models:build          find training mistakes
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def show(result: Any, as_json: bool = False, output: str | None = None) -> None:
    """Print a result as a tree or as JSON. With `output`, write its rows to that file instead."""
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
        from torchparams.render.terminal import print_tree

        print_tree(result.tree(), sys.stdout)
    sys.stdout.flush()


def status_of(found: Any) -> int:
    """Exit status of the answers for several targets: that of the worst."""
    return {"fine": FINE, "finding": EXIT_DIFFERENCE, "error": EXIT_ERROR}[found.outcome]


def _silence(stream: TextIO) -> None:
    """Redirect a failed stream to nowhere; otherwise Python fails again when it closes the stream."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit status: 0 fine, 1 difference or finding, 2 error.

    >>> run(["ls", "nothing.safetensors"])
    2
    """
    _transferred()  # by whatever ran before in this process
    debug = "--debug" in arguments  # also after the command, where people add it
    try:
        # From here on, passwords and signatures in URLs are known to the connections alone.
        with app.make_context("torchparams", [public(part) for part in arguments if part != "--debug"]) as context:
            status = app.invoke(context)
        _tell_transfer()
        return status if isinstance(status, int) else FINE
    except click.exceptions.Exit as ended:
        _tell_transfer()
        return ended.exit_code
    except BrokenPipeError:
        # The reader stopped, as in `torchparams ls … | head`.
        _silence(sys.stdout)
        return EXIT_PIPE
    except BaseException as error:
        return _status_of(error, debug)


def _transferred() -> str:
    """How much came from servers since the last time, in a line; empty if nothing did."""
    module = sys.modules.get("torchparams.io.remote.transfer")
    return "" if module is None else f"{module.transferred.summary()}"


def _tell_transfer() -> None:
    """Write to stderr how much came from servers, if anything did."""
    line = _transferred()
    if line:
        _tell(f"{line}\n")


def main() -> NoReturn:
    """Entry point of the installed `torchparams`."""
    # A shell may close the streams: `torchparams ls … >&-`.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as above
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # escape characters that the encoding lacks, in names and histogram bars
            stream.reconfigure(errors="backslashreplace")
    asked = os.environ.get(_COMPLETE)
    if asked:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(app, {}, "torchparams", _COMPLETE, asked))
    sys.exit(run(sys.argv[1:]))


def _status_of(error: BaseException, debug: bool) -> int:
    """Print an error in one line, or with its traceback, and return the exit status."""
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
    """Write to stderr. It may be closed, or on a full disk; the exit status stays the same."""
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
        return f"{head} Out of memory"
    # any other exception is a bug of torchparams
    return f"{head} Internal error: {type(error).__name__}: {printable(str(error))}. --debug shows where"
