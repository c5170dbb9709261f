"""Watch a reader on one broken input: its time, its memory, and which input made it fail."""

from __future__ import annotations

import random
import signal
import tempfile
import tracemalloc
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 20
"""After which an input counts as one that hangs."""


@dataclass
class Trial:
    """One input.

    Attributes:
        note: Text that is added to a failure.
        nbytes: Bytes that may be allocated.
    """

    note: str
    nbytes: int = 0


@contextmanager
def watched(note: str) -> Iterator[Trial]:
    """Fail if the block takes longer than `SECONDS`, or allocates more than it says of its `Trial`."""

    def late(*_: object) -> None:
        raise AssertionError(f"still busy after {SECONDS} seconds")

    trial = Trial(note)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.start()
    try:
        yield trial
        peak = tracemalloc.get_traced_memory()[1]
        assert peak <= trial.nbytes, f"{peak} bytes allocated"
    except BaseException as failure:
        failure.add_note(trial.note)
        raise
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def quiet_folder() -> Iterator[Path]:
    """A folder for the inputs; warnings are ignored."""
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(home)


def draws(count: int, seed: int) -> Iterator[tuple[int, random.Random]]:
    """Number of each input, and its random numbers; equal seeds give equal inputs."""
    for number in range(count):
        yield number, random.Random(f"{seed} {number}")
