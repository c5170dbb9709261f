"""Progress bars with bytes per second and remaining time."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 0.5
"""Seconds before a bar appears, so that short work shows none and does not pay for one."""


@contextmanager
def progress(what: str, *, patience: float = PATIENCE) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a progress callback (bytes done, bytes in total), or None if stderr is not a terminal.

    The bar is drawn on stderr, and removed at the end.

    >>> with progress("reading") as tell:
    ...     for done in range(0, 101, 50):
    ...         if tell: tell(done, 100)
    """
    if not sys.stderr.isatty():
        yield None
        return
    begun = time.monotonic()
    bar: Any = None

    def tell(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            if time.monotonic() - begun < patience:
                return
            bar = _Bar(what, total)
        bar.update(done)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()


class _Bar:
    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(what, total=total)
        self._progress.start()

    def update(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        self._progress.stop()
