"""What the shell proposes behind Tab. It stays silent about what it cannot read, and runs no code of the user's."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice

import typer

from torchparams.cli.targets import is_live, table
from torchparams.render.rows import SORT_KEYS

PROPOSALS = 1_000
"""Names that are proposed at most."""


def tensor_names(context: typer.Context, incomplete: str) -> list[str]:
    """The names in the checkpoint before the cursor that begin like the word under it.

    A live model is not built for that: importing it may take a minute, or do anything.
    """
    target = context.params.get("target")
    if not isinstance(target, str) or is_live(target):
        return []
    with suppress(Exception):  # there is nobody to tell
        return list(islice((name for name in table(target) if name.startswith(incomplete)), PROPOSALS))
    return []


def columns(incomplete: str) -> list[str]:
    """The columns that `ls --sort` takes; those for descending order once a dash stands there."""
    dash = "-" if incomplete.startswith("-") else ""
    return [dash + key for key in (*SORT_KEYS, "stored") if (dash + key).startswith(incomplete)]
