"""Engine that runs on threads of this process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

from torchparams.engines._together import GAP, Together
from torchparams.engines.base import Done, Engine, Job, Task, Unread, stored_bits
from torchparams.errors import LimitExceeded, NotReadable
from torchparams.expressions.base import Stored
from torchparams.io.files import Files
from torchparams.io.paths import is_url
from torchparams.io.reader import MappingReader, Reader, SharedArray
from torchparams.io.threads import Shared, Ticker, processors, results_of
from torchparams.render.tree import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np

    from torchparams.engines.base import Fold, Progress
    from torchparams.expressions.base import Expression
    from torchparams.expressions.casts import Losses
    from torchparams.expressions.work import ThreadWork
    from torchparams.info import Location
    from torchparams.io.blocks import Block

    Array = np.ndarray[Any, Any]

Part = TypeVar("Part")
Result = TypeVar("Result")

BLOCK_BYTES = 1 << 20
"""Bytes per read of a thread: small enough to stay in the L2 cache."""

_ARRAY_BLOCKS = 4  # blocks per step without reading, so that threads pass the GIL less often
_MAPPED_BLOCKS = 8  # blocks per mapping, because the cost of mapping and unmapping does not depend on the length

PART_BYTES = 1 << 25
"""Bytes of the parts of a large tensor, each with its own fold."""

MEMORY = 256 << 20
"""Default memory limit for computed rows, in bytes."""

_BATCH = 256  # small tensors that a thread takes at once
_SHARED = 1 << 22  # bytes of small tensors below which starting threads does not pay
_WORTHWHILE = 1 << 14  # bytes of a tensor below which its work is mostly Python code, serialised by the GIL


class ThreadEngine(Engine):
    """Reads files block by block on threads, one per processor by default; large tensors are split between threads.

    Memory does not grow with the file: each thread has one buffer, and nothing is mapped. Tensors that are not
    contiguous in a file come from `Source.numpy`, as a whole if the source cannot give a view. Computed rows use blocks
    that fit the memory limit.

    With `mapped`, file bytes are not copied, which saves up to a third of the time of counting and comparing. Blocks
    are 8 times as long, and are unmapped after use. A failing disk still raises an error: Linux (5.14 or newer) loads
    all pages of a block before one is touched. The disadvantage: if another program truncates the file during the scan,
    the system may kill the process (SIGBUS) before an error can be raised.

    Args:
        threads: Number of threads; None for the number of available processors.
        block_bytes: Bytes per read.
        part_bytes: Bytes of the parts of large tensors.
        mapped: Memory-map files block by block instead of reading them.
        memory: Memory limit for computed rows in all threads together, in bytes.

    >>> import numpy as np
    >>> from torchparams.engines import Folding, jobs_of
    >>> from torchparams.testing import MemorySource
    >>> class Bytes:
    ...     def __init__(self): self.seen = 0
    ...     def update(self, block): self.seen += len(block.buffer)
    ...     def finish(self): return self.seen
    >>> jobs = jobs_of(MemorySource({"w": np.ones((2, 3), np.float32)}))
    >>> ThreadEngine().map(jobs, Folding(lambda job: Bytes(), lambda job, parts: sum(parts)))
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
        memory: int = MEMORY,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"the number of threads must be at least 1, not {threads}")
        self.threads = threads or processors()
        self.block_bytes = block_bytes
        self.part_bytes = max(part_bytes, block_bytes)
        self.mapped = mapped
        self.memory = memory

    def run(
        self, jobs: Iterable[Job], task: Task[Part, Result], *, progress: Progress | None = None
    ) -> Iterator[Done[Result]]:
        """See `Engine.run`. With one thread, or only small tensors, everything runs in the caller's thread."""
        listed = list(jobs)
        total = sum(job.nbytes for job in listed)
        sources = {id(leaf.source): leaf.source for job in listed for row in job.rows for leaf in row.leaves()}
        for source in sources.values():
            source.check_unchanged()
        run = _Run(self, task, listed, total)
        if any(is_url(path) for source in sources.values() for path in source.files):
            leaves = (leaf for job in listed for row in job.rows for leaf in row.leaves())
            run.files.expect(leaf.place for leaf in leaves if leaf.place is not None)
        tick = Ticker(progress, total)
        if self.threads == 1 or total <= max(
            self.block_bytes if run.takes is None else _SHARED, _WORTHWHILE * run.small.count(False)
        ):
            alone = _Worker(run, tick)
            workers = [alone]
        else:
            workers = [_Worker(run, None) for _ in range(self.threads)]
        done = results_of(
            [worker.results() for worker in workers],
            run.stop,
            lambda: tick(sum(worker.nbytes for worker in workers)),
        )
        try:
            for some in done:
                yield from some
        finally:
            done.close()  # also if the caller leaves early: the threads end now
        run.files.check()
        if progress is not None:
            progress(total, total)


