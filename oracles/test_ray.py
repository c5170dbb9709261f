"""The engine of Ray, on a real cluster of several nodes: the contract, equality with threads, and what dies."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

import torchparams as tp
from torchparams.cli.app import run
from torchparams.engines import Engine, Folding, Job, RayEngine, ThreadEngine, Unread, jobs_of
from torchparams.errors import EngineError, NotReadable, OptionError, PlanError, SourceError, TorchParamsError
from torchparams.sources.opening import open_source
from torchparams.testing import EngineTests, MemorySource, safetensors_bytes, sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torchparams.engines import Block

MEMORY = 80 << 20
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_health_check_initial_delay_ms": "500",  # a dead node is found in seconds
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "2",
}
NODE = r"[oO]n node \S+ \([0-9a-f]{8}\)"


class Nodes:
    """The cluster: a head, and workers that tests may kill."""

    def __init__(self) -> None:
        head = {"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.add()
        ray.init(address=self.cluster.address, include_dashboard=False, log_to_driver=False, logging_level="error")

    def add(self, **options: Any) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=MEMORY, **options)


@pytest.fixture(scope="module", autouse=True)
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as environment:
        for key, value in SETTINGS.items():
            environment.setenv(key, value)
        made = Nodes()
        try:
            yield made
        finally:
            ray.shutdown()
            made.cluster.shutdown()


def engine(**options: Any) -> RayEngine:
    return RayEngine(chunk_bytes=1 << 18, **options)


class Ticking(RayEngine):
    """Calls a function of the test while it waits."""

    def __init__(self, each: Callable[[], object]) -> None:
        super().__init__(chunk_bytes=1 << 18)
        self.each = each

    def scatter(self, call: Any, parcels: Any, tick: Any = lambda: None) -> Iterator[tuple[int, Any]]:
        return super().scatter(call, parcels, self.each)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint of three shards, of several dtypes."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for i in range(24):
        for name in ("float32", "bfloat16", "int8"):
            arrays[f"layers.{i}.{name}"] = sample(name, (41, 300 + i), seed=i)
    arrays["large"] = sample("float16", (3 << 20,))
    arrays["empty"] = sample("float32", (0, 3))
    return sharded(tmp_path / "shards", arrays)


def sharded(folder: Path, arrays: dict[str, Any], count: int = 3) -> Path:
    folder.mkdir()
    index: dict[str, str] = {}
    names = list(arrays)
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        own = names[i::count]
        (folder / file).write_bytes(safetensors_bytes({name: arrays[name] for name in own}))
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


# --- the contract ----------------------------------------------------------------------------------


class TestRay(EngineTests):
    def make(self) -> Engine:
        return engine()


class TestRayOfOneChunk(EngineTests):
    def make(self) -> Engine:
        return RayEngine()


# --- results are those of threads -------------------------------------------------------------------


def test_verbs_give_what_threads_give(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    tp.convert(shards, other, dtype="bf16", allow_overflow=True).run()
    for chosen in (engine(), "ray"):
        assert tp.stats(shards, engine=chosen).to_json() == tp.stats(shards).to_json()
        assert tp.digest(shards, engine=chosen).to_json() == tp.digest(shards).to_json()
        found, expected = (tp.diff(shards, other, numeric=True, engine=each) for each in (chosen, None))
        assert found.to_json() == expected.to_json() and not found.same
    manifest = tmp_path / "manifest"
    tp.digest(shards).write(manifest)
    assert tp.verify(shards, manifest, engine="ray").to_json() == tp.verify(shards, manifest).to_json()


def matrices(path: Path) -> Path:
    numbers = np.random.default_rng(0)
    path.write_bytes(
        safetensors_bytes(
            {name: numbers.standard_normal((40, n)).astype(np.float32) for name, n in (("a", 60), ("b", 20))}
        )
    )
    return path


def test_spectra_are_those_of_threads(tmp_path: Path) -> None:
    path = matrices(tmp_path / "m.safetensors")
    found, expected = (tp.spectra(path, exact=30, engine=each) for each in ("ray", None))
    assert found.rows == expected.rows
    assert [bool(row.errors) for row in found.rows] == [True, False]


def test_rows_that_are_computed_travel(shards: Path) -> None:
    plan = tp.merge([shards, shards], weights=[0.3, 0.7], dtype="bf16", allow_overflow=True)
    assert tp.stats(plan, engine=engine()).to_json() == tp.stats(plan).to_json()


def test_torch_files_travel(tmp_path: Path) -> None:
    """Also tensors without a range in a file: a worker opens the source for them."""
    import torch

    numbers = torch.arange(6000, dtype=torch.float32).reshape(60, 100)
    tensors = {"a": numbers, "turned": numbers.T, "b": torch.ones(3, dtype=torch.bfloat16)}
    for name, zipped in (("zip.pt", True), ("legacy.pt", False)):
        torch.save({"model": tensors}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        target = f"{tmp_path / name}#model"
        assert tp.stats(target, engine=engine()).to_json() == tp.stats(target).to_json()


def test_relative_paths(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have another working directory."""
    monkeypatch.chdir(shards.parent)
    assert tp.digest("shards", engine=engine()).digest == tp.digest(shards).digest


