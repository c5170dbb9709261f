"""Run a plan: the kernel copies unchanged bytes from file to file; other values are computed in blocks."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from zlib import crc32

from torchparams.edit.plan.written import CastLosses, Written
from torchparams.edit.write._read_back import read_back
from torchparams.edit.write.directory import Directory
from torchparams.errors import PlanError, TorchParamsError, TruncatedFile, shorten
from torchparams.info import Location
from torchparams.io import system as _system
from torchparams.io.files import OpenFiles, read_into, unreadable
from torchparams.io.paths import is_url
from torchparams.io.threads import Ticker, results_of
from torchparams.io.write import OneFile, replace_file, telling, write_error
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torchparams.edit.plan.layout import FileLayout, Output, Writable
    from torchparams.engines.base import Progress
    from torchparams.expressions.base import Readable
    from torchparams.expressions.casts import Losses
    from torchparams.expressions.work import ThreadWork
    from torchparams.io.write import Target

PIECE = 1 << 25
"""Bytes that a thread handles at once, before asking the disk to start writing them."""

INLINE = 1 << 22
"""Maximum computed bytes for a plan to run in the caller's thread."""

_MOST_THREADS = 4

_BUFFER = 1 << 20


class Contents(Protocol):
    """Files to write, and tensors to write to them: a plan, or a share of one."""

    @property
    def outputs(self) -> tuple[Output, ...]: ...  # noqa: D102  # see `Plan`
    @property
    def files(self) -> tuple[FileLayout, ...]: ...  # noqa: D102
    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def memory(self) -> int: ...  # noqa: D102
    @property
    def allow_overflow(self) -> bool: ...  # noqa: D102
    @property
    def sources(self) -> tuple[Readable, ...]: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102


Writer = Callable[[Contents, "Target", int, "Progress | None"], "Mapping[int, Losses]"]


def execute(plan: Writable, progress: Progress | None = None, write: Writer | None = None) -> Written:
    """Write a plan; see `Plan.run`.

    Args:
        plan: The plan.
        progress: Callback with the bytes written so far and in total.
        write: Writes the files, as `write_files` does; that by default.
    """
    from torchparams.io.threads import processors

    begun = time.perf_counter()
    plan.check()
    # Copies are bound by kernel and disk: two copies to one file wait for each other.
    computed = plan.nbytes - (0 if any(file.crc for file in plan.files) else plan.copied)
    threads = 1 if computed <= INLINE else min(max(processors(), 1), _MOST_THREADS)
    with telling(plan.path), (Directory if plan.is_directory else OneFile)(plan.path) as target:
        lost = (write or write_files)(plan, target, threads, progress)
        casts = _casts(plan, lost)
        _refuse_overflow(plan, casts)
        plan.check_sources()
        read_back(plan, target)
        target.commit(plan.index)
        if plan.config_json is not None:
            beside = os.path.join(plan.path, "config.json")
            if plan.overwrite or not os.path.lexists(beside):
                replace_file(beside, plan.config_json.encode())
    if progress is not None:
        progress(plan.nbytes, plan.nbytes)
    for source in plan.sources:
        source.close()
    return Written(
        plan.path,
        tuple((file.name, file.size) for file in plan.files),
        len(plan.outputs) + len(plan.views),
        plan.file_bytes,
        plan.copied,
        time.perf_counter() - begun,
        casts,
        plan.dropped,
        (*plan.notes, *target.notes),
    )


def write_files(plan: Contents, target: Target, threads: int, progress: Progress | None) -> Mapping[int, Losses]:
    """Write all files to a target, which the caller commits or discards.

    Returns:
        Losses of casts, by the id of the expression.
    """
    run = _Run(plan, target, threads)
    run.all(progress)
    return run.losses()


def _casts(plan: Writable, lost: Mapping[int, Losses]) -> tuple[CastLosses, ...]:
    from torchparams.expressions.casts import Losses

    return tuple(
        CastLosses(output.name, x.operands[0].dtype, x.dtype, x.numel, lost.get(id(x), Losses()))
        for output, x in plan.casts()
    )