class _Run:
    """State that the threads of a run share."""

    def __init__(self, engine: ThreadEngine, task: Task[Any, Any], jobs: list[Job], total: int) -> None:
        self.engine, self.task, self.total = engine, task, total
        self.stop = threading.Event()
        self.files = Files(self.stop.is_set)
        self.heavy = threading.Lock()  # held for a row that keeps much memory: one at a time
        self.most = engine.memory // engine.threads // 2  # bytes for the blocks of a computed row
        # Predicate for jobs that the task supports in batches, if any.
        self.takes = None if type(task).takes is Task.takes else task.takes
        self.small = [False] * len(jobs) if self.takes is None else list(map(self._is_small, jobs))
        self.items = Shared(self._items(jobs))

    def _is_small(self, job: Job) -> bool:
        """Whether a job can be batched: the task supports it, and its row is in a file or in live memory."""
        row = job.rows[0]
        if len(job.rows) != 1 or self.takes is None or not self.takes(job):
            return False
        return row.place is not None or (type(row) is Stored and row.source.live)

    def reader(self) -> Reader:
        if self.engine.mapped:
            return MappingReader(self.files, self.engine.block_bytes * _MAPPED_BLOCKS)
        return Reader(self.files, self.engine.block_bytes)

    def _items(self, jobs: list[Job]) -> Iterator[list[_Piece] | Together]:
        """Items of work for a thread: a part of a large job, or many small jobs."""
        engine = self.engine
        places = [(job.rows[0].place,) if len(job.rows) == 1 else tuple(row.place for row in job.rows) for job in jobs]
        order = list(range(len(jobs)))
        if all(place is not None for row in places for place in row):
            # In file order, for the benefit of disks.
            order.sort(key=lambda i: [(place.file, place.start) for place in places[i] if place is not None])
        if self.task.order == "stream":
            # Large tensors that cannot be split come first: at the end, one would keep a single thread busy.
            order.sort(key=lambda i: jobs[i].nbytes * 4 * engine.threads < self.total)
        batch: list[_Piece] = []
        together = Together(engine.block_bytes)
        size = 0
        for i in order:
            job = jobs[i]
            if self.small[i]:
                if not together.add(job, places[i][0]):
                    yield together
                    together = Together(engine.block_bytes)
                    together.add(job, places[i][0])
                continue
            record, whole = self._record(job, places[i])
            if len(record.parts) == 1 and job.nbytes <= engine.block_bytes // 4:
                batch.append(_Piece(record, 0, 0, job.numel))
                size += job.nbytes
                if size >= engine.block_bytes or len(batch) == _BATCH:
                    yield _run_together(batch)
                    batch, size = [], 0
                continue
            last = len(record.parts) - 1
            for part in range(last + 1):
                yield [_Piece(record, part, part * whole, job.numel if part == last else (part + 1) * whole)]
        if batch:
            yield _run_together(batch)
        if together.jobs:
            yield together

    def piece(self, job: Job) -> _Piece:
        """Small job as a single piece."""
        return _Piece(self._record(job, (job.rows[0].place,))[0], 0, 0, job.numel)

    def _record(self, job: Job, places: tuple[Location | None, ...]) -> tuple[_Running, int]:
        """Record of a job, and the number of elements in each of its parts.

        Cuts do not depend on the number of threads, and are at whole bytes and groups of packed elements.
        """
        engine = self.engine
        bits = [stored_bits(row.dtype, place is not None) for row, place in zip(job.rows, places, strict=True)]
        blocks = _ARRAY_BLOCKS if not any(places) else _MAPPED_BLOCKS if engine.mapped and all(places) else 1
        step = max(engine.block_bytes * blocks * 8 // max(bits) // 64 * 64, 64)
        computed = tuple(place is None and not _is_array(row) for row, place in zip(job.rows, places, strict=True))
        heavy = 0
        if any(computed):
            from torchparams.expressions.work import block_of

            for row, is_computed in zip(job.rows, computed, strict=True):
                if is_computed:
                    step = min(step, block_of(row, most=self.most))
                    heavy += sum(part.resident for part in row.walk())
            step = max(step // 64 * 64, 64)
        whole = max(engine.part_bytes * 8 // max(bits) // step, 1) * step
        count = 1 if self.task.order == "stream" or heavy else max(-(-job.numel // whole), 1)
        return _Running(job, places, computed, count, step, heavy), whole


def _is_array(row: Expression) -> bool:
    """Whether a row without a file range is read from an array of its source."""
    return type(row) is Stored and row.dtype.numpy_name is not None


def _array_of(row: Stored) -> Callable[[], Array]:
    return lambda: row.source.numpy(row.info.name)


class _Running:
    """State of a running job."""

    __slots__ = (
        *("arrays", "computed", "heavy", "job", "leaves", "left", "lock", "lost", "parts", "places", "prepared"),
        *("preparing", "step"),
    )

    def __init__(
        self,
        job: Job,
        places: tuple[Location | None, ...],
        computed: tuple[bool, ...],
        count: int,
        step: int,
        heavy: int,
    ) -> None:
        self.job = job
        self.places = places
        self.computed = computed
        self.step = step  # elements per block
        self.heavy = heavy  # bytes that its rows keep in memory during the computation
        self.parts: list[Any] = [None] * count
        self.left = count
        self.lock = threading.Lock()
        self.lost: Losses | None = None
        self.arrays = [
            SharedArray(_array_of(row)) if place is None and not is_computed and isinstance(row, Stored) else None
            for row, place, is_computed in zip(job.rows, places, computed, strict=True)
        ]
        if any(computed):
            self.preparing = threading.Lock()
            self.prepared: list[Any] = [None] * len(computed)
            self.leaves: dict[int, SharedArray] = {}

    def array_of(self, leaf: Stored) -> Any:
        """Array of a stored tensor inside a computed row, shared by all parts of the job."""
        with self.lock:
            shared = self.leaves.get(id(leaf))
            if shared is None:
                shared = self.leaves[id(leaf)] = SharedArray(_array_of(leaf))
        return shared.get()

    def release(self) -> None:
        """Release the arrays after all parts are read."""
        self.arrays = [None] * len(self.arrays)
        if any(self.computed):
            self.leaves.clear()
            self.prepared.clear()


class _Piece:
    """Elements `[start, stop)` of a job: one of its parts."""

    __slots__ = ("ahead", "number", "record", "start", "stop")

    def __init__(self, record: _Running, number: int, start: int, stop: int) -> None:
        self.record, self.number, self.start, self.stop = record, number, start, stop
        # For each row: the offset up to which a read may continue, for the following pieces.
        self.ahead = [0 if place is None else place.stop for place in record.places]


def _run_together(batch: list[_Piece]) -> list[_Piece]:
    """Let tensors that are adjacent in a file be read together."""
    for piece, following in zip(reversed(batch[:-1]), reversed(batch[1:]), strict=True):
        for i, here in enumerate(piece.record.places):
            there = following.record.places[i] if i < len(following.record.places) else None
            if here and there and here.file == there.file and 0 <= there.start - here.stop <= GAP:
                piece.ahead[i] = following.ahead[i]
    return batch


class _Worker:
    """Worker of one thread: takes pieces, folds their blocks, and yields the results of jobs that it completes.

    Args:
        run: The run.
        tick: Callback with the bytes done after each block; None if the caller reads `nbytes` itself.
    """

    def __init__(self, run: _Run, tick: Callable[[int], None] | None) -> None:
        self._run = run
        self._tick = tick
        self._readers: list[Reader] = []
        self._works: list[ThreadWork] = []  # one per computed row, as for readers
        self.nbytes = 0  # bytes read so far; written by this thread only

    def results(self) -> Iterator[Sequence[Done[Any]]]:
        """Jobs whose last part this worker read, in batches."""
        run = self._run
        try:
            for item in run.items:
                pieces: Iterable[_Piece]
                if isinstance(item, Together):
                    done, left = self._together(item)
                    if run.stop.is_set():
                        return
                    yield done
                    pieces = map(run.piece, left)
                else:
                    pieces = item
                for piece in pieces:
                    record = piece.record
                    try:
                        part = self._fold(piece)
                    except (NotReadable, LimitExceeded) as error:
                        part = _unread(record.job, error)
                    if run.stop.is_set():
                        return
                    with record.lock:
                        record.parts[piece.number] = part
                        record.left -= 1
                        complete = not record.left
                    if complete:
                        yield (self._complete(record),)
        finally:
            self._close()

    def _together(self, item: Together) -> tuple[list[Done[Any]], list[Job]]:
        """Results of a batch, and jobs that could not be batched."""
        run = self._run
        jobs = item.jobs
        left: list[Job] = []
        if item.file is None:
            jobs, starts, keep, left = item.in_memory()
            results = run.task.many(jobs, None, starts) if jobs else ()
            del keep  # up to here, the memory must stay alive
        else:
            if not self._readers:
                self._readers.append(run.reader())
            buffer = self._readers[0].bytes_of(item.file, item.start, item.stop)
            if len(buffer) < item.stop - item.start:  # too short: the call raises an error
                for job, place in zip(jobs, item.places, strict=True):
                    self._readers[0].span(job.rows[0], place, 0, job.numel, 0)
            results = run.task.many(jobs, buffer, [place.start - item.start for place in item.places])
        self.nbytes += sum(job.nbytes for job in jobs)
        if self._tick is not None:
            self._tick(self.nbytes)
        return [Done(job, result) for job, result in zip(jobs, results, strict=True)], left

    def _complete(self, record: _Running) -> Done[Any]:
        record.release()
        unread = next((part for part in record.parts if type(part) is Unread), None)
        if unread is None:
            return Done(record.job, self._run.task.combine(record.job, record.parts), record.lost)
        return Done(record.job, unread)

    def _fold(self, piece: _Piece) -> Any:
        record, run = piece.record, self._run
        fold = run.task.begin(record.job)
        if not any(record.computed):
            return self._blocks(piece, fold)
        if record.heavy:
            if record.heavy > run.engine.memory:
                raise LimitExceeded(
                    f"{record.job.key!r} needs {human_bytes(record.heavy)} of memory; "
                    f"the limit is {human_bytes(run.engine.memory)}",
                    hint="raise the limit: engine=ThreadEngine(memory=…)",
                )
            with run.heavy:
                return self._computed_blocks(piece, fold)
        return self._computed_blocks(piece, fold)

    def _blocks(self, piece: _Piece, fold: Fold[Any]) -> Any:
        record, stopped = piece.record, self._run.stop.is_set
        for start in range(piece.start, piece.stop, record.step):
            if stopped():
                return None
            stop = min(start + record.step, piece.stop)
            fold.update(*[self._block(piece, i, start, stop) for i in range(len(record.places))])
            if stop - start == record.job.numel:
                self.nbytes += record.job.nbytes
            else:
                self.nbytes += sum(row.dtype.nbytes(stop) - row.dtype.nbytes(start) for row in record.job.rows)
            if self._tick is not None:
                self._tick(self.nbytes)
        return fold.finish()

    def _computed_blocks(self, piece: _Piece, fold: Fold[Any]) -> Any:
        record = piece.record
        self._prepare(record)
        try:
            return self._blocks(piece, fold)
        finally:
            for work, is_computed in zip(self._works, record.computed, strict=False):
                if is_computed:
                    lost = work.take_losses()
                    if lost:
                        with record.lock:
                            record.lost = lost if record.lost is None else record.lost + lost

    def _prepare(self, record: _Running) -> None:
        from torchparams.expressions.work import ThreadWork

        while len(self._works) < len(record.job.rows):
            self._works.append(ThreadWork(self._run.files))
        for i, row in enumerate(record.job.rows):
            if not record.computed[i]:
                continue
            work = self._works[i]
            if row.is_prepared:
                with record.preparing:  # the first thread does it for all parts
                    if record.prepared[i] is None:
                        work.begin(row, record.step, array_of=record.array_of)
                        record.prepared[i] = work.state
                        continue
            work.begin(row, record.step, prepared=record.prepared[i] or {}, array_of=record.array_of)

    def _block(self, piece: _Piece, i: int, start: int, stop: int) -> Block:
        record = piece.record
        row, place, array = record.job.rows[i], record.places[i], record.arrays[i]
        if record.computed[i]:
            from torchparams.expressions.work import computed_block

            return computed_block(row, start, stop, self._works[i])
        while i >= len(self._readers):
            self._readers.append(self._run.reader())
        if place is not None:
            return self._readers[i].span(row, place, start, stop, piece.ahead[i])
        assert array is not None
        return self._readers[i].array(row.dtype, array.get(), start, stop)

    def _close(self) -> None:
        """Close the files of this worker."""
        for reader in self._readers:
            reader.close()
        for work in self._works:
            work.close()


def _unread(job: Job, error: NotReadable | LimitExceeded) -> Unread:
    """Unread row for an error; for a computed row, the reason names the tensor and its file."""
    if all(type(row) is Stored for row in job.rows):
        return Unread.because(job.key, error)
    return Unread(job.key, str(error), error)
