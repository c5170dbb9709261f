"""Contract of engines, as tests."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from torchparams.engines import Block, Engine, Folding, Job, Task, Unread, jobs_of, sketches
from torchparams.errors import NotReadable, SourceError, TruncatedFile
from torchparams.parameters import of
from torchparams.sketch import Sketch
from torchparams.sources.opening import open_source
from torchparams.testing._reference import (
    NUMPY_DTYPES,
    SAFETENSORS_DTYPES,
    Array,
    MemorySource,
    assert_identical,
    safetensors_bytes,
    sample,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torchparams.sources.base import Source

LARGE = 3 << 20  # bytes of a tensor that every engine reads in several blocks


class Seen(NamedTuple):
    """Block as seen by a `Recorder`."""

    start: int
    stop: int
    values: Array


class Recorder:
    """Fold that records its blocks, and calls `each` for every one."""

    def __init__(self, each: Callable[[], object] = lambda: None) -> None:
        self.seen: list[tuple[Seen, ...]] = []
        self._each = each

    def update(self, *blocks: Block) -> None:
        self._each()
        for block in blocks:
            assert block.data.dtype == np.uint8 and block.data.ndim == 1 and block.data.flags.c_contiguous
            assert block.numel == block.stop - block.start
            bits = block.dtype.bits if block.packed else max(block.dtype.bits, 8)
            assert len(block.data) == -(-block.numel * bits // 8)
        self.seen.append(tuple(Seen(block.start, block.stop, block.values().copy()) for block in blocks))

    def finish(self) -> list[tuple[Seen, ...]]:
        return self.seen


def keep(job: Job, parts: Sequence[Any]) -> list[Any]:
    """Combine parts by listing them."""
    return list(parts)


class Slow(MemorySource):
    """Source that counts how often each array is requested."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        super().__init__(tensors)
        self.asked: list[str] = []

    def numpy(self, name: str) -> Array:
        self.asked.append(name)
        if name == "unreadable":
            raise NotReadable("there are no values here")
        return super().numpy(name)


class Sums(Task["float", "float"]):
    """Task that sums float32 values, several jobs at once; records those jobs."""

    def __init__(self) -> None:
        self.at_once: list[str] = []

    def begin(self, job: Job) -> _Sum:
        return _Sum()

    def combine(self, job: Job, parts: Sequence[float]) -> float:
        return sum(parts)

    def takes(self, job: Job) -> bool:
        return job.numel <= 4 and job.dtype == "float32"

    def many(self, jobs: Sequence[Job], buffer: memoryview | None, starts: Sequence[int]) -> list[float]:
        found = []
        for job, start in zip(jobs, starts, strict=True):
            assert self.takes(job)
            nbytes = 4 * job.numel
            data = ctypes.string_at(start, nbytes) if buffer is None else bytes(buffer[start : start + nbytes])
            assert len(data) == nbytes
            found.append(float(np.frombuffer(data, np.float32).sum()))
            self.at_once.append(job.key)
        return found


class _Sum:
    def __init__(self) -> None:
        self.total = 0.0

    def update(self, block: Block) -> None:
        self.total += float(block.values().astype(np.float64).sum())

    def finish(self) -> float:
        return self.total


