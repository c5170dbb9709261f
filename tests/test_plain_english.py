"""The source keeps out of riddles: phrases that hide who acts, or on what."""

from __future__ import annotations

import re
from pathlib import Path

import torchparams

PACKAGE = Path(torchparams.__file__).parent
RIDDLES = re.compile(
    r"\b(says nothing|(disk|system) said no|what that|that which|can(not)? be had|no function of"
    r"|(?<!there )is no (str|text|number|int|float|list|dict|mapping|file|table|matrix|array|tensor|tuple|path)\b)",
    re.IGNORECASE,
)


def riddles(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if RIDDLES.search(line)]


def test_the_patterns_find_what_they_are_for() -> None:
    for line in ("shared='x' says nothing.", "The disk said no", "What that which is loaded", "3 is no number"):
        assert riddles(line) == [line]
    for line in ("there is no table", "what they say", "It is not a number", "no file is there"):
        assert riddles(line) == []


def test_the_source_has_no_riddles() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".c", ".h")]
    assert len(files) > 100
    assert {str(path.relative_to(PACKAGE)): found for path in files if (found := riddles(path.read_text()))} == {}
