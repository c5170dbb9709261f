"""ThreadEngine: the engine contract, and its own behaviour."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from torchparams.engines import Block, Engine, Folding, ThreadEngine, jobs_of
from torchparams.errors import SourceError, TruncatedFile
from torchparams.io import reader
from torchparams.io.threads import processors
from torchparams.sources.opening import open_source
from torchparams.testing import EngineTests, MemorySource, safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self


class TestOneThread(EngineTests):
    def make(self) -> Engine:
        return ThreadEngine(1)


class TestTwoThreads(EngineTests):
    def make(self) -> Engine:
        return ThreadEngine(2, block_bytes=1 << 16, part_bytes=1 << 18)


class TestMapped(EngineTests):
    def make(self) -> Engine:
        return ThreadEngine(2, block_bytes=1 << 12, part_bytes=1 << 18, mapped=True)


class TestMappedOnOneThread(EngineTests):
    def make(self) -> Engine:
        return ThreadEngine(1, mapped=True)


class TestManyThreads(EngineTests):
    def make(self) -> Engine:
        return ThreadEngine(7, block_bytes=50_000, part_bytes=1)


class Count:
    """A fold that counts bytes, and remembers who did."""

    def __init__(self, threads: set[str] | None = None) -> None:
        self.nbytes = 0
        self.threads = threads

    def update(self, block: Block) -> None:
        self.nbytes += len(block.data)
        if self.threads is not None:
            self.threads.add(threading.current_thread().name)

    def finish(self) -> int:
        return self.nbytes


def total(job: Any, parts: Any) -> int:
    return sum(parts)


def write(folder: Path, count: int, numel: int) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(safetensors_bytes({f"layer.{i}": sample("int8", (numel,), seed=i) for i in range(count)}))
    return str(path)


def test_a_large_tensor_is_read_by_all_threads() -> None:
    source = MemorySource({"w": sample("int8", (32, 1 << 16))})
    barrier = threading.Barrier(4)

    class Meet(Count):
        def finish(self) -> int:
            barrier.wait(timeout=60)  # passes only when four threads have a part each
            return super().finish()

    engine = ThreadEngine(4, block_bytes=1 << 16, part_bytes=8 << 16)
    assert engine.map(jobs_of(source), Folding(lambda job: Meet(), lambda job, parts: list(parts))) == {
        "w": [8 << 16] * 4
    }


@pytest.mark.parametrize(("threads", "numel"), [(1, 1 << 20), (8, 1000)])
def test_with_one_thread_or_little_to_read_nothing_is_started(threads: int, numel: int) -> None:
    names: set[str] = set()
    engine = ThreadEngine(threads)
    source = MemorySource({name: sample("int8", (numel,)) for name in "ab"})
    engine.map(jobs_of(source), Folding(lambda job: Count(names), total))
    assert names == {threading.current_thread().name}


def test_small_tensors_that_lie_together_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(tmp_path, 1000, 100))
    reads: list[int] = []
    preadv = os.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        reads.append(got := preadv(fd, buffers, offset))
        return got

    monkeypatch.setattr(os, "preadv", counting)
    for threads in (1, 3):
        reads.clear()
        found = ThreadEngine(threads, block_bytes=1 << 15).map(jobs_of(source), Folding(lambda job: Count(), total))
        assert set(found.values()) == {100}
        assert len(reads) <= 8
        assert sum(reads) == 100_000


def test_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(tmp_path, 5, 100_000))
    monkeypatch.delattr(os, "preadv")
    engine = ThreadEngine(2, block_bytes=1 << 14)
    assert set(engine.map(jobs_of(source), Folding(lambda job: Count(), total)).values()) == {100_000}


def test_a_file_that_is_cut_while_it_is_mapped_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(tmp_path, 100, 1000))
    path = source.files[0]
    size = os.path.getsize(path) - 50_500

    class Cut(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            if os.path.getsize(path) > size:
                os.truncate(path, size)
                raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(reader, "_POPULATE", 22)
    monkeypatch.setattr(mmap, "mmap", Cut)
    with pytest.raises(TruncatedFile, match=rf"The file ends at byte {size}, within the tensor 'layer\.49'"):
        ThreadEngine(1, block_bytes=1 << 16, mapped=True).map(jobs_of(source), Folding(lambda job: Count(), total))


def test_a_file_that_is_cut_before_it_is_mapped_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(tmp_path, 1, 30_000))
    path = source.files[0]

    class Cut(mmap.mmap):
        def __new__(cls, *arguments: int, **options: int) -> Self:
            os.truncate(path, 10_000)
            return super().__new__(cls, *arguments, **options)

    monkeypatch.setattr(mmap, "mmap", Cut)
    with pytest.raises(TruncatedFile, match=r"The file ends at byte 10000, within the tensor 'layer\.0'"):
        ThreadEngine(1, mapped=True).map(jobs_of(source), Folding(lambda job: Count(), total))


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write(tmp_path, 2, 100))

    class Failing(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(reader, "_POPULATE", 22)
    monkeypatch.setattr(mmap, "mmap", Failing)
    engine = ThreadEngine(1, mapped=True)
    with pytest.raises(SourceError) as caught:
        engine.map(jobs_of(source), Folding(lambda job: Count(), total))
    size = os.path.getsize(source.files[0])
    assert str(caught.value) == f"{source.files[0]}: The bytes 0 to {size} cannot be read: Bad address"

    class Old(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Old)
    assert engine.map(jobs_of(source), Folding(lambda job: Count(), total)) == {"layer.0": 100, "layer.1": 100}


def test_tensors_are_read_as_they_lie_in_the_file(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, 20, 30_000))
    jobs = jobs_of(source, [f"layer.{i}" for i in (7, 3, 19, 0)])
    engine = ThreadEngine(1, block_bytes=1 << 14)
    assert [job.key for job, _, _ in engine.run(jobs, Folding(lambda job: Count(), total))] == [
        f"layer.{i}" for i in (0, 3, 7, 19)
    ]
    assert list(engine.map(jobs, Folding(lambda job: Count(), total))) == [job.key for job in jobs]


def test_memory_is_that_of_the_buffers(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    header = safetensors_bytes({"w": np.zeros(1, np.uint8)})
    numel = 256 << 20
    header = header[:-1].replace(b'"shape": [1]', b'"shape": [%d]' % numel).replace(b"[0, 1]", b"[0, %d]" % numel)
    text = header[8:]
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + numel)
    source = open_source(str(path))
    tracemalloc.start()
    try:
        found = ThreadEngine(2).map(jobs_of(source), Folding(lambda job: Count(), total))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == {"w": numel}
    assert peak < 4 << 20


def test_open_files_are_closed(tmp_path: Path) -> None:
    def opened() -> list[str]:
        return [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        ]

    source = open_source(write(tmp_path, 5, 300_000))
    results = ThreadEngine(3, block_bytes=1 << 14).run(jobs_of(source), Folding(lambda job: Count(), total))
    next(results)
    results.close()  # type: ignore[attr-defined]  # an iterator of an engine may be left
    for threads in (1, 3):
        ThreadEngine(threads).map(jobs_of(source), Folding(lambda job: Count(), total))
    if os.path.exists("/proc/self/fd"):
        assert not [path for path in opened() if path.startswith(str(tmp_path))]


def test_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ThreadEngine().threads == processors() >= 1
    with pytest.raises(ValueError, match="the number of threads must be at least 1, not 0"):
        ThreadEngine(0)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert processors() == (os.cpu_count() or 1)


def test_a_large_tensor_that_cannot_be_shared_comes_first() -> None:
    arrays = {name: sample("int8", (numel,)) for name, numel in {"a": 1, "b": 99_000, "c": 900_000, "d": 1}.items()}
    jobs = jobs_of(MemorySource(arrays))
    alone = ThreadEngine(1, block_bytes=1 << 16)
    assert [job.key for job, _, _ in alone.run(jobs, Folding(lambda job: Count(), total, "stream"))] == [
        "c",
        "b",
        "a",
        "d",
    ]
    assert [job.key for job, _, _ in alone.run(jobs, Folding(lambda job: Count(), total))] == ["b", "c", "a", "d"]


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_was_replaced_since_it_was_listed_is_not_read(mapped: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes({"w": sample("float32", (4,))}))
    source = open_source(str(file))
    other = tmp_path / "other"
    other.write_bytes(safetensors_bytes({"w": sample("float32", (2, 4))}))
    other.replace(file)
    with pytest.raises(SourceError) as caught:
        ThreadEngine(mapped=mapped).map(jobs_of(source), Folding(lambda job: Count(), lambda job, parts: sum(parts)))
    assert str(caught.value) == (f"{file}: The file changed after it was listed. Open the file again.")
