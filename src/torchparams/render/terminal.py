"""Reports in a terminal: colour, and no wider than it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from torchparams.render.tree import to_text

if TYPE_CHECKING:
    from typing import TextIO

    from torchparams.render.tree import Report

# Colours of the 256 that can be read on black and on white: the first 16 depend on the terminal's theme, and yellow,
# cyan and green among them cannot be read on white in most.
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


def print_report(report: Report, file: TextIO) -> None:
    """Write a report: as wide as the terminal and with colour where `file` is one, else as plain text.

    A pipe gets full names and no colour. With FORCE_COLOR it gets colour, for a pager (`less -R`), and is as wide as
    the terminal in which the pager shows it.
    """
    text = to_text(report, width_for(file), painted) if has_colour(file) else to_text(report, width_for(file))
    file.write(text + "\n")


def width_for(file: TextIO) -> int | None:
    """Columns that there are for what is written to `file`; None where nobody looks at it in a terminal."""
    if is_terminal(file):
        return shutil.get_terminal_size().columns
    if not os.environ.get("FORCE_COLOR") or os.environ.get("NO_COLOR"):
        return None
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or None
    for stream in (sys.stderr, sys.stdin):  # those of a command before a pipe are still the terminal
        try:
            return os.get_terminal_size(stream.fileno()).columns or None
        except (AttributeError, OSError, ValueError):  # closed, or not a terminal
            continue
    return None


def painted(text: str, style: str) -> str:
    r"""`text` with the escape sequences of a style.

    >>> painted("conv1", "error")
    '\x1b[38;5;196;1mconv1\x1b[0m'
    """
    look = _LOOKS.get(style)
    return f"\x1b[{look}m{text}\x1b[0m" if look else text


def is_terminal(file: TextIO) -> bool:
    """Whether a person is looking at what is written to `file`."""
    return file.isatty()


def has_colour(file: TextIO) -> bool:
    """Whether `file` is to have colour: by NO_COLOR and FORCE_COLOR, then by whether it is a capable terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return is_terminal(file) and os.environ.get("TERM") != "dumb"
