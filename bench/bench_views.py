"""Claim: a linear merge is measured in ≤ 0.7 × the time of writing and measuring it; two threads are faster than one.

    python bench/bench_views.py [ROUNDS] [MEGABYTES]

First the statistics of a merge of two files that is not written, beside those of the file that it is written to. The
writing does not wait for the disk. Then each way to merge, measured and written, on one thread and on two. All of it
runs in this process, by turns, page cache warm. The statistics of the view and of the file are compared.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torchparams as tp
from common import DATA, llama_file, machine, paired
from torchparams.edit.write import execute
from torchparams.engines import ThreadEngine
from torchparams.io import system

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchparams.measure.stats import Stats

SHARE = "model.layers.{0..3}.mlp.**"
"""The tensors that each method is measured with: twelve of 11.5 million elements."""

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"weights": 0.3},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "dare": {"density": 0.2},
    "dare_ties": {"density": 0.2},
}


def timed(work: Callable[[], object]) -> Callable[[], tuple[float, int]]:
    """Gives the seconds that something takes, and no memory."""

    def run() -> tuple[float, int]:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun, 0

    return run


def plan(method: str, sources: list[Path], path: Path | None, selector: str | None) -> tp.Plan:
    """A merge of two files, or of what the second has added to the first."""
    between = method in ("linear", "slerp")
    given, base = (sources, None) if between else (sources[1:], sources[0])
    return tp.merge(given, path, selector, method=method, base=base, overwrite=True, **METHODS[method])


def measured(method: str, sources: list[Path], threads: int) -> Stats:
    """The statistics of a part of a merge that is not written."""
    return tp.stats(plan(method, sources, None, SHARE), engine=ThreadEngine(threads))


def rewritten(target: Path, method: str, sources: list[Path], threads: int) -> object:
    """Writes a part of a merge."""
    execute._MOST_THREADS = threads
    return plan(method, sources, target, SHARE).run()


def main(rounds: int, megabytes: int) -> None:
    """Measure and print."""
    system.sync = lambda fd: None  # the disk is not what is measured
    system.begin_writeback = lambda fd, offset, count: None
    sources = [llama_file(megabytes=megabytes, seed=seed) for seed in (0, 1)]
    print(f"two files of {sources[0].stat().st_size / 1e6:,.0f} MB, {rounds} rounds, {machine()}")
    with tempfile.TemporaryDirectory(dir=DATA) as folder:
        target = Path(folder) / "merged.safetensors"

        def written() -> Stats:
            plan("linear", sources, target, None).run()
            return tp.stats(target)

        def viewed() -> Stats:
            return tp.stats(plan("linear", sources, None, None))

        if written().to_json()["rows"] != viewed().to_json()["rows"]:
            raise SystemExit("the view and the file have other statistics")
        view, file = (pair[0] for pair in paired({"view": timed(viewed), "file": timed(written)}, rounds).values())
        print(
            f"statistics of a merge: {view * 1e3:,.0f} ms as a view, {file * 1e3:,.0f} ms by a file: {view / file:.2f}"
        )

        print("\nseconds on two threads, and their ratio to those on one")
        for method in METHODS:
            for name, work in (("measured", measured), ("written", partial(rewritten, target))):
                runs = {str(threads): timed(partial(work, method, sources, threads)) for threads in (1, 2)}
                one, two = (seconds for seconds, _ in paired(runs, rounds).values())
                print(f"{method:<16} {name:<9} {two:>6.2f} s   {two / one:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, int(sys.argv[2]) if len(sys.argv) > 2 else 805)
