"""Opening files, and reading ranges of them: the one place that does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torchparams.errors import SourceError, TruncatedFile

if TYPE_CHECKING:
    from collections.abc import Sequence

OPEN_FILES = 64
"""Files that one thread keeps open."""


class Files:
    """The files of one run, and the state that each had when the run first opened it. Threads share it.

    A run that reads a file which somebody writes to meanwhile gets bytes of two states; `open` and `check` refuse that.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int, int]] = {}

    def open(self, path: str) -> Any:
        """Open a file, unbuffered.

        Raises:
            SourceError: It cannot be opened, or is not the file that this run saw before.
        """
        try:
            # O_NONBLOCK: opening a named pipe that took the file's place would wait for ever.
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
            file = os.fdopen(os.open(path, flags), "rb", buffering=0)
        except OSError as error:
            raise SourceError(error.strerror or str(error), where=path) from None
        now = _state(os.fstat(file.fileno()))
        if self._seen.setdefault(path, now) != now:
            file.close()
            raise _changed(path)
        return file

    def check(self) -> None:
        """Refuse a file that somebody has written to since this run opened it.

        Raises:
            SourceError: Somebody has.
        """
        for path, before in self._seen.items():
            try:
                now = _state(os.stat(path))
            except OSError:
                continue  # gone, so nobody can have written to what was read
            if now != before and now[0] == before[0]:
                raise _changed(path)


def _state(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_ino, about.st_size, about.st_mtime_ns


def _changed(path: str) -> SourceError:
    return SourceError("the file was written to while it was read", where=path, hint="open it anew, and run again")


class OpenFiles:
    """The files that one thread has open, at most `OPEN_FILES` of them; the one used longest ago is closed first.

    Args:
        files: Opens them.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._open: dict[str, Any] = {}

    def get(self, path: str) -> Any:
        """The file, opened if it is not."""
        file = self._open.pop(path, None)
        if file is None:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            file = self._files.open(path)
        self._open[path] = file  # now the last in the order
        return file

    def read(self, path: str, memory: memoryview, start: int, name: str) -> None:
        """Fill memory with the bytes of a file from `start` on.

        Args:
            path: The file.
            memory: Writable, of bytes.
            start: Offset of the first byte.
            name: The tensor that the bytes belong to, for messages.

        Raises:
            TruncatedFile: The file ends before the memory is full.
            SourceError: The system cannot read it.
        """
        file = self.get(path)
        got = read_into(file, [memory], start, path)
        if got < len(memory):
            raise ended(path, start + got, name)

    def close(self) -> None:
        """Close all of them."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def read_into(file: Any, memories: Sequence[memoryview], start: int, path: str) -> int:
    """Fill memories, one after the other, with the bytes of an open file from `start` on.

    Where the system lacks `preadv`, the file's position is moved: two threads must not share the file then.

    Returns:
        How many bytes there were: fewer than the memories take where the file ends.

    Raises:
        SourceError: The system cannot read it.
    """
    left = [memory for memory in memories if len(memory)]
    done = 0
    try:
        while left:
            if hasattr(os, "preadv"):
                got = os.preadv(file.fileno(), left, start + done)
            else:
                file.seek(start + done)
                got = file.readinto(left[0])
            if not got:
                break
            done += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if got:
                left[0] = left[0][got:]
    except OSError as error:
        raise unreadable(error, path) from error
    return done


def unreadable(error: OSError, path: str) -> SourceError:
    """The error for a file that the system cannot read."""
    return SourceError(f"it could not be read: {error.strerror or error}", where=path)


def ended(path: str, at: int, name: str) -> TruncatedFile:
    """The error for a file that ends within a tensor."""
    return TruncatedFile(
        f"the file ends at byte {at}, within the tensor {name!r}",
        where=path,
        exists="it was longer when it was listed",
    )