def _refuse_overflow(plan: Writable, casts: tuple[CastLosses, ...]) -> None:
    over = [cast for cast in casts if cast.losses.overflow]
    if over and not plan.allow_overflow:
        worst = max(over, key=lambda cast: cast.losses.overflow)
        more = f", also in {plural(len(over) - 1, 'other tensor')}" if len(over) > 1 else ""
        verb = "is" if worst.losses.overflow == 1 else "are"
        raise PlanError(
            f"{plural(worst.losses.overflow, 'value')} of {worst.name!r} {verb} too large for {worst.new}{more}",
            where=plan.path,
            exists="nothing was written",
            hint="choose a wider dtype, or pass allow_overflow=True (--allow-overflow)",
        )


def _refuse_sums(output: Output, work: ThreadWork) -> None:
    """Raise early if a combination of finite values becomes infinite, because computing the rest may take long."""
    from torchparams.expressions.combination import Combination

    for x in output.expression.walk() if work.losses else ():
        over = work.losses[id(x)].overflow if isinstance(x, Combination) and id(x) in work.losses else 0
        if over:
            raise PlanError(
                f"at least {plural(over, 'value')} {'is' if over == 1 else 'are'} too large for {x.dtype}",
                where=shorten(output.name),
                exists="nothing was written",
                hint="choose a wider dtype, or pass allow_overflow=True (--allow-overflow)",
            )


# --- tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Copy:
    """Bytes to copy from file to file."""

    file: int
    path: str
    start: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class _Compute:
    """Elements `[start, stop)` of an output to compute, or to checksum."""

    file: int
    output: Output
    offset: int
    start: int
    stop: int


_Task = _Copy | _Compute


def _tasks(number: int, file: FileLayout, outputs: list[Output], most: int) -> Iterator[_Task]:
    """Tasks that fill a file, in byte order."""
    run: _Copy | None = None
    for output in sorted(outputs, key=lambda output: file.offsets[output.name]):
        offset, x = file.offsets[output.name], output.expression
        spans = None if file.crc else x.spans()
        if spans is None:
            yield from _parts(number, output, offset, most, whole=file.crc)
            continue
        for span in spans:
            count = span.stop - span.start
            if not count:
                continue
            # Tensors that are adjacent in both files form one run of bytes.
            follows = run is not None and run.path == span.file and run.start + run.count == span.start
            if run is not None and follows and run.offset + run.count == offset:
                run = _Copy(number, run.path, run.start, run.offset, run.count + count)
            else:
                yield from _pieces(run)
                run = _Copy(number, span.file, span.start, offset, count)
            offset += count
    yield from _pieces(run)


def _pieces(run: _Copy | None) -> Iterator[_Copy]:
    if run is not None:
        for at in range(0, run.count, PIECE):
            yield _Copy(run.file, run.path, run.start + at, run.offset + at, min(PIECE, run.count - at))


