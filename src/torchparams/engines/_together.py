"""Small jobs that a task takes at once: of rows that lie together in a file, or in live memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.expressions.base import Stored
from torchparams.io.live import address_of

if TYPE_CHECKING:
    from torchparams.engines.base import Job
    from torchparams.info import Location

GAP = 4096
"""Bytes between two tensors that are rather read than skipped."""

_MOST = 1024  # so that threads have an even share, and progress is seen


class Together:
    """Jobs of one row each, in the order of their places.

    Args:
        most: Bytes of a file that are read at once.

    Attributes:
        jobs: The jobs.
        file: The file that all rows lie in; None for live memory.
        places: Where each lies there.
        start, stop: The range of the file.
    """

    __slots__ = ("_most", "file", "jobs", "places", "start", "stop")

    def __init__(self, most: int) -> None:
        self._most = most
        self.jobs: list[Job] = []
        self.places: list[Location] = []
        self.file: str | None = None
        self.start = self.stop = 0

    def add(self, job: Job, place: Location | None) -> bool:
        """Take a job, unless its row lies elsewhere, or there are enough; the first is always taken."""
        if not self.jobs:
            if place is not None:
                self.file, self.start, self.stop = place.file, place.start, place.stop
        elif len(self.jobs) == _MOST or self.file != (None if place is None else place.file):
            return False
        elif place is not None:
            if not 0 <= place.start - self.start <= self.stop - self.start + GAP:
                return False
            if place.stop - self.start > self._most:
                return False
            self.stop = max(self.stop, place.stop)
        self.jobs.append(job)
        if place is not None:
            self.places.append(place)
        return True

    def in_memory(self) -> tuple[list[Job], list[int], list[Any], list[Job]]:
        """Jobs with the address of each, what keeps the memory there, and the jobs whose rows have none."""
        jobs, starts, keep, left = [], [], [], []
        for job in self.jobs:
            (row,) = job.rows
            assert isinstance(row, Stored)
            value = row.source.value(row.info.name) if row.held is None else row.held
            address = address_of(value, row.dtype, row.numel)
            if address is None:
                left.append(job)
            else:
                jobs.append(job)
                starts.append(address)
                keep.append(value)
        return jobs, starts, keep, left