class EngineTests:
    """Contract of `torchparams.engines.Engine`, as tests.

    Subclass it in a test module, under a name that starts with `Test`, and write `make`.

    >>> from torchparams.engines import ThreadEngine
    >>> from torchparams.testing import EngineTests
    >>> class TestThreads(EngineTests):
    ...     def make(self):
    ...         return ThreadEngine(3)
    """

    def make(self) -> Engine:
        """The engine under test."""
        raise NotImplementedError

    def _read(self, source: Source, names: Sequence[str] | None = None, **options: Any) -> dict[str, list[Seen]]:
        """All blocks of every tensor, in order."""
        found = self.make().map(jobs_of(source, names), Folding(lambda job: Recorder(), keep), **options)
        return {name: [seen for part in parts for (seen,) in part] for name, parts in found.items()}

    def _holds(self, found: list[Seen], expected: Array) -> None:
        places = [(seen.start, seen.stop) for seen in found]
        assert [start for start, _ in places] == [0, *(stop for _, stop in places)][: len(places)]
        assert all(start < stop for start, stop in places)
        assert (places[-1][1] if places else 0) == expected.size
        if expected.size:
            assert_identical(
                np.concatenate([seen.values for seen in found]), np.ascontiguousarray(expected).reshape(-1)
            )

    # --- reading ---------------------------------------------------------------------------

    def test_every_type_of_a_source_in_memory(self) -> None:
        """Blocks hold the elements of an array, for every dtype."""
        arrays = {name: sample(name, (3, 41)) for name in NUMPY_DTYPES}
        for name, found in self._read(MemorySource(arrays)).items():
            self._holds(found, arrays[name])

    def test_every_type_of_a_file(self, tmp_path: Path) -> None:
        """Blocks hold the elements of a file, including packed ones, at any offset."""
        arrays = {f"{name} {n}": sample(name, (n,)) for name in SAFETENSORS_DTYPES for n in (24, 8, 120)}
        for name, found in self._read(_file(tmp_path, arrays)).items():
            self._holds(found, arrays[name])

    def test_small_jobs_that_a_task_takes_at_once(self, tmp_path: Path) -> None:
        """Batched results equal those of folds, for files, memory and any layout."""
        arrays: dict[str, Array] = {f"{i}.w": np.full(i % 7, i, np.float32) for i in range(300)}
        arrays |= {
            "large": np.ones(LARGE // 4, np.float32),
            "other": np.ones(3),
            "turned": np.ones((2, 2), np.float32).T,
        }
        arrays |= {f"{i}.late": np.full((), i, np.float32) for i in range(20)}
        expected = {name: float(array.sum()) for name, array in arrays.items()}
        for source in (_file(tmp_path, arrays), MemorySource(arrays), of(arrays).source):
            task = Sums()
            assert self.make().map(jobs_of(source), task) == expected
            assert all(arrays[name].size <= 4 for name in task.at_once)
            assert len(set(task.at_once)) == len(task.at_once)

    def test_every_layout(self) -> None:
        """The order is C order for every stride."""
        base = sample("float32", (6, 8, 10))
        arrays = {
            "plain": base,
            "transposed": base.T,
            "swapped": base.transpose(1, 0, 2),
            "reversed": base[::-1, ::2, ::-1],
            "column": base[:, 0, 0],
            "expanded": np.broadcast_to(base[0, 0], (50, 10)),
            "scalar": base[0, 0, 0:1].reshape(()),
            "empty": base[:, :0],
            "big-endian": base.astype(">f4"),
            "brain": sample("bfloat16", (30, 20)).T,
            "complex": sample("complex128", (30, 20)).T,
            "large": sample("int16", (1200, 1300)).T,
            "large rows": sample("uint8", (2, LARGE)).reshape(2, 3, -1).transpose(2, 0, 1),
        }
        for name, found in self._read(MemorySource(arrays)).items():
            self._holds(found, arrays[name].astype(arrays[name].dtype.newbyteorder("=")))

    def test_large_tensors(self, tmp_path: Path) -> None:
        """A tensor of many blocks is read once, without gaps, and its parts are combined in order."""
        arrays = {name: sample(name, (LARGE // 2 + 77,)) for name in ("int8", "bfloat16", "float4_e2m1fn")}
        arrays["float4_e2m1fn"] = arrays["float4_e2m1fn"][:-1]
        for source in (MemorySource(arrays), _file(tmp_path, arrays)):
            for name, found in self._read(source).items():
                self._holds(found, arrays[name])

    def test_cuts_are_the_same_every_time(self) -> None:
        """Folds that round give the same numbers in every run."""
        source = MemorySource({"large": sample("float32", (LARGE,)), "small": sample("float32", (3,))})
        cuts = []
        for _ in range(3):
            found = self.make().map(jobs_of(source), Folding(lambda job: Recorder(), keep))
            cuts.append({k: [[(s.start, s.stop) for (s,) in part] for part in v] for k, v in found.items()})
        assert cuts[0] == cuts[1] == cuts[2]

    def test_a_fold_may_see_all_of_a_tensor(self) -> None:
        """With the order `stream`, one fold gets a whole tensor in order."""
        source = MemorySource({"large": sample("float64", (LARGE,)), "small": sample("int8", (3,))})
        found = self.make().map(jobs_of(source), Folding(lambda job: Recorder(), keep, "stream"))
        assert {name: len(parts) for name, parts in found.items()} == {"large": 1, "small": 1}
        self._holds([seen for (seen,) in found["large"][0]], sample("float64", (LARGE,)))

    def test_many_small_tensors(self, tmp_path: Path) -> None:
        """Every tensor has a result, in the order of the jobs; names can be chosen."""
        arrays = {f"layer.{i}": sample("float32", (i % 7, 3), seed=i) for i in range(1500)}
        for source in (MemorySource(arrays), _file(tmp_path, arrays)):
            found = self._read(source)
            assert list(found) == list(arrays)
            for name, seen in found.items():
                self._holds(seen, arrays[name])
            assert list(self._read(source, ["layer.9", "layer.2"])) == ["layer.9", "layer.2"]
            assert self._read(source, []) == {}

    def test_an_empty_tensor_has_a_result(self) -> None:
        """A fold without blocks is finished, and combined."""
        found = self.make().map(jobs_of(MemorySource({"e": np.zeros((0, 3))})), Folding(lambda job: Recorder(), keep))
        assert found == {"e": [[]]}

    def test_tensors_in_step(self, tmp_path: Path) -> None:
        """Several tensors are read in step: the same elements of each, for any dtypes and layouts."""
        a, b, c = sample("bfloat16", (900, 1100)), sample("float64", (1100, 900)).T, sample("int8", (900, 1100))
        folders = [tmp_path / name for name in "ac"]
        sources = [_file(folders[0], {"x": a}), MemorySource({"y": b}), _file(folders[1], {"pad": c[:1], "z": c})]
        job = Job.of(*zip(sources, "xyz", strict=True), key="all")
        small = Job.of((sources[2], "pad"), (MemorySource({"p": c[:1]}), "p"))
        found = self.make().map([job, small], Folding(lambda job: Recorder(), keep))
        assert list(found) == ["all", "pad"]
        rows = [row for part in found["all"] for row in part]
        assert all(len({(seen.start, seen.stop) for seen in row}) == 1 for row in rows)
        for column, array in zip(zip(*rows, strict=True), (a, b, c), strict=True):
            self._holds(list(column), array)

    def test_arrays_are_got_from_the_source_once(self) -> None:
        """A source is asked for each array once, whatever the number of parts."""
        source = Slow(
            {"a": sample("float32", (LARGE,)), "b": sample("float32", (5,)), "c": sample("int8", (LARGE, 2)).T}
        )
        self._read(source)
        assert sorted(source.asked) == ["a", "b", "c"]

    def test_sketches_are_those_of_the_arrays(self, tmp_path: Path) -> None:
        """The sketch of a tensor does not depend on the engine."""
        arrays = {name: sample(name, (2, 3, 57)) for name in SAFETENSORS_DTYPES}
        arrays["large"] = sample("float16", (LARGE // 2,))
        arrays["empty"] = sample("int32", (0,))
        for source in (
            MemorySource(arrays),
            _file(tmp_path, {**arrays, **{n: arrays[n][:, :, :56] for n in SAFETENSORS_DTYPES}}),
        ):
            for name, sketch in sketches(source, engine=self.make()):
                assert sketch == Sketch.of(source.numpy(name)), name

    # --- progress --------------------------------------------------------------------------

    def test_progress(self) -> None:
        """Progress ascends to the total bytes, in the caller's thread."""
        told: list[tuple[int, int]] = []

        def progress(done: int, total: int) -> None:
            assert threading.current_thread() is caller
            told.append((done, total))

        caller = threading.current_thread()
        source = MemorySource({"a": sample("float32", (LARGE,)), "b": sample("int8", (3,))})
        self._read(source, progress=progress)
        assert told[-1] == (4 * LARGE + 3, 4 * LARGE + 3)
        assert told == sorted(told) and {total for _, total in told} == {4 * LARGE + 3}

    # --- errors ----------------------------------------------------------------------------

    @pytest.mark.parametrize("where", ["begin", "update", "finish", "combine"])
    @pytest.mark.parametrize("size", [3, LARGE])
    def test_an_exception_surfaces_and_stops_the_work(self, where: str, size: int) -> None:
        """An exception is raised unchanged, after all work has stopped."""
        error = ZeroDivisionError("mine")

        class Failing(Recorder):
            def __init__(self) -> None:
                super().__init__()
                fail("begin")

            def update(self, *blocks: Block) -> None:
                super().update(*blocks)
                fail("update")

            def finish(self) -> list[tuple[Seen, ...]]:
                fail("finish")
                return super().finish()

        def fail(here: str) -> None:
            if here == where:
                raise error

        def combine(job: Job, parts: Sequence[Any]) -> None:
            fail("combine")

        source = MemorySource({name: sample("float32", (size,)) for name in "abcdef"})
        before = set(threading.enumerate())
        with pytest.raises(ZeroDivisionError) as caught:
            self.make().map(jobs_of(source), Folding(lambda job: Failing(), combine))
        assert caught.value is error
        assert set(threading.enumerate()) <= before

    def test_a_tensor_that_cannot_be_read(self) -> None:
        """An unreadable tensor is a result with the source's error; `map` raises that error."""
        source = Slow({"a": sample("float32", (LARGE,)), "unreadable": sample("int8", (LARGE,))})
        with pytest.raises(NotReadable, match=r"[Tt]here are no values here"):
            self._read(source)
        source.asked.clear()
        jobs = jobs_of(source, ["a", "unreadable"])
        found = {done.job.key: done for done in self.make().run(jobs, Folding(lambda job: Recorder(), keep))}
        assert found["unreadable"].result == Unread("unreadable", "there are no values here")
        assert not isinstance(found["a"].result, Unread)
        assert sorted(source.asked) == ["a", "unreadable"]  # once each, whatever the number of parts

    def test_leaving_early_stops_the_work(self) -> None:
        """Leaving the iterator early stops the work."""
        source = MemorySource({str(i): sample("uint8", (LARGE // 4,)) for i in range(400)})
        begun: set[str] = set()

        def begin(job: Job) -> Recorder:
            begun.add(job.key)
            return Recorder()

        before = set(threading.enumerate())
        results = self.make().run(jobs_of(source), Folding(begin, keep))
        next(results)
        results.close()  # type: ignore[attr-defined]  # an iterator of this contract may be left
        count = len(begun)
        assert set(threading.enumerate()) <= before
        assert 1 <= count == len(begun) < 400

    @pytest.mark.parametrize("size", [1000, LARGE])
    def test_ctrl_c_ends_the_work(self, size: int) -> None:
        """KeyboardInterrupt is raised in the caller, after all threads ended."""
        source = MemorySource({str(i): sample("uint8", (size,)) for i in range(50)})
        blocks: list[int] = []

        def each() -> None:
            blocks.append(1)
            if len(blocks) == 3:
                signal.raise_signal(signal.SIGINT)

        before = set(threading.enumerate())
        with pytest.raises(KeyboardInterrupt):
            # A signal is handled when the caller's thread runs next: give it enough work until then.
            for _ in range(1000):
                self.make().map(jobs_of(source), Folding(lambda job: Recorder(each), keep))
        assert set(threading.enumerate()) <= before

    def test_a_file_that_was_cut(self, tmp_path: Path) -> None:
        """A file that became shorter is not read at all."""
        source = _file(tmp_path, {"a": sample("int8", (LARGE,)), "b": sample("int8", (100,))})
        size = os.path.getsize(source.files[0])
        for cut in (50, LARGE):
            os.truncate(source.files[0], size - cut)
            with pytest.raises(TruncatedFile) as caught:
                self._read(source)
            assert str(caught.value) == (
                f"{source.files[0]}: The file has {size - cut} bytes; it had {size} when it was listed"
            )

    def test_a_file_that_is_written_to_meanwhile(self, tmp_path: Path) -> None:
        """A file that changed during the run is an error."""
        source = _file(tmp_path, {name: sample("int8", (LARGE,)) for name in "abc"})

        def touch() -> None:
            os.utime(source.files[0], ns=(1, 1))

        with pytest.raises(SourceError, match="The file changed while it was read") as caught:
            self.make().map(jobs_of(source), Folding(lambda job: Recorder(touch), keep))
        assert str(caught.value).startswith(source.files[0])

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        """A deleted file is a clear error."""
        source = _file(tmp_path, {"a": sample("int8", (5,))})
        os.unlink(source.files[0])
        with pytest.raises(SourceError, match="No such file or directory"):
            self._read(source)


def _file(folder: Path, arrays: dict[str, Array]) -> Source:
    """A safetensors file of the arrays."""
    folder.mkdir(exist_ok=True)
    path = folder / "file.safetensors"
    path.write_bytes(safetensors_bytes({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    source = open_source(str(path))
    assert all(source.span(name) is not None for name in arrays)
    return source
