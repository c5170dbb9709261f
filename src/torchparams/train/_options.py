"""Values of the options of parameter groups, as text and as JSON."""

from __future__ import annotations

from typing import Any

from torchparams.errors import shorten
from torchparams.render.tree import json_number


def text(value: Any) -> str:
    """Short text of an option's value."""
    return f"{value:.6g}" if type(value) is float else shorten(repr(value), 40)


def plain(value: Any) -> Any:
    """An option's value as JSON data; text if JSON has no matching type."""
    if isinstance(value, float):
        return json_number(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return repr(value)
