"""Inputs of the test suites, and a check that sources do no more than requested."""

from __future__ import annotations

import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torchparams.testing._reference import Array, sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BIG = 1 << 20
"""Bytes of a tensor that must not be read by accident."""

SLACK = 1 << 18
"""Maximum bytes read or allocated for listing, printing, or reading a small tensor."""


def few() -> dict[str, Array]:
    """Tensors of a few kinds, with and without dots in their names."""
    return {
        "fc.weight": sample("float32", (4, 3), 1),
        "fc.bias": sample("float32", (4,), 2),
        "encoder.0.weight": sample("float16", (2, 5), 3),
        "scale": sample("float64", (), 4),
        "steps": sample("int64", (1,), 5),
        "mask": sample("bool", (3, 3), 6),
        "none": sample("float32", (0, 3), 7),
    }


def big_between() -> dict[str, Array]:
    """A small tensor between two big ones."""
    return {
        "big1": sample("float32", (BIG // 4,), 1),
        "small": sample("float32", (3, 5), 2),
        "big2": sample("float32", (BIG // 4,), 3),
    }


def folder(parent: Path, name: str) -> Path:
    """A new directory `name` in `parent`."""
    (parent / name).mkdir()
    return parent / name


@contextmanager
def limited(nbytes: int = SLACK) -> Iterator[None]:
    """Fail if the block reads or allocates more than `nbytes`.

    Reads are those through system calls, as counted by Linux. Touching a page of a mapped file is not counted: the
    caller does that.
    """
    before = _bytes_read()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= nbytes, f"{peak} bytes were allocated"
    assert _bytes_read() - before <= nbytes, "more was read than was asked for"


def _bytes_read() -> int:
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return int(file.readline().split()[1])
    except OSError:  # not Linux: only allocations are limited
        return 0
