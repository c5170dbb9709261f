"""The engine of Ray: workers of a cluster read the files themselves, and send back what they made of them.

Jobs are grouped by bytes into **chunks**, and each chunk is a Ray task: a worker runs it on a `ThreadEngine` of its
own, which cuts jobs as it does everywhere. So results are those of threads, bit for bit, for any number of workers.

The files must be where every node can read them under the same path: on a shared disk, or behind a URL. Rows that live
in memory are run first, by the threads of this process.
"""

from __future__ import annotations

import os
import pickle
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torchparams.engines.base import Done, Engine, Job, Task
from torchparams.engines.distributed import engine_for
from torchparams.engines.parcel import can_travel, packed, unpacked
from torchparams.engines.threads import MEMORY, ThreadEngine
from torchparams.errors import EngineError, MissingDependency, TorchParamsError, shorten
from torchparams.io.threads import TICK, Ticker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torchparams.engines.base import Progress
    from torchparams.expressions.base import Readable

Part = TypeVar("Part")
Result = TypeVar("Result")

CHUNK_BYTES = 128 << 20
"""Most bytes of tensors that are one Ray task, but for a single larger tensor."""

_LEAST = 16 << 20  # bytes of a chunk below which to send it costs more than another worker spares
_MOST_JOBS = 1024  # in a chunk: their results travel together
_AHEAD = 2  # chunks for each processor that are sent before results come back
_STOPPING = 10.0  # seconds that workers have to stop


class RayEngine(Engine):
    """Runs jobs on the workers of a Ray cluster; rows in memory run on the threads of this process.

    A Ray that is initialised is used as it is. Otherwise one is: the cluster at `address`, or the one that runs on this
    machine, or a new local one, without dashboard and usage reports. It is left running for the next call.

    The work of a worker or a node that dies is done again by another. An error of a worker is raised here, and names
    the node. A file that a node lacks, or that is not the one that was listed here, is an error.

    Args:
        address: The cluster, as for `ray.init`.
        chunk_bytes: Most bytes of tensors in one Ray task. A single larger tensor is one task.
        retries: How often the work of a worker that died is done again.
        memory: Bytes of memory that the computed rows of one worker may take.

    >>> RayEngine("10.0.0.1:6379").label
    'ray'
    """

    label = "ray"

    def __init__(
        self,
        address: str | None = None,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        retries: int = 3,
        memory: int = MEMORY,
    ) -> None:
        self.address = address
        self.chunk_bytes = chunk_bytes
        self.retries = retries
        self.memory = memory

    def run(
        self, jobs: Iterable[Job], task: Task[Part, Result], *, progress: Progress | None = None
    ) -> Iterator[Done[Result]]:
        """See `Engine.run`. Progress goes on as chunks get done.

        Raises:
            EngineError: Ray cannot be reached, or a worker died more often than it is retried.
        """
        here: list[Job] = []
        away: list[Job] = []
        sources: dict[int, Readable] = {}
        for job in jobs:
            (away if all(map(can_travel, job.rows)) else here).append(job)
            sources.update((id(leaf.source), leaf.source) for row in job.rows for leaf in row.leaves())
        for source in sources.values():
            source.check_unchanged()
        total = sum(job.nbytes for job in (*here, *away))
        tick = Ticker(progress, total)
        done = sum(job.nbytes for job in here)

        def tell() -> None:
            tick(done)

        yield from engine_for(here).run(here, task, progress=None if progress is None else lambda at, _: tick(at))
        if away:
            chunks = self._chunks(away, _processors(connect(self.address)))
            parcels = (
                packed((chunk, task, self.memory), [row for job in chunk for row in job.rows]) for chunk in chunks
            )
            for number, found in self.scatter(_run_chunk, parcels, tell):
                chunk = chunks[number]
                for at, result, lost in found:
                    yield Done(chunk[at], result, lost)
                done += sum(job.nbytes for job in chunk)
                tick(done)
        if progress is not None:
            progress(total, total)

    def scatter(
        self, call: Callable[[bytes], Any], parcels: Iterable[bytes], tick: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[int, Any]]:
        """Call a function of this package on workers, once for each parcel: give its number and the result.

        Results come as they get done. Leaving the iterator early, an error and Ctrl-C stop the workers first.

        Args:
            call: A function of a module.
            parcels: Its arguments; made as they are sent.
            tick: Called in this thread, about ten times a second.

        Raises:
            EngineError: Ray cannot be reached, or a worker died more often than it is retried.
            Exception: What a worker raised, with the name of its node.
        """
        from torchparams import __version__

        ray = connect(self.address)
        options = {"num_cpus": 1, "max_retries": self.retries, "scheduling_strategy": "SPREAD"}
        remote = ray.remote(**options)(_on_worker)
        waiting = enumerate(parcels)
        pending: dict[Any, int] = {}
        most = _processors(ray) * _AHEAD
        try:
            more = True
            while True:
                while more and len(pending) < most:
                    number, parcel = next(waiting, (0, None))
                    more = parcel is not None
                    if more:
                        pending[remote.remote(__version__, call, parcel)] = number
                if not pending:
                    return
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=TICK)
                tick()
                for each in ready:
                    answer = pickle.loads(_got(ray, each))
                    number = pending.pop(each)
                    if isinstance(answer, _Failed):
                        raise _named_by(answer)
                    yield number, answer
        finally:
            _stop(ray, list(pending))

    def _chunks(self, jobs: Sequence[Job], workers: int) -> list[list[Job]]:
        """Jobs as they lie in files, so many bytes at a time; the largest come first, lest one is left to the end."""
        first = {}
        for job in jobs:
            place = next((leaf.place for leaf in job.rows[0].leaves()), None)
            first[id(job)] = ("", 0) if place is None else (place.file, place.start)
        ordered = sorted(jobs, key=lambda job: first[id(job)])
        share = sum(job.nbytes for job in jobs) // (4 * workers)
        most = min(self.chunk_bytes, max(share, _LEAST))
        chunks: list[list[Job]] = []
        size = 0
        for job in ordered:
            if not chunks or size + job.nbytes > most or len(chunks[-1]) == _MOST_JOBS:
                chunks.append([])
                size = 0
            chunks[-1].append(job)
            size += job.nbytes
        return sorted(chunks, key=lambda chunk: -sum(job.nbytes for job in chunk))


