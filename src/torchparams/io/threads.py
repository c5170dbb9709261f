"""Run work on threads: the only module that starts any."""

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
"""Callback with the bytes done so far and in total, called in the thread that requested the work."""

TICK = 0.1
"""Minimum seconds between progress reports."""

WAITING = 64
"""Maximum number of results that wait for a slow consumer; then the workers wait."""


def processors() -> int:
    """Number of processors that this process may use.

    >>> processors() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Ticker:
    """Reports progress, at most once per `TICK` seconds.

    Args:
        progress: Progress callback, or None.
        total: Total bytes.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._due = 0.0

    def __call__(self, done: int) -> None:
        """Report the bytes done, if it is time."""
        if self._progress is not None and (now := time.monotonic()) >= self._due:
            self._progress(min(done, self._total), self._total)
            self._due = now + TICK


class Shared(Generic[T]):
    """Iterator shared by several threads: each item goes to one of them."""

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
    """Yield the results of workers in any order. Each worker has its own thread; a single one runs in the caller's.

    An exception of a worker is raised in the caller's thread. Exceptions, Ctrl-C and leaving the iterator early set
    `stop`, after which workers end soon. Afterwards, none of their threads is running.

    Args:
        workers: Iterators, usually generators; each is closed in its thread.
        stop: Event that tells workers to end.
        tick: Callback in the caller's thread, about every `TICK` seconds and after each result.
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
        except BaseException as error:  # raised again in the caller's thread
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
    """Map a function over items with several threads, in order; for calls that mostly wait.

    Args:
        items: The items.
        call: The function.
        threads: Maximum number of threads.
        stop: Event that is set when the calls must end.

    >>> each_of([1, 2, 3], lambda item: item * item, 2)
    [1, 4, 9]
    """
    numbers = Shared(range(len(items)))
    workers = [((number, call(items[number])) for number in numbers) for _ in range(min(threads, len(items)))]
    found = dict(results_of(workers, stop or threading.Event(), lambda: None))
    return [found[number] for number in range(len(items))]


class _Result(Generic[T]):
    """Wrapper that tells a result apart from None and exceptions."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value


def _close(worker: Iterator[object]) -> None:
    close = getattr(worker, "close", None)
    if close is not None:
        close()
