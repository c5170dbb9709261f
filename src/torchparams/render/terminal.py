"""Reports in a terminal: colour, and no wider than it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from torchparams.report import to_text

if TYPE_CHECKING:
    from typing import TextIO

    from torchparams.report import Report

# Only looks that can be read on dark and on light ground: none of these is near black, white or yellow.
_LOOKS = {
    "heading": "2",
    "title": "1",
    "name": "",
    "number": "36",
    "dtype": "35",
    "dim": "2",
    "good": "32",
    "warn": "33;1",
    "error": "31;1",
}


def print_report(report: Report, file: TextIO) -> None:
    """Write a report: as wide as the terminal and with colour where `file` is one, else as plain text.

    What a pipe gets is never cut, and has no colour unless FORCE_COLOR asks for it.
    """
    terminal = is_terminal(file)
    width = shutil.get_terminal_size().columns if terminal else None
    text = to_text(report, width, painted) if has_colour(file) else to_text(report, width)
    file.write(text + "\n")


def painted(text: str, style: str) -> str:
    r"""`text` with the escape sequences of a style.

    >>> painted("conv1", "error")
    '\x1b[31;1mconv1\x1b[0m'
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