def _parts(number: int, output: Output, offset: int, most: int, whole: bool) -> Iterator[_Compute]:
    from torchparams.expressions.work import block_of

    x = output.expression
    if whole or x.is_prepared or any(part.resident for part in x.walk()):
        yield _Compute(number, output, offset, 0, x.numel)
        return
    block = block_of(x, most=most)
    step = max(PIECE * 8 // x.dtype.bits // block, 1) * block
    for start in range(0, x.numel, step):
        stop = min(start + step, x.numel)
        yield _Compute(number, output, offset + x.dtype.nbytes(start), start, stop)


def _places(tasks: Iterable[_Task]) -> Iterator[Location]:
    """What tasks read of files."""
    for task in tasks:
        if isinstance(task, _Copy):
            yield Location(task.path, task.start, task.start + task.count)
        else:
            yield from (leaf.place for leaf in task.output.expression.leaves() if leaf.place is not None)


class _Run:
    """State of a running plan.

    Args:
        plan: The plan.
        target: Target of the files.
        threads: Number of worker threads.
    """

    def __init__(self, plan: Contents, target: Target, threads: int) -> None:
        from torchparams.io.files import Files

        self.plan, self.target = plan, target
        self.most = plan.memory // threads
        self.stop = threading.Event()
        self.sources = Files(self.stop.is_set)
        self.lock = threading.Lock()
        self.heavy = threading.Lock()  # held for a tensor that is in memory as a whole: one at a time
        self.crcs: dict[str, int] = {}
        by_name = {output.name: output for output in plan.outputs}
        self.files = plan.files
        self._fds: dict[int, int] = {}
        self._left = []
        self._queue: deque[_Task] = deque()
        for number, file in enumerate(plan.files):
            tasks = list(_tasks(number, file, [by_name[name] for name in file.offsets], self.most))
            self._left.append(len(tasks))
            self._queue.extend(tasks)
        if any(is_url(path) for source in plan.sources for path in source.files):
            self.sources.expect(_places(self._queue))
        self.workers = [_Worker(self) for _ in range(threads)]
        self._works: list[ThreadWork] = []
        self._heavy_work: ThreadWork | None = None

    def all(self, progress: Progress | None) -> None:
        """Run all tasks, and finish the files."""
        for number, left in enumerate(self._left):
            if not left:  # a header without tensors
                self.descriptor(number)
                self._finish(number)
        tick = Ticker(progress, self.plan.nbytes)
        try:
            for _ in results_of(
                [worker.tasks() for worker in self.workers],
                self.stop,
                lambda: tick(sum(worker.nbytes for worker in self.workers)),
            ):
                pass
        finally:
            for work in self._works:
                work.close()
        self.sources.check()

    def losses(self) -> dict[int, Losses]:
        """Losses of casts in all threads."""
        found: dict[int, Losses] = {}
        for work in self._works:
            for key, lost in work.losses.items():
                found[key] = found[key] + lost if key in found else lost
        return found

    def new_work(self) -> ThreadWork:
        """Create the work state of one thread."""
        from torchparams.expressions.work import ThreadWork

        work = ThreadWork(self.sources, strict=True)
        self._works.append(work)
        return work

    def heavy_work(self) -> ThreadWork:
        """Work state for the holder of `heavy`."""
        if self._heavy_work is None:
            self._heavy_work = self.new_work()
        return self._heavy_work

    def next(self) -> _Task | None:
        """Next task, or None."""
        with self.lock:
            return None if self.stop.is_set() or not self._queue else self._queue.popleft()

    def descriptor(self, number: int) -> int:
        """Descriptor of a file, created at first use."""
        with self.lock:
            if number not in self._fds:
                file = self.files[number]
                self._fds[number] = self.target.create(file.name, file.size)
            return self._fds[number]

    def done(self, task: _Task) -> None:
        """Mark a task as done, and finish its file after its last task."""
        with self.lock:
            self._left[task.file] -= 1
            complete = not self._left[task.file]
        if complete:
            self._finish(task.file)

    def _finish(self, number: int) -> None:
        file, fd = self.files[number], self._fds[number]
        for offset, data in file.fixed(self.crcs):
            _system.write(fd, data, offset)
        self.target.finish(file.name)


class _Worker:
    """Worker of one thread."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._files = OpenFiles(run.sources)
        self._buffer: memoryview | None = None
        self.work: ThreadWork | None = None  # created for the first computation: copies need no NumPy
        self.nbytes = 0

    def tasks(self) -> Iterator[None]:
        """Take and run tasks; yields after each."""
        run = self._run
        try:
            while (task := run.next()) is not None:
                fd = run.descriptor(task.file)
                if isinstance(task, _Copy):
                    self._copy(task, fd)
                elif run.files[task.file].crc and (spans := task.output.expression.spans()) is not None:
                    crc, offset = 0, task.offset
                    for span in spans:
                        crc = self._copy_counting(span.file, span.start, fd, offset, span.stop - span.start, crc)
                        offset += span.stop - span.start
                    run.crcs[task.output.name] = crc
                else:
                    self._compute(task, fd)
                if run.stop.is_set():
                    return
                run.done(task)
                yield
        finally:
            self._files.close()

    def _copy(self, task: _Copy, fd: int) -> None:
        if is_url(task.path):  # the kernel does not copy what it does not hold
            self._copy_counting(task.path, task.start, fd, task.offset, task.count, 0)
            return
        source, at = self._files.get(task.path).fileno(), 0
        while at < task.count and not self._run.stop.is_set():
            try:
                got = _system.copy(source, task.start + at, fd, task.offset + at, task.count - at)
            except OSError as error:
                raise self._blame(error, task.path, source, task.start + at) from error
            if not got:
                raise _ended(task.path, task.start + at)
            at += got
            self.nbytes += got
        _begin_writeback(fd, task.offset, task.count)

    def _copy_counting(self, path: str, start: int, fd: int, offset: int, count: int, crc: int) -> int:
        """Copy bytes, and update a CRC-32."""
        source, at = self._files.get(path), 0
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BUFFER))
        while at < count and not self._run.stop.is_set():
            piece = self._buffer[: min(_BUFFER, count - at)]
            got = read_into(source, [piece], start + at, path)
            if not got:
                raise _ended(path, start + at)
            crc = crc32(piece[:got], crc)
            _system.write(fd, piece[:got], offset + at)
            at += got
            self.nbytes += got
            if at % PIECE == 0 or at == count:
                first = (at - 1) // PIECE * PIECE
                _begin_writeback(fd, offset + first, at - first)
        return crc

    def _blame(self, error: OSError, path: str, source: int, at: int) -> Exception:
        """Find out which file failed: a copy inside the kernel does not tell source from target."""
        try:
            _system.read(source, 1, at)
        except OSError as reading:
            return unreadable(reading, path)
        return error

    def _compute(self, task: _Compute, fd: int) -> None:
        run = self._run
        if any(part.resident for part in task.output.expression.walk()):
            # A tensor that must be in memory as a whole is loaded once: one reader for all threads, one tensor at a
            # time.
            with run.heavy:
                self._blocks(task, fd, run.heavy_work())
            return
        if self.work is None:
            self.work = run.new_work()
        self._blocks(task, fd, self.work)

    def _blocks(self, task: _Compute, fd: int, work: ThreadWork) -> None:
        from torchparams.expressions.work import as_bytes, block_of

        run, x, offset = self._run, task.output.expression, task.offset
        crc, wanted = 0, run.files[task.file].crc
        block = block_of(x, most=run.most)
        try:
            work.begin(x, block)
            for start in range(task.start, task.stop, block):
                if run.stop.is_set():
                    return
                data = as_bytes(x.compute(start, min(start + block, task.stop), work), x)
                if not run.plan.allow_overflow:
                    _refuse_sums(task.output, work)
                if wanted:
                    crc = crc32(data, crc)
                try:
                    _system.write(fd, data, offset)
                except OSError as error:
                    raise write_error(error, run.plan.path) from error
                offset += len(data)
                self.nbytes += len(data)
        except OSError as error:
            if isinstance(error, TorchParamsError):
                raise
            raise unreadable(error, ", ".join(sorted({leaf.source.label for leaf in x.leaves()}))) from error
        if wanted:
            run.crcs[task.output.name] = crc
        _begin_writeback(fd, task.offset, offset - task.offset)


def _begin_writeback(fd: int, offset: int, count: int) -> None:
    if count >= _BUFFER:  # smaller pieces are not worth a system call
        _system.begin_writeback(fd, offset, count)


def _ended(path: str, at: int) -> TruncatedFile:
    return TruncatedFile(f"the file ends at byte {at}; it was longer when it was listed", where=path)
