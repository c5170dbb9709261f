"""Hooks of mkdocs: files outside docs/ that belong to the site, and the links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"CHANGELOG.md": "changes.md", "SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/, with links as seen from docs/."""
    from mkdocs.structure.files import File

    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/ to the pages of the site."""
    for name, page in OUTSIDE.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}").replace(f"]({name}", f"]({page}")
    markdown = re.sub(r"\]\((?:\.\./)?README\.md[^)]*\)", "](index.md)", markdown)
    # A list needs an empty line before it here, and none on a forge.
    return re.sub(r"^(?![-*|>\s#])(.+)\n(?=[-*] )", r"\1\n\n", markdown, flags=re.MULTILINE)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads anything from another place."""
    loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?https?:[^>]*>", output)
    if loaded:
        raise SystemExit(f"{page.file.src_uri} loads from elsewhere: {loaded[0]}")
    return output
