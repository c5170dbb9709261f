"""Print trees of texts and tables to a terminal, with colour and within its width."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from torchparams.render.tree import to_text

if TYPE_CHECKING:
    from typing import TextIO

    from torchparams.render.tree import Tree

# Only 256-colour codes that are legible on black and on white. The first 16 depend on the theme; yellow, cyan and green
# among them are illegible on white in most themes.
_LOOKS = {
    "heading": "2",
    "title": "1",
    "name": "",
    "number": "38;5;31",
    "bars": "38;5;31",
    "dtype": "38;5;133",
    "dim": "2",
    "good": "38;5;28",
    "warn": "38;5;166;1",
    "error": "38;5;196;1",
}


def print_tree(tree: Tree, file: TextIO) -> None:
    """Print a tree: in the terminal's width and with colour on a terminal, as plain text otherwise.

    A pipe gets full names and no colour. FORCE_COLOR adds colour and the width of the controlling terminal, for a pager
    (`less -R`).
    """
    text = to_text(tree, width_for(file), painted) if has_colour(file) else to_text(tree, width_for(file))
    file.write(text + "\n")


def width_for(file: TextIO) -> int | None:
    """Available columns for output to `file`; None if it is not shown in a terminal."""
    if is_terminal(file):
        return shutil.get_terminal_size().columns
    if not os.environ.get("FORCE_COLOR") or os.environ.get("NO_COLOR"):
        return None
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or None
    for stream in (sys.stderr, sys.stdin):  # in a pipe, these are still connected to the terminal
        try:
            return os.get_terminal_size(stream.fileno()).columns or None
        except (AttributeError, OSError, ValueError):  # closed, or not a terminal
            continue
    return None


def painted(text: str, style: str) -> str:
    r"""Add the escape sequences of a style to a text.

    >>> painted("conv1", "error")
    '\x1b[38;5;196;1mconv1\x1b[0m'
    """
    look = _LOOKS.get(style)
    return f"\x1b[{look}m{text}\x1b[0m" if look else text


def is_terminal(file: TextIO) -> bool:
    """Whether `file` is a terminal."""
    return file.isatty()


def has_colour(file: TextIO) -> bool:
    """Whether to use colour, by NO_COLOR and FORCE_COLOR, then by the capabilities of the terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return is_terminal(file) and os.environ.get("TERM") != "dumb"
