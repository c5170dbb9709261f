"""The page on remote files does what it shows, against a local server."""

from __future__ import annotations

from pathlib import Path

from run_docs import CHECKPOINT, run_page

from range_server import serving

PAGE = Path(__file__).parents[1] / "docs" / "remote.md"


def test_the_page_does_what_it_shows(tmp_path: Path) -> None:
    with serving(CHECKPOINT.parent) as server:
        page = tmp_path / PAGE.name
        page.write_text(PAGE.read_text().replace("https://models.example", server.url))
        assert run_page(page) == []
    assert len(server.requests) > 5
