"""Opening files, and reading ranges of them: the one place that does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torchparams.errors import SourceError, TruncatedFile
from torchparams.io.paths import is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torchparams.info import Location
    from torchparams.io.remote.ranges import Ranges

OPEN_FILES = 64
"""Files that one thread keeps open."""


class Files:
    """The files of one run, and the state that each had when the run first opened it. Threads share it.

    A run that reads a file which somebody writes to meanwhile gets bytes of two states; `open` and `check` refuse that.

    Args:
        stopped: Says whether the run has been stopped: then nobody waits for a remote file any more.
    """

    def __init__(self, stopped: Callable[[], bool] | None = None) -> None:
        self._seen: dict[str, Any] = {}
        self._stopped = stopped
        self._planned: dict[str, Ranges] = {}

    def expect(self, places: Iterable[Location]) -> None:
        """Say what the run will read of remote files, in any order: it is asked for in merged ranges, ahead."""
        wanted: dict[str, list[tuple[int, int]]] = {}
        for place in places:
            if is_url(place.file):
                wanted.setdefault(place.file, []).append((place.start, place.stop))
        if wanted:
            from torchparams.io.remote.file import remote

            for path, ranges in wanted.items():
                self._planned[path] = remote(path).plan(ranges)

    def open(self, path: str) -> Any:
        """Open a file, unbuffered; of a remote one, what `read_into` and `size_of` take in its place.

        Raises:
            SourceError: It cannot be opened, or is not the file that this run saw before.
        """
        if is_url(path):
            return self._open_remote(path)
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

    def _open_remote(self, path: str) -> Any:
        from torchparams.io.remote.file import RemoteFile, remote
        from torchparams.io.remote.ranges import Ranges

        file = remote(path)
        if self._seen.setdefault(path, file) is not file:
            raise _changed(path)
        return RemoteFile(file, self._planned.get(path) or Ranges(()), self._stopped)

    def check(self) -> None:
        """Refuse a file that somebody has written to since this run opened it.

        Raises:
            SourceError: Somebody has.
        """
        for path, before in self._seen.items():
            if is_url(path):
                before.confirm()
                continue
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
    fill = getattr(file, "fill", None)
    if fill is not None:  # a remote one
        count: int = fill(memories, start)
        return count
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


def size_of(file: Any) -> int:
    """The bytes of an open file."""
    size: int = file.size if hasattr(file, "fill") else os.fstat(file.fileno()).st_size
    return size


def read_whole(path: str, most: int) -> bytes:
    """The first bytes of a file, at most so many.

    Raises:
        SourceError: It cannot be read.
    """
    file = Files().open(path)
    try:
        memory = memoryview(bytearray(min(size_of(file), most)))
        return bytes(memory[: read_into(file, [memory], 0, path)])
    finally:
        file.close()


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
