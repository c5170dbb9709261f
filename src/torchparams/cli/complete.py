"""What the shell proposes behind Tab. It stays silent about what it cannot read, and runs no code of the user's."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

PROPOSALS = 1_000
"""Names that are proposed at most."""


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The files that the shell itself proposes."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def tensor_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names in the checkpoint before the cursor that begin like the word under it.

    A live model is not built for that: importing it may take a minute, or do anything.
    """
    from torchparams.cli.targets import is_live, table

    target = context.params.get("target")
    if not isinstance(target, str) or is_live(target):
        return []
    with suppress(Exception):  # there is nobody to tell
        return list(islice((name for name in table(target) if name.startswith(incomplete)), PROPOSALS))
    return []


def columns(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The columns that `ls --sort` takes; those for descending order once a dash stands there."""
    from torchparams.render.rows import SORT_KEYS

    dash = "-" if incomplete.startswith("-") else ""
    return [dash + key for key in (*SORT_KEYS, "stored") if (dash + key).startswith(incomplete)]
