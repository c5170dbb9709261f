"""Extension of griffe for the site: examples in docstrings become blocks of code: Markdown takes `>` for a quote."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^([ ]*)>>> .*\n?(?:\1\S.*\n?)*", re.MULTILINE)


def fenced(text: str) -> str:
    """A docstring with each example, its prompts and its output, in a block of code."""
    return _EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0].rstrip()}\n{found[1]}```\n", text)


class Examples(griffe.Extension):  # type: ignore[misc]  # of a library without types here
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a class, function, attribute or module."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
