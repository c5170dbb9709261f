"""The site: every page is in its navigation, the reference has every public name, and examples are blocks of code."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from site_hooks import OUTSIDE

import torchparams as tp

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[1]


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in _pages(part)]


def test_every_page_is_in_the_navigation() -> None:
    pages = _pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(pages) == len(set(pages))
    assert set(pages) == {path.name for path in (ROOT / "docs").glob("*.md")} | set(OUTSIDE.values())


def test_the_reference_has_every_public_name_and_every_result() -> None:
    named = re.findall(r"^::: torchparams\.(\S+)$", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE)
    assert len(named) == len(set(named))
    public = {name for name in tp.__all__ if name != "__version__"}
    results = {f"{home.removeprefix('torchparams.')}.{name}" for name, home in tp._MOVED.items()}
    assert public | results <= set(named), sorted((public | results) - set(named))
    for name in named:
        home, _, last = f"torchparams.{name}".rpartition(".")
        assert hasattr(importlib.import_module(home), last), name


def test_examples_in_docstrings_become_blocks_of_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object, Object=object))
    monkeypatch.delitem(sys.modules, "site_docstrings", raising=False)
    import site_docstrings

    text = "Read.\n\n>>> one()\n[(1)]\n>>> two(\n...     3\n... )\n\nText, not [code](there).\n    >>> inner\n    4\n"
    assert site_docstrings.fenced(text) == (
        "Read.\n\n```pycon\n>>> one()\n[(1)]\n>>> two(\n...     3\n... )\n```\n\nText, not [code](there).\n"
        "    ```pycon\n    >>> inner\n    4\n    ```\n"
    )
    thing = types.SimpleNamespace(docstring=types.SimpleNamespace(value=">>> 1\n1"))
    site_docstrings.Examples().on_object(obj=thing)
    assert thing.docstring.value == "```pycon\n>>> 1\n1\n```\n"
    site_docstrings.Examples().on_object(obj=types.SimpleNamespace(docstring=None))