def connect(address: str | None = None) -> Any:
    """The module of Ray, initialised.

    Args:
        address: The cluster, if none is initialised.

    Raises:
        MissingDependency: Ray is not installed.
        EngineError: No cluster answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray is about to do by itself
    try:
        import ray
    except ImportError:
        raise MissingDependency(
            "the engine 'ray' needs ray, which is not installed", hint="pip install 'torchparams[ray]'"
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="warning")
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            raise EngineError(
                f"no Ray cluster can be started or reached: {shorten(str(error), 200)}",
                where=address,
                hint="see ray status on the cluster",
            ) from error
    return ray


def _processors(ray: Any) -> int:
    return max(int(ray.cluster_resources().get("CPU", 1)), 1)


# --- in the driver ---------------------------------------------------------------------------------


def _got(ray: Any, reference: Any) -> bytes:
    try:
        answer: bytes = ray.get(reference)
    except ray.exceptions.RayError as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EngineError(
            f"a worker did not finish ({type(error).__name__}): {shorten(first, 200)}",
            hint="its work was tried again first; see the logs of Ray on that node",
        ) from error
    return answer


def _named_by(failed: _Failed) -> BaseException:
    error = failed.error
    if isinstance(error, TorchParamsError):
        error.exists = f"on {failed.node}" if error.exists is None else f"{error.exists.rstrip('.')}, on {failed.node}"
    else:
        error.add_note(f"on {failed.node}")
    return error


def _stop(ray: Any, pending: list[Any]) -> None:
    """Stop workers, and wait until they have."""
    if not pending:
        return
    with suppress(Exception):  # Ray itself may be gone
        for each in pending:
            ray.cancel(each)
        _, left = ray.wait(pending, num_returns=len(pending), timeout=_STOPPING, fetch_local=False)
        for each in left:
            ray.cancel(each, force=True)


# --- in a worker -----------------------------------------------------------------------------------


class _Failed(NamedTuple):
    """An exception on its way back, and the node that it comes from."""

    error: Exception
    node: str


def _on_worker(version: str, call: Callable[[bytes], Any], parcel: bytes) -> bytes:
    import ray
    import ray.cloudpickle as cloudpickle

    from torchparams import __version__

    try:
        if version != __version__:
            raise EngineError(
                f"torchparams {__version__} is installed there, and {version} here", hint="install one version"
            )
        return cloudpickle.dumps(call(parcel), pickle.HIGHEST_PROTOCOL)  # type: ignore[no-any-return]
    except Exception as error:
        error.__traceback__ = error.__cause__ = None
        node = f"node {socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"
        try:
            data = cloudpickle.dumps(_Failed(error, node), pickle.HIGHEST_PROTOCOL)
            pickle.loads(data)
        except Exception:  # an exception of somebody's own class, which does not pickle
            made = EngineError(f"{type(error).__name__}: {shorten(str(error), 200)}")
            data = cloudpickle.dumps(_Failed(made, node), pickle.HIGHEST_PROTOCOL)
        return data  # type: ignore[no-any-return]


def _run_chunk(parcel: bytes) -> list[tuple[int, Any, Any]]:
    jobs, task, memory = unpacked(parcel)
    numbers = {id(job): number for number, job in enumerate(jobs)}
    engine = ThreadEngine(1, mapped=True, memory=memory)
    return [(numbers[id(job)], result, lost) for job, result, lost in engine.run(jobs, task)]