class Where:
    """A fold that says which process ran it."""

    def update(self, block: Block) -> None: ...

    def finish(self) -> int:
        return os.getpid()


WHERE = Folding(lambda job: Where(), lambda job, parts: parts[0])


def test_files_are_read_by_workers_and_memory_here(shards: Path) -> None:
    away = engine().map(jobs_of(open_source(shards)), WHERE)
    assert os.getpid() not in away.values() and len(set(away.values())) > 1
    assert set(engine().map(jobs_of(MemorySource({"w": np.ones(3)})), WHERE).values()) == {os.getpid()}


def test_jobs_of_a_file_and_of_memory(shards: Path) -> None:
    found, expected = (
        tp.diff(shards, {"large": sample("float16", (3 << 20,), seed=1)}, engine=each) for each in (engine(), None)
    )
    assert found.to_json() == expected.to_json()


def test_progress(shards: Path) -> None:
    told: list[tuple[int, int]] = []
    tp.stats(shards, engine=engine(), progress=lambda *at: told.append(at))
    total = sum(info.nbytes for info in tp.of(shards).infos.values())
    assert told[-1] == (total, total) and told == sorted(told)


# --- errors ------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"a": np.ones(3, np.float32)}))

    class Refusing(Where):
        def update(self, block: Block) -> None:
            raise NotReadable("there are no values here")

    jobs = jobs_of(open_source(path))
    (done,) = engine().run(jobs, Folding(lambda job: Refusing(), lambda job, parts: parts[0]))
    assert done.job is jobs[0] and done.result == Unread("a", "there are no values here")


def test_an_exception_names_the_node(shards: Path) -> None:
    class Failing(Where):
        def update(self, block: Block) -> None:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        engine().map(jobs_of(open_source(shards)), Folding(lambda job: Failing(), lambda job, parts: parts[0]))
    (note,) = caught.value.__notes__
    assert note.startswith("on node ")


def test_a_node_that_lacks_the_file(shards: Path) -> None:
    source = open_source(shards)
    jobs = jobs_of(source)
    gone = next(path for path in source.files if path.endswith("00002-of-00003.safetensors"))

    class Removing(RayEngine):
        """As on a node without that disk: the file is there for the driver, and not for workers."""

        def scatter(self, call: Any, parcels: Any, tick: Any = lambda: None) -> Any:
            listed = list(parcels)
            os.rename(gone, f"{gone}.away")
            return super().scatter(call, listed, tick)

    with pytest.raises(SourceError, match=NODE) as caught:
        Removing(chunk_bytes=1 << 18).map(jobs, WHERE)
    assert str(caught.value).startswith(f"{gone}: No such file or directory. On node ")


def test_a_node_with_another_copy_of_the_file(shards: Path) -> None:
    source = open_source(shards)
    jobs = jobs_of(source)

    class Touching(RayEngine):
        def scatter(self, call: Any, parcels: Any, tick: Any = lambda: None) -> Any:
            listed = list(parcels)
            for path in source.files:
                os.utime(path, ns=(1, 1))
            return super().scatter(call, listed, tick)

    with pytest.raises(SourceError, match=f"this node has another copy of it.*{NODE}"):
        Touching().map(jobs, WHERE)


