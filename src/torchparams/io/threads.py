"""Work on the threads of this process: the one place that starts any."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

S = TypeVar("S")
T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all, in the thread that asked for the work."""

TICK = 0.1
"""Seconds between two reports of progress."""

WAITING = 64
"""Results that wait for a slow consumer; then the threads wait too."""


def processors() -> int:
    """Count of the processors that this process may use.

    >>> processors() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Ticker:
    """Reports progress, at most once in `TICK` seconds.

    Args:
        progress: The report; None for none.
        total: Bytes in all.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._due = 0.0

    def __call__(self, done: int) -> None:
        """Report that so many bytes are done, if it is time to."""
        if self._progress is not None and (now := time.monotonic()) >= self._due:
            self._progress(min(done, self._total), self._total)
            self._due = now + TICK


class Shared(Generic[T]):
    """An iterator that several threads draw from: each item goes to one of them."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)


def results_of(
    workers: Sequence[Iterator[T]],
    stop: threading.Event,
    tick: Callable[[], object] = lambda: None,
) -> Generator[T, None, None]:
    """What workers give, in no particular order; each runs on a thread of its own, a single one in the caller's.

    An exception of a worker is raised in the caller's thread. It, Ctrl-C and leaving the iterator early set `stop`, at
    which workers end soon; when control is back, none of their threads runs any more.

    Args:
        workers: Iterators, usually generators; each is closed in its thread.
        stop: Set when workers must end.
        tick: Called in the caller's thread, about every `TICK` seconds and after each result.
    """
    if len(workers) == 1:
        (worker,) = workers
        try:
            for result in worker:
                yield result
                tick()
        finally:
            stop.set()
            _close(worker)
        return
    found: queue.Queue[_Result[T] | BaseException | None] = queue.Queue(WAITING)

    def put(what: _Result[T] | BaseException | None) -> None:
        while True:
            try:
                return found.put(what, timeout=TICK)
            except queue.Full:
                if stop.is_set():
                    return None

    def work(worker: Iterator[T]) -> None:
        try:
            for result in worker:
                put(_Result(result))
        except BaseException as error:  # raised anew in the caller's thread, whatever it is
            put(error)
        finally:
            _close(worker)
            put(None)

    threads = [
        threading.Thread(target=work, args=(worker,), name=f"torchparams-{i}", daemon=True)
        for i, worker in enumerate(workers)
    ]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            try:
                what = found.get(timeout=TICK)
            except queue.Empty:
                pass
            else:
                if isinstance(what, BaseException):
                    raise what
                if what is None:
                    running -= 1
                else:
                    yield what.value
            tick()
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()


def each_of(items: Sequence[S], call: Callable[[S], T], threads: int, stop: threading.Event | None = None) -> list[T]:
    """What a function gives for each item, in order; on so many threads, for calls that wait for others.

    Args:
        items: The items.
        call: The function.
        threads: How many run at a time.
        stop: Set when they must end.

    >>> each_of([1, 2, 3], lambda item: item * item, 2)
    [1, 4, 9]
    """
    numbers = Shared(range(len(items)))
    workers = [((number, call(items[number])) for number in numbers) for _ in range(min(threads, len(items)))]
    found = dict(results_of(workers, stop or threading.Event(), lambda: None))
    return [found[number] for number in range(len(items))]


class _Result(Generic[T]):
    """A result on its way: a worker may give None, or an exception."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value


def _close(worker: Iterator[object]) -> None:
    close = getattr(worker, "close", None)
    if close is not None:
        close()
