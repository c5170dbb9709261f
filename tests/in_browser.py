"""Pages in Debian's Chromium for tests of the report: console messages and network requests."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READY = "document.documentElement.dataset.ready === 'all'"


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; without one the tests fail, and say how to get it."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("Chromium is missing, and the page of the report is tested in it: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--force-color-profile=srgb"])
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A page that is open, with all that it said and asked for.

    Attributes:
        page: The page of playwright.
        said: Console messages, errors and dialogs.
        asked: Addresses of requests, that of the file itself left out.
    """

    def __init__(self, browser: Any, path: Path, *, dark: bool = False, size: tuple[int, int] = (1280, 900)) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self._context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
        )
        self.page = self._context.new_page()
        address = path.resolve().as_uri()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", lambda request: self._request(request.url.split("#")[0], address))
        self.page.goto(address, wait_until="domcontentloaded")

    def _dialog(self, dialog: Any) -> None:
        self.said.append(dialog.message)
        dialog.dismiss()

    def _request(self, url: str, own: str) -> None:
        if url != own:
            self.asked.append(url)

    def ready(self) -> Any:
        """The page, once everything is drawn."""
        self.page.wait_for_function(READY)
        return self.page

    def close(self) -> None:
        """Close it, and hold that it was silent."""
        self._context.close()
        assert self.said == []
        assert self.asked == []


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Opened]:
    """A page that has to say nothing on its console, and to ask for nothing, up to the end of the context."""
    found = Opened(browser, path, **options)
    try:
        yield found
    except BaseException:
        found._context.close()
        raise
    found.close()