def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError(f"nobody is at {options['address']}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1: No Ray cluster can be started or reached: nobody is at"):
        RayEngine("127.0.0.1:1").scatter(len, [b""]).__next__()


def test_ctrl_c_stops_the_workers(shards: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()

    class Slow(Where):
        def update(self, block: Block) -> None:
            mark = marks / str(os.getpid())
            for _ in range(600):
                mark.write_text("at work")
                time.sleep(0.05)

    def interrupt() -> None:
        if any(marks.iterdir()):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Ticking(interrupt).map(jobs_of(open_source(shards)), Folding(lambda job: Slow(), lambda job, parts: parts[0]))
    before = {mark: mark.stat().st_mtime_ns for mark in marks.iterdir()}
    time.sleep(0.5)
    assert {mark: mark.stat().st_mtime_ns for mark in marks.iterdir()} == before


# --- death -------------------------------------------------------------------------------------------


class Dying:
    """A fold that ends its process at the first try."""

    def __init__(self, marker: str) -> None:
        self.marker = marker
        self.seen = 0

    def update(self, block: Block) -> None:
        self.seen += block.numel
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os._exit(1)

    def finish(self) -> int:
        return self.seen


def counted(job: Job, parts: Any) -> int:
    return sum(parts)


def test_a_worker_that_is_killed_is_retried(shards: Path, tmp_path: Path) -> None:
    marker = str(tmp_path / "died")
    jobs = jobs_of(open_source(shards))
    found = engine().map(jobs, Folding(lambda job: Dying(marker), counted))
    assert os.path.exists(marker)
    assert found == {job.key: job.numel for job in jobs}


def test_a_worker_that_always_dies(shards: Path) -> None:
    class Fatal(Where):
        def update(self, block: Block) -> None:
            os._exit(1)

    with pytest.raises(EngineError, match="A worker did not finish"):
        engine(retries=1).map(
            jobs_of(open_source(shards), ["large"]), Folding(lambda job: Fatal(), lambda job, parts: parts[0])
        )


def test_a_node_that_is_killed(nodes: Nodes, shards: Path, tmp_path: Path) -> None:
    third = nodes.add(resources={"third": 1})
    name, started = third.node_id, tmp_path / "started"

    class Slow(Where):
        def update(self, block: Block) -> None:
            if ray.get_runtime_context().get_node_id() == name:
                started.touch()
                time.sleep(600)  # until the node is killed

    def kill() -> None:
        if started.exists() and third in nodes.cluster.list_all_nodes():
            nodes.cluster.remove_node(third, allow_graceful=False)

    jobs = jobs_of(open_source(shards))
    found = Ticking(kill).map(jobs, Folding(lambda job: Slow(), lambda job, parts: 7))
    assert started.exists() and third not in nodes.cluster.list_all_nodes()
    assert found == dict.fromkeys((job.key for job in jobs), 7)


# --- writing -----------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_are_written_by_workers(shards: Path, tmp_path: Path) -> None:
    here, away = tmp_path / "here", tmp_path / "away"
    told: list[tuple[int, int]] = []
    plans = [tp.convert(shards, out, max_shard_size="2MB") for out in (here, away)]
    expected = plans[0].run()
    written = plans[1].run(lambda *at: told.append(at), engine="ray")
    assert contents(away) == contents(here) and len(contents(away)) > 3
    assert written.files == expected.files
    assert told[-1] == (plans[1].nbytes,) * 2 and told == sorted(told)


def test_losses_of_writers(shards: Path, tmp_path: Path) -> None:
    made = [
        tp.convert(shards, tmp_path / name, dtype="bf16", max_shard_size="1MB", allow_overflow=True).run(engine=chosen)
        for name, chosen in (("here", None), ("away", engine()))
    ]
    assert contents(tmp_path / "here") == contents(tmp_path / "away")
    assert made[0].casts == made[1].casts and any(cast.losses.changed for cast in made[0].casts)


def test_a_merge_has_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    for name, chosen in (("here", None), ("away", engine())):
        plan = tp.merge(
            [shards, shards], tmp_path / name, weights=[0.5, 0.25], dtype="bf16", max_shard_size="1MB",
            allow_overflow=True,
        )  # fmt: skip
        plan.run(engine=chosen)
    assert contents(tmp_path / "here") == contents(tmp_path / "away")


def test_tensors_in_memory_are_written_here(tmp_path: Path) -> None:
    arrays = {f"w{i}": sample("float32", (1000,), seed=i) for i in range(8)}
    for name, chosen in (("here", None), ("away", "ray")):
        tp.convert(MemorySource(arrays), tmp_path / name, max_shard_size="10KB").run(engine=chosen)
    assert contents(tmp_path / "here") == contents(tmp_path / "away")


def test_an_error_of_a_writer_leaves_the_old_one(tmp_path: Path) -> None:
    arrays = {f"w{i}": np.full(4000, 60_000 if i == 5 else 1.0, np.float16) for i in range(8)}
    source = sharded(tmp_path / "source", arrays)
    out = tmp_path / "out"
    tp.convert(source, out, max_shard_size="20KB").run()
    before = contents(out)
    with pytest.raises(PlanError, match="too large for"):
        tp.convert(source, out, dtype="f8_e4m3", max_shard_size="10KB", overwrite=True).run(engine="ray")
    assert contents(out) == before
    with pytest.raises(PlanError, match=rf"too large for.*{NODE}"):
        tp.merge([source, source], out, weights=[1, 1], max_shard_size="10KB", overwrite=True).run(engine="ray")
    assert contents(out) == before
    with pytest.raises(PlanError):
        tp.convert(source, tmp_path / "new", dtype="f8_e4m3", max_shard_size="10KB").run(engine="ray")
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_writer_that_is_killed_is_retried(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.edit.write import on_workers

    marker, write = str(tmp_path / "died"), on_workers._write_share

    def dying(parcel: bytes) -> Any:
        import torchparams.io.system as system

        real = system.write

        def first(fd: int, data: Any, offset: int) -> None:
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return real(fd, data, offset)
            real(fd, bytes(data)[:3], offset)
            os._exit(1)

        system.write = first  # of the worker's process, which ends or is used again
        try:
            return write(parcel)
        finally:
            system.write = real

    tp.convert(shards, tmp_path / "here", max_shard_size="2MB").run()
    monkeypatch.setattr(on_workers, "_write_share", dying)
    tp.convert(shards, tmp_path / "away", max_shard_size="2MB").run(engine="ray")
    assert os.path.exists(marker)
    assert contents(tmp_path / "away") == contents(tmp_path / "here")


def test_what_ray_does_not_write(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="a worker writes a shard, but the plan writes one file"):
        tp.convert(shards, tmp_path / "one.safetensors").run(engine="ray")
    with pytest.raises(OptionError, match="The engine 'threads' does not write files"):
        tp.convert(shards, tmp_path / "out").run(engine=ThreadEngine())
    assert os.listdir(tmp_path) == ["shards"]


def test_the_catalog(shards: Path, tmp_path: Path) -> None:
    def rows(chosen: str | None) -> list[Any]:
        return list(tp.catalog([shards, tmp_path / "nothing"], digest=True, stats=True, engine=chosen).table_rows())

    assert repr(rows("ray")) == repr(rows(None)) and len(rows(None)) > 70


def test_a_catalog_without_workers(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no error of a checkpoint."""

    def refuse(*_: Any) -> Iterator[tuple[int, Any]]:
        raise EngineError("a worker did not finish")

    monkeypatch.setattr(RayEngine, "scatter", refuse)
    with pytest.raises(EngineError):
        tp.catalog([shards], stats=True, engine="ray")


# --- the command line --------------------------------------------------------------------------------


def test_commands(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(matrices(tmp_path / "m.safetensors"))
    for command in ("stats", "digest", "spectra", "verify"):
        texts = []
        for more in ([], ["--engine", "ray"]):
            run([command, path, "--json", *more])
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] and texts[0]
    assert run(["diff", str(shards), str(shards), "--engine", "ray"]) == 0
    run(["convert", str(shards), str(tmp_path / "out"), "--max-shard-size", "2MB", "--engine", "ray"])
    assert tp.diff(shards, tmp_path / "out").same
    capsys.readouterr()
    assert run(["stats", str(shards), "--engine", "dask"]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("No engine is named 'dask'. Names are 'threads', 'ray' and 'ray:ADDRESS'.")
    )


def test_errors_are_of_this_package() -> None:
    assert issubclass(EngineError, TorchParamsError)
