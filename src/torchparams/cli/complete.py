"""Shell completion. It ignores unreadable files, and never runs user code."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

PROPOSALS = 1_000
"""Maximum number of proposed names."""


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """File names, proposed by the shell itself."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def tensor_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Tensor names with the typed prefix, from the checkpoint on the command line.

    A live model is not built: importing user code may be slow or have side effects.
    """
    from torchparams.cli.targets import is_live, table

    target = context.params.get("target")
    if not isinstance(target, str) or is_live(target):
        return []
    with suppress(Exception):  # completion has no way to report errors
        return list(islice((name for name in table(target) if name.startswith(incomplete)), PROPOSALS))
    return []


def columns(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Columns for `ls --sort`, with a dash if one is typed."""
    from torchparams.render.rows import SORT_KEYS

    dash = "-" if incomplete.startswith("-") else ""
    return [dash + key for key in (*SORT_KEYS, "stored") if (dash + key).startswith(incomplete)]
