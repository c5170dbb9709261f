"""The engine that runs on the threads of this process."""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from torchparams.engines.base import Engine, Job, stored_bits
from torchparams.io.read import Files, MappingReader, Reader, SharedArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torchparams.engines.base import Fold, Progress
    from torchparams.info import Location
    from torchparams.io.blocks import Block

Part = TypeVar("Part")
Result = TypeVar("Result")

BLOCK_BYTES = 1 << 20
"""Bytes that a thread reads at once: they stay in its second-level cache while they are worked on."""

_ARRAY_BLOCKS = 4  # of these at once where nothing is read: threads take turns in Python less often
_MAPPED_BLOCKS = 8  # of these at once where files are mapped: to map and to unmap costs the same for any length

PART_BYTES = 1 << 25
"""Bytes of the parts that a large tensor is cut into, each with a fold of its own."""

_BATCH = 256  # small tensors that a thread takes at once
_GAP = 4096  # bytes between two tensors that are rather read than skipped
_WORTHWHILE = 1 << 14  # bytes of a tensor below which its work is in Python, which one thread does at a time
_TICK = 0.1  # seconds between two reports


class ThreadEngine(Engine):
    """Reads files block by block, on as many threads as there are processors; large tensors are shared among them.

    Memory stays flat: each thread has one buffer, and nothing is mapped. Tensors whose bytes do not lie
    contiguous in a file come from `Source.numpy`, as a whole where the source cannot give a view.

    With `mapped`, no byte of a file is copied, which saves a fifth to a third of the work of counting, comparing and
    hashing. Blocks are 8 times as long then, and each is unmapped after its use. A disk that fails is an error all the
    same: Linux (from 5.14 on) is asked for all of a block's pages before one is touched. The price: where somebody
    makes the file shorter during the scan, the system may end the process (SIGBUS) before it can say so.

    Args:
        threads: How many; None for the processors that this process may use.
        block_bytes: Bytes that are read at once.
        part_bytes: Bytes of the parts of large tensors.
        mapped: Map files block by block instead of reading them.

    >>> import numpy as np
    >>> from torchparams.engines import jobs_of
    >>> from torchparams.testing import MemorySource
    >>> class Bytes:
    ...     def __init__(self): self.seen = 0
    ...     def update(self, block): self.seen += len(block.buffer)
    ...     def finish(self): return self.seen
    >>> jobs = jobs_of(MemorySource({"w": np.ones((2, 3), np.float32)}))
    >>> ThreadEngine().map(jobs, begin=lambda job: Bytes(), combine=lambda job, parts: sum(parts))
    {'w': 24}
    """

    label = "threads"

    def __init__(
        self,
        threads: int | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
        part_bytes: int = PART_BYTES,
        mapped: bool = False,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"at least one thread, not {threads}")
        self.threads = threads or processors()
        self.block_bytes = block_bytes
        self.part_bytes = max(part_bytes, block_bytes)
        self.mapped = mapped

    def run(
        self,
        jobs: Iterable[Job],
        begin: Callable[[Job], Fold[Part]],
        combine: Callable[[Job, Sequence[Part]], Result],
        *,
        ordered: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Job, Result]]:
        """See `Engine.run`. With one thread, or tensors that are all small, all of it happens in the caller's."""
        listed = list(jobs)
        total = sum(job.nbytes for job in listed)
        for source in {id(source): source for job in listed for source, _ in job.operands}.values():
            source.check_unchanged()
        files, stop = Files(), threading.Event()
        items = self._items(listed, ordered, total)
        if self.threads == 1 or total <= max(self.block_bytes, _WORTHWHILE * len(listed)):
            worker = _Worker(items, stop, begin, combine, self._reader(files))
            worker.tick = _Ticker(progress, total)
            try:
                yield from worker.results()
            finally:
                worker.close()
        else:
            shared = _Shared(items)
            reader = self._reader(files)
            workers = [_Worker(shared, stop, begin, combine, reader) for _ in range(self.threads)]
            yield from _on_threads(workers, stop, total, progress)
        files.check()
        if progress is not None:
            progress(total, total)

    def _reader(self, files: Files) -> Callable[[], Reader]:
        if self.mapped:
            return lambda: MappingReader(files, self.block_bytes * _MAPPED_BLOCKS)
        return lambda: Reader(files, self.block_bytes)

    def _items(self, jobs: list[Job], ordered: bool, total: int) -> Iterator[list[_Piece]]:
        """What a thread takes at once: a part of a large job, or many small jobs."""
        places = [[source.span(info.name) for source, info in job.operands] for job in jobs]
        order = list(range(len(jobs)))
        if all(place is not None for row in places for place in row):
            # As they lie in the files, which may be on a disk.
            order.sort(key=lambda i: [(place.file, place.start) for place in places[i] if place is not None])
        if ordered:
            # A large tensor that cannot be shared comes first: as the last one, it would keep one thread alone busy.
            order.sort(key=lambda i: jobs[i].nbytes * 4 * self.threads < total)
        batch: list[_Piece] = []
        size = 0
        for i in order:
            job = jobs[i]
            bits = [
                stored_bits(info.dtype, place is not None)
                for (_, info), place in zip(job.operands, places[i], strict=True)
            ]
            # Cuts are the same for any number of threads, and at whole bytes and groups of packed elements.
            blocks = _ARRAY_BLOCKS if not any(places[i]) else _MAPPED_BLOCKS if self.mapped and all(places[i]) else 1
            nbytes = self.block_bytes * blocks
            step = max(nbytes * 8 // max(bits) // 64 * 64, 64)
            whole = max(self.part_bytes * 8 // max(bits) // step, 1) * step
            count = 1 if ordered else max(-(-job.numel // whole), 1)
            record = _Record(job, places[i], count, step)
            if count == 1 and job.nbytes <= self.block_bytes // 4:
                batch.append(_Piece(record, 0, 0, job.numel))
                size += job.nbytes
                if size >= self.block_bytes or len(batch) == _BATCH:
                    yield _run_together(batch)
                    batch, size = [], 0
                continue
            for part in range(count):
                yield [_Piece(record, part, part * whole, job.numel if ordered else min((part + 1) * whole, job.numel))]
        if batch:
            yield _run_together(batch)


def processors() -> int:
    """How many processors this process may use.

    >>> processors() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Record:
    """A job under way."""

    __slots__ = ("arrays", "job", "left", "lock", "parts", "places", "step")

    def __init__(self, job: Job, places: list[Location | None], count: int, step: int) -> None:
        self.job = job
        self.places = places
        self.step = step  # elements in a block
        self.arrays = [
            None if place is not None else SharedArray(functools.partial(source.numpy, info.name), count)
            for (source, info), place in zip(job.operands, places, strict=True)
        ]
        self.parts: list[Any] = [None] * count
        self.left = count
        self.lock = threading.Lock()


class _Piece:
    """Elements `[start, stop)` of a job: one of its parts."""

    __slots__ = ("ahead", "number", "record", "start", "stop")

    def __init__(self, record: _Record, number: int, start: int, stop: int) -> None:
        self.record, self.number, self.start, self.stop = record, number, start, stop
        # Where in its file the reading of each operand may go on to, for the pieces that follow.
        self.ahead = [0 if place is None else place.stop for place in record.places]


def _run_together(batch: list[_Piece]) -> list[_Piece]:
    """Lets tensors that lie one behind the other in a file be read at once."""
    for piece, following in zip(reversed(batch[:-1]), reversed(batch[1:]), strict=True):
        for i, here in enumerate(piece.record.places):
            there = following.record.places[i] if i < len(following.record.places) else None
            if here and there and here.file == there.file and 0 <= there.start - here.stop <= _GAP:
                piece.ahead[i] = following.ahead[i]
    return batch


class _Shared:
    """An iterator that several threads may draw from."""

    def __init__(self, items: Iterator[list[_Piece]]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> list[_Piece]:
        with self._lock:
            return next(self._items)


class _Worker:
    """What one thread does: takes pieces, folds their blocks, gives the results of jobs that it completes."""

    def __init__(
        self,
        items: Iterator[list[_Piece]],
        stop: threading.Event,
        begin: Callable[[Job], Fold[Any]],
        combine: Callable[[Job, Sequence[Any]], Any],
        reader: Callable[[], Reader],
    ) -> None:
        self._items, self._stop = items, stop
        self._begin, self._combine = begin, combine
        self._reader = reader
        self._readers: list[Reader] = []
        self.nbytes = 0  # read so far; only this thread writes it
        self.tick: Callable[[int], None] | None = None

    def results(self) -> Iterator[tuple[Job, Any]]:
        """The jobs that this worker read the last part of."""
        for item in self._items:
            for piece in item:
                record = piece.record
                part = self._fold(piece)
                if self._stop.is_set():
                    return
                with record.lock:
                    record.parts[piece.number] = part
                    record.left -= 1
                    complete = not record.left
                if complete:
                    yield record.job, self._combine(record.job, record.parts)

    def _fold(self, piece: _Piece) -> Any:
        record = piece.record
        fold = self._begin(record.job)
        for start in range(piece.start, piece.stop, record.step):
            if self._stop.is_set():
                return None
            stop = min(start + record.step, piece.stop)
            fold.update(*[self._block(piece, i, start, stop) for i in range(len(record.places))])
            if stop - start == record.job.numel:
                self.nbytes += record.job.nbytes
            else:
                operands = record.job.operands
                self.nbytes += sum(info.dtype.nbytes(stop) - info.dtype.nbytes(start) for _, info in operands)
            if self.tick is not None:
                self.tick(self.nbytes)
        for array in record.arrays:
            if array is not None:
                array.done()
        return fold.finish()

    def _block(self, piece: _Piece, i: int, start: int, stop: int) -> Block:
        while i >= len(self._readers):
            self._readers.append(self._reader())
        record = piece.record
        info, place, array = record.job.operands[i][1], record.places[i], record.arrays[i]
        if place is not None:
            return self._readers[i].span(info, place, start, stop, piece.ahead[i])
        assert array is not None
        return self._readers[i].array(info, array.get(), start, stop)

    def close(self) -> None:
        """Close its files."""
        for reader in self._readers:
            reader.close()


class _Ticker:
    """Passes on how far it is, but not more often than a person can read."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._due = time.monotonic() + _TICK

    def __call__(self, done: int) -> None:
        if self._progress is not None and (now := time.monotonic()) >= self._due:
            self._progress(done, self._total)
            self._due = now + _TICK


def _on_threads(
    workers: list[_Worker], stop: threading.Event, total: int, progress: Progress | None
) -> Iterator[tuple[Job, Any]]:
    """The results of workers on a thread each."""
    # Bounded, so that results do not pile up before a slow consumer.
    found: queue.Queue[tuple[Job, Any] | BaseException | None] = queue.Queue(64)

    def put(what: tuple[Job, Any] | BaseException | None) -> None:
        while True:
            try:
                return found.put(what, timeout=_TICK)
            except queue.Full:
                if stop.is_set():
                    return None

    def work(worker: _Worker) -> None:
        try:
            for result in worker.results():
                put(result)
        except BaseException as error:  # raised anew in the caller's thread, whatever it is
            put(error)
        finally:
            worker.close()
            put(None)

    threads = [
        threading.Thread(target=work, args=(worker,), name=f"torchparams-{i}", daemon=True)
        for i, worker in enumerate(workers)
    ]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        tick = _Ticker(progress, total)
        while running:
            try:
                what = found.get(timeout=_TICK)
            except queue.Empty:
                pass
            else:
                if isinstance(what, BaseException):
                    raise what
                if what is None:
                    running -= 1
                else:
                    yield what
            tick(sum(worker.nbytes for worker in workers))
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()
