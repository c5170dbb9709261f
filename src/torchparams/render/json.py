"""Print results as JSON."""

from __future__ import annotations

import json
import re
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TextIO


def print_json(form: Any, file: TextIO) -> None:
    """Print JSON data and a newline; prints nothing if the data cannot be JSON.

    The output is strict JSON: non-finite numbers must already be the texts `nan`, `inf` and `-inf`. Characters that are
    not printable, or not in the encoding of `file`, are escaped.

    Raises:
        ValueError: A number is not finite.
    """
    file.write(json_text(form, ascii_only=not _is_utf8(file)) + "\n")


def json_text(form: Any, *, ascii_only: bool = False) -> str:
    r"""Format JSON data as text.

    Args:
        form: JSON data from the `to_json` of a result.
        ascii_only: Escape all non-ASCII characters, instead of only unprintable ones.

    >>> json_text(["\x9b2J", "\ud800", "é"])
    '[\n  "\\u009b2J",\n  "\\ud800",\n  "é"\n]'
    """
    whole = StringIO()
    json.dump(form, whole, indent=2, ensure_ascii=ascii_only, allow_nan=False)
    # `json` already escapes control characters below the space inside strings.
    return _ODD.sub(_escaped, whole.getvalue())


_ODD = re.compile(r"[^\n -~]")


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return character if character.isprintable() else json.dumps(character)[1:-1]


def _is_utf8(file: TextIO) -> bool:
    encoding = getattr(file, "encoding", None)  # a captured stream may have none, and takes any text
    return encoding is None or encoding.replace("-", "").replace("_", "").lower() in ("utf8", "utf8sig")
