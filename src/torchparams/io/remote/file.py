"""Remote files as format readers and engines see them: their size, and byte ranges.

Ranges that a run announces are requested in advance, merged, and several at a time. Received bytes that wait take at
most `limits.REMOTE_CACHE_BYTES` for all files together; ranges that a reader waits for are not counted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from bisect import bisect_right, insort
from collections import OrderedDict
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, finalize

from torchparams import limits
from torchparams.errors import RemoteError, SourceError
from torchparams.io.filebytes import FileBytes
from torchparams.io.remote.connect import connect
from torchparams.io.remote.ranges import GAP, Ranges
from torchparams.io.remote.transfer import State, changed, fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Guard = Callable[[bytes], None]

HEAD = 256 << 10
"""Bytes of the first request for a file: enough for most headers, and for whole small files."""

TAIL = 256 << 10
"""Bytes per request near the end of a file: enough for the directory of most zips."""

AHEAD = 8
"""Requests in advance per reader."""

_NEAR = 64 << 10  # bytes per request for a header in the middle of a file
_KEPT = 8  # ranges kept per file
_KEEP = 32  # files whose first and last bytes are kept
_WAIT = 0.2  # seconds between checks whether the run was stopped


class Remote:
    """Remote file, in the state of the first request. Threads share an instance.

    Args:
        name: Public name of the file.

    Attributes:
        name: Public name of the file.
        size: Size in bytes.
        state: State that every response is checked against.
        number: Unique number of this file in the process.

    Raises:
        RemoteError: The file does not exist, cannot be read, or the server does not support ranges.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._connection = connect(name)
        self._kept: list[tuple[int, memoryview]] = []
        self._guards: list[tuple[int, int, int, Guard]] = []
        self._lock = threading.Lock()
        self.number = next(_numbers)
        finalize(self, _window.forget, self.number)
        data, self.state = _result(self._start(0, HEAD, None), None, name)
        self.size = self.state.size
        self._keep(0, data)

    def __repr__(self) -> str:
        return f"<Remote {self.name}>"

    # --- ranges ------------------------------------------------------------------------------------

    def _start(self, start: int, stop: int, known: State | None) -> concurrent.futures.Future[tuple[Any, State]]:
        return asyncio.run_coroutine_threadsafe(
            fetch(self._connection, self.name, start, stop, known), self._connection.loop
        )

    def _keep(self, start: int, data: memoryview) -> None:
        """Keep recent bytes that several parts of a reader use."""
        self._kept = [(start, data), *self._kept[: _KEPT - 1]]
        with _opening:
            _keeping[self.number] = self
            _keeping.move_to_end(self.number)
            if len(_keeping) > _KEEP:
                _keeping.popitem(last=False)[1].let_go()

    def let_go(self) -> None:
        """Release the kept bytes."""
        self._kept = []

    def read(self, memory: memoryview, start: int, planned: Ranges, stopped: Callable[[], bool] | None = None) -> None:
        """Fill memory with bytes of the file.

        Args:
            memory: Writable memory.
            start: Offset of the first byte.
            planned: Ranges that will be read, including this one; the next ones are requested in advance.
            stopped: Function that tells whether the run was stopped.
        """
        self._check_guards(start, start + len(memory), planned, stopped)
        self._read(memory, start, planned, stopped)

    def _read(self, memory: memoryview, start: int, planned: Ranges, stopped: Callable[[], bool] | None = None) -> None:
        at, stop = start, start + len(memory)
        while at < stop:
            kept = self._of_kept(at, stop)
            if kept is not None:
                memory[at - start : at - start + len(kept)] = kept
                at += len(kept)
                continue
            number = planned.at(at)
            if number is None:  # not announced
                after = planned.after(at)
                end = stop if after is None else min(stop, after)
                self._read(memory[at - start : end - start], at, Ranges([(at, end)]), stopped)
                at = end
                continue
            data = self._piece(number, planned, at, stop, stopped)
            memory[at - start : at - start + len(data)] = data
            at += len(data)

    def view(
        self, start: int, stop: int, planned: Ranges, stopped: Callable[[], bool] | None = None
    ) -> memoryview | None:
        """View of a range if it was received in one piece; otherwise None, and `read` has to copy the pieces."""
        number = planned.at(start)
        if number is None or stop > planned[number][1] or self._of_kept(start, stop) is not None:
            return None
        self._check_guards(start, stop, planned, stopped)
        return self._piece(number, planned, start, stop, stopped)

    def _piece(
        self, number: int, planned: Ranges, at: int, stop: int, stopped: Callable[[], bool] | None
    ) -> memoryview:
        """Part of a range in a piece; the next pieces are requested in advance."""
        begin, end = planned[number]
        piece = _window.want(self, begin, end)
        planned.asked[number] = True
        for following in range(number + 1, min(number + 1 + AHEAD, len(planned))):
            if not planned.asked[following]:
                if not _window.ahead(self, *planned[following]):
                    break
                planned.asked[following] = True
        data = _result(piece, stopped, self.name)[0][at - begin : min(end, stop) - begin]
        _window.read(self, begin, end, len(data), planned.wanted(number))
        return data

    def _of_kept(self, at: int, stop: int) -> memoryview | None:
        for start, data in self._kept:
            if start <= at < start + len(data):
                return data[at - start : stop - start]
        return None

    def keep_near(self, start: int, stop: int) -> None:
        """Request and keep the bytes around a header too, because readers look at several parts in turn."""
        kept = self._of_kept(start, stop)
        if kept is not None and len(kept) == stop - start:
            return
        tail = max(self.size - TAIL, 0)
        begin, end = (tail, self.size) if start >= tail else (start, min(start + _NEAR, tail))
        end = max(end, stop)
        data = memoryview(bytearray(end - begin))
        self._read(data, begin, Ranges([(begin, end)]))
        self._keep(begin, data.toreadonly())

    # --- guards --------------------------------------------------------------------------------------

    def guard(self, start: int, stop: int, header: int, check: Guard) -> None:
        """Check header bytes before the bytes after them are used.

        Args:
            start, stop: Range of the bytes after the header.
            header: Offset of the header, which ends at `start`.
            check: Function of the bytes `[header, start)`, called once, that raises if they are inconsistent.
        """
        with self._lock:
            insort(self._guards, (start, stop, header, check), key=lambda guard: guard[0])

    def plan(self, ranges: Iterable[tuple[int, int]]) -> Ranges:
        """Requests for announced ranges, without kept bytes, including headers that must be checked."""
        kept = [(start, start + len(data)) for start, data in self._kept]
        return Ranges(part for each in self._with_guards(ranges) for part in _without(each, kept))

    def _with_guards(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for start, stop in ranges:
            number = bisect_right(self._guards, start, key=lambda guard: guard[0]) - 1
            if number >= 0:
                first, last, header, _ = self._guards[number]
                if start < last and start - header <= GAP:
                    yield header, stop
                    continue
                if start < last:
                    yield header, first
            yield start, stop

    def _check_guards(self, start: int, stop: int, planned: Ranges, stopped: Callable[[], bool] | None) -> None:
        while self._guards:
            with self._lock:
                number = max(bisect_right(self._guards, start, key=lambda guard: guard[0]) - 1, 0)
                concerned = None
                while number < len(self._guards) and self._guards[number][0] < stop:
                    if self._guards[number][1] > start:
                        concerned = self._guards[number]
                        break
                    number += 1
            if concerned is None:
                return
            first, _, header, check = concerned
            data = bytearray(first - header)
            self._read(memoryview(data), header, planned, stopped)
            check(bytes(data))
            with self._lock:
                if concerned in self._guards:
                    self._guards.remove(concerned)

    # --- state -----------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number derived from the ETag or date, used like the modification time of a local file."""
        from hashlib import blake2b

        return int.from_bytes(blake2b((self.state.tag or "").encode(), digest_size=7).digest())

    def confirm(self) -> None:
        """Raise if the file changed, and no response has shown it.

        Raises:
            RemoteError: The file changed.
        """
        if not self._connection.confirm(self.state):
            raise changed(self.name, None)


def _without(wanted: tuple[int, int], others: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Remainder of a range after removing other ranges from its ends."""
    start, stop = wanted
    for first, last in others:
        if first <= start < last:
            start = min(last, stop)
        if first < stop <= last:
            stop = max(first, start)
    if start < stop:
        yield start, stop


_numbers = count()
_keeping: OrderedDict[int, Remote] = OrderedDict()
_open: WeakValueDictionary[str, Remote] = WeakValueDictionary()
_opening = threading.Lock()


def remote(name: str) -> Remote:
    """Remote file of a public name: the open one, or a new one."""
    found = _open.get(name)
    if found is None:
        found = Remote(name)
        with _opening:
            found = _open.setdefault(name, found)
    return found


def forget(name: str) -> None:
    """Request a file, or all files below a directory, again: they are reopened."""
    folder = name.rstrip("/") + "/"
    with _opening:
        for each in [each for each in _open if each == name or each.startswith(folder)]:
            del _open[each]
    if name.startswith("hf://"):
        from torchparams.io.remote.hub import forget as forget_commit

        forget_commit(name)


_here = threading.local()


@contextmanager
def until(stopped: Callable[[], bool]) -> Iterator[None]:
    """Within it, this thread waits for remote files only until `stopped` says that its work has been stopped."""
    _here.stopped = stopped
    try:
        yield
    finally:
        _here.stopped = None


def _result(
    piece: concurrent.futures.Future[tuple[Any, State]], stopped: Callable[[], bool] | None, name: str
) -> tuple[memoryview, State]:
    """The bytes that come, and the state of the file."""
    stopped = stopped or getattr(_here, "stopped", None)
    while True:
        try:
            found = piece.result(None if stopped is None else _WAIT)
        except concurrent.futures.CancelledError:
            raise RemoteError("the transfer was cancelled", where=name) from None
        except TimeoutError:
            if piece.done():
                raise
            if stopped is not None and stopped():
                raise SourceError("the run was stopped", where=name) from None
        else:
            return found


class _Window:
    """Ranges in transfer, or received and waiting, for all files, up to a total size."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pieces: OrderedDict[tuple[int, int, int], concurrent.futures.Future[Any]] = OrderedDict()
        self._read: dict[tuple[int, int, int], int] = {}
        self._used: OrderedDict[tuple[int, int, int], None] = OrderedDict()
        self._nbytes = 0

    def want(self, file: Remote, start: int, stop: int) -> concurrent.futures.Future[Any]:
        """Get a range that a reader waits for."""
        key = file.number, start, stop
        with self._lock:
            found = self._pieces.get(key)
            if found is not None:
                self._pieces.move_to_end(key)
                return found
            self._make_room(stop - start, demanded=True)
            return self._begin(file, key)

    def ahead(self, file: Remote, start: int, stop: int) -> bool:
        """Request a range in advance; returns False if there is no room."""
        key = file.number, start, stop
        with self._lock:
            if key in self._pieces:
                return True
            if not self._make_room(stop - start, demanded=False):
                return False
            self._begin(file, key)
            return True

    def read(self, file: Remote, start: int, stop: int, nbytes: int, wanted: int) -> None:
        """Record that bytes of a range were read. A fully read range is dropped first."""
        with self._lock:
            key = file.number, start, stop
            if key in self._pieces:
                self._read[key] = self._read.get(key, 0) + nbytes
                if self._read[key] >= wanted:
                    self._used[key] = None

    def forget(self, number: int) -> None:
        """Drop all ranges of a closed file."""
        with self._lock:
            for key in [key for key in self._pieces if key[0] == number]:
                self._drop(key)

    def _begin(self, file: Remote, key: tuple[int, int, int]) -> concurrent.futures.Future[Any]:
        _, start, stop = key
        piece = file._start(start, stop, file.state)
        self._pieces[key] = piece
        self._nbytes += stop - start

        def ended(piece: concurrent.futures.Future[Any], file: Remote = file) -> None:
            # Keeps the file alive until the range has arrived. A failed range is requested again by the next reader.
            if piece.cancelled() or piece.exception() is not None:
                with self._lock:
                    if self._pieces.get(key) is piece:
                        self._drop(key)

        piece.add_done_callback(ended)
        return piece

    def _make_room(self, nbytes: int, *, demanded: bool) -> bool:
        most = limits.REMOTE_CACHE_BYTES
        while self._used and self._nbytes + nbytes > most:
            self._drop(next(iter(self._used)))
        if self._nbytes + nbytes <= most:
            return True
        if demanded:  # requested in advance but never read, by a run that ended early
            for key in [key for key, piece in self._pieces.items() if piece.done()]:
                if self._nbytes + nbytes <= 2 * most:
                    break
                self._drop(key)
        return False

    def _drop(self, key: tuple[int, int, int]) -> None:
        self._used.pop(key, None)
        self._read.pop(key, None)
        if self._pieces.pop(key, None) is not None:
            self._nbytes -= key[2] - key[1]


_window = _Window()


class RemoteFile:
    """Remote file for one thread, used like an open file.

    Args:
        file: The file.
        planned: Ranges that the run will read.
        stopped: Function that tells whether the run was stopped.

    Attributes:
        size: Size in bytes.
    """

    def __init__(self, file: Remote, planned: Ranges, stopped: Callable[[], bool] | None = None) -> None:
        self._file, self._planned, self._stopped = file, planned, stopped
        self.size = file.size

    def fill(self, memories: Sequence[memoryview], start: int) -> int:
        """Fill several memories, in order; returns the number of bytes."""
        at = start
        for memory in memories:
            count = min(len(memory), max(self.size - at, 0))
            self._file.read(memory[:count], at, self._planned, self._stopped)
            at += count
        return at - start

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes of a range, as far as the file reaches: a view of the received bytes, or a copy."""
        stop = min(stop, self.size)
        found = self._file.view(start, stop, self._planned, self._stopped) if start < stop else memoryview(b"")
        if found is None:
            memory = memoryview(bytearray(stop - start))
            self._file.read(memory, start, self._planned, self._stopped)
            found = memory.toreadonly()
        return found

    def close(self) -> None:
        """Do nothing: there is no open file."""


class RemoteBytes(FileBytes):
    """Bytes of a remote file, by range; see `FileBytes`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = remote(path)
        self.size = self.file.size

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes `[start, stop)`, which must be inside the file. Requests nearby headers too."""
        if stop - start <= _NEAR or start >= self.size - TAIL:
            self.file.keep_near(start, stop)
        return bytes(self.view(start, stop))

    def read_each(self, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Read each range; the next ones are requested in advance."""
        listed = list(ranges)
        planned = self.file.plan(listed)
        for start, stop in listed:
            data = bytearray(stop - start)
            self.file.read(memoryview(data), start, planned)
            yield bytes(data)

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes `[start, stop)`, read-only."""
        return memoryview(self.own(start, stop)).toreadonly()

    def own(self, start: int, stop: int, alignment: int = 1) -> Any:
        """Bytes `[start, stop)` in private memory."""
        data = bytearray(stop - start)
        self.file.read(memoryview(data), start, self.file.plan([(start, stop)]))
        return data

    def guard(self, start: int, stop: int, header: int, check: Guard) -> None:
        """See `FileBytes.guard`: the check runs when the bytes after the header are first read."""
        if start < stop:
            self.file.guard(start, stop, header, check)

    def check_unchanged(self) -> None:
        """Raise if the file was reopened, and has changed. The next response shows other changes."""
        if remote(self.path).state != self.file.state:
            raise changed(self.path, None)

    def close(self) -> None:
        """Do nothing: there is no open file."""
