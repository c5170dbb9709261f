"""Results as JSON."""

from __future__ import annotations

import json
import re
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TextIO


def print_json(form: Any, file: TextIO) -> None:
    """Write what a result's `to_json` gives, and a newline: all of it, or nothing where it cannot be JSON.

    The text is JSON that any reader takes: numbers that JSON has no way to write must come as the strings
    `nan`, `inf` and `-inf` already. Characters that are not printable, or that the encoding of `file` lacks, are
    escaped as JSON escapes them.

    Raises:
        ValueError: A number is not finite.
    """
    file.write(json_text(form, ascii_only=not _is_utf8(file)) + "\n")


def json_text(form: Any, *, ascii_only: bool = False) -> str:
    r"""The JSON text of a result.

    Args:
        form: What a result's `to_json` gives.
        ascii_only: Escape all other characters, not only those that are not printable.

    >>> json_text(["\x9b2J", "\ud800", "é"])
    '[\n  "\\u009b2J",\n  "\\ud800",\n  "é"\n]'
    """
    whole = StringIO()
    json.dump(form, whole, indent=2, ensure_ascii=ascii_only, allow_nan=False)
    # Within its texts, JSON has escaped all control characters below the space.
    return _ODD.sub(_escaped, whole.getvalue())


_ODD = re.compile(r"[^\n -~]")


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return character if character.isprintable() else json.dumps(character)[1:-1]


def _is_utf8(file: TextIO) -> bool:
    encoding = getattr(file, "encoding", None)  # what tests and notebooks capture with may have none: it takes any text
    return encoding is None or encoding.replace("-", "").replace("_", "").lower() in ("utf8", "utf8sig")
