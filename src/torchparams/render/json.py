"""Results as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TextIO


def print_json(form: Any, file: TextIO) -> None:
    """Write what a result's `to_json` gives, and a newline.

    The text is JSON that any reader takes: numbers that JSON has no way to write must come as the strings
    `nan`, `inf` and `-inf` already.

    Raises:
        ValueError: A number is not finite.
    """
    json.dump(form, file, indent=2, ensure_ascii=False, allow_nan=False)
    file.write("\n")
