"""Open files and read byte ranges: the only module that does."""

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
"""Maximum number of open files per thread."""


class Files:
    """Files of one run, with their state at first opening. Threads share an instance.

    If a file changes during a run, the run would read bytes of two states; `open` and `check` raise an error then.

    Args:
        stopped: Function that tells whether the run was stopped, so that nobody waits for remote files any more.
    """

    def __init__(self, stopped: Callable[[], bool] | None = None) -> None:
        self._seen: dict[str, Any] = {}
        self._stopped = stopped
        self._planned: dict[str, Ranges] = {}

    def expect(self, places: Iterable[Location]) -> None:
        """Announce the ranges of remote files that the run will read: they are requested in advance, merged."""
        wanted: dict[str, list[tuple[int, int]]] = {}
        for place in places:
            if is_url(place.file):
                wanted.setdefault(place.file, []).append((place.start, place.stop))
        if wanted:
            from torchparams.io.remote.file import remote

            for path, ranges in wanted.items():
                self._planned[path] = remote(path).plan(ranges)

    def open(self, path: str) -> Any:
        """Open a file, unbuffered; for a remote one, returns an object for `read_into` and `size_of`.

        Raises:
            SourceError: The file cannot be opened, or changed during this run.
        """
        if is_url(path):
            return self._open_remote(path)
        try:
            # O_NONBLOCK: opening a named pipe that replaced the file would block forever.
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
        """Raise if a file changed since this run opened it.

        Raises:
            SourceError: A file changed.
        """
        for path, before in self._seen.items():
            if is_url(path):
                before.confirm()
                continue
            try:
                now = _state(os.stat(path))
            except OSError:
                continue  # deleted, so what was read is consistent
            if now != before and now[0] == before[0]:
                raise _changed(path)


def _state(about: os.stat_result) -> tuple[int, int, int]:
    return about.st_ino, about.st_size, about.st_mtime_ns


def _changed(path: str) -> SourceError:
    return SourceError(
        "the file changed while it was read", where=path, hint="open the file again, and repeat the call"
    )


class OpenFiles:
    """Open files of one thread, at most `OPEN_FILES`; the least recently used is closed first.

    Args:
        files: Opener of files.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._open: dict[str, Any] = {}

    def get(self, path: str) -> Any:
        """Get an open file; opens it if needed."""
        file = self._open.pop(path, None)
        if file is None:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            file = self._files.open(path)
        self._open[path] = file  # most recently used last
        return file

    def read(self, path: str, memory: memoryview, start: int, name: str) -> None:
        """Fill memory with bytes of a file.

        Args:
            path: Path of the file.
            memory: Writable memory.
            start: Offset of the first byte.
            name: Name of the tensor, for messages.

        Raises:
            TruncatedFile: The file ends before the memory is full.
            SourceError: The file cannot be read.
        """
        file = self.get(path)
        got = read_into(file, [memory], start, path)
        if got < len(memory):
            raise ended(path, start + got, name)

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def read_into(file: Any, memories: Sequence[memoryview], start: int, path: str) -> int:
    """Fill several memories, in order, with bytes of an open file.

    Without `preadv`, this moves the position of the file, so two threads must not share it.

    Returns:
        Number of bytes read; fewer than requested if the file ends.

    Raises:
        SourceError: The file cannot be read.
    """
    fill = getattr(file, "fill", None)
    if fill is not None:  # a remote file
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
    """Size of an open file, in bytes."""
    size: int = file.size if hasattr(file, "fill") else os.fstat(file.fileno()).st_size
    return size


def read_whole(path: str, most: int) -> bytes:
    """First bytes of a file, at most `most`.

    Raises:
        SourceError: The file cannot be read.
    """
    file = Files().open(path)
    try:
        memory = memoryview(bytearray(min(size_of(file), most)))
        return bytes(memory[: read_into(file, [memory], 0, path)])
    finally:
        file.close()


def unreadable(error: OSError, path: str) -> SourceError:
    """Error for a file that the system cannot read."""
    return SourceError(f"the file cannot be read: {error.strerror or error}", where=path)


def ended(path: str, at: int, name: str) -> TruncatedFile:
    """Error for a file that ends inside a tensor."""
    return TruncatedFile(
        f"the file ends at byte {at}, within the tensor {name!r}",
        where=path,
        exists="it was longer when it was listed",
    )


def size_and_time(path: str) -> tuple[int, int]:
    """Size and modification time (ns) of a file; of a remote one, its size and a number made of its version."""
    if is_url(path):
        from torchparams.io.remote.file import remote

        return remote(path).size, remote(path).version
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns
