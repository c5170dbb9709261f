"""Batches of small jobs: rows that are close together in a file, or in live memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.expressions.base import Stored
from torchparams.io.live import address_of

if TYPE_CHECKING:
    from torchparams.engines.base import Job
    from torchparams.info import Location

GAP = 4096
"""Maximum gap between two tensors, in bytes, that is read along instead of skipped."""

_MOST = 1024  # keeps the threads evenly busy, and progress visible


class Together:
    """Jobs of one row each, in file order.

    Args:
        most: Maximum bytes of a file per read.

    Attributes:
        jobs: Jobs in the batch.
        file: File of all rows; None for live memory.
        places: Byte range of each row.
        start, stop: Byte range of the batch.
    """

    __slots__ = ("_most", "file", "jobs", "places", "start", "stop")

    def __init__(self, most: int) -> None:
        self._most = most
        self.jobs: list[Job] = []
        self.places: list[Location] = []
        self.file: str | None = None
        self.start = self.stop = 0

    def add(self, job: Job, place: Location | None) -> bool:
        """Add a job if its row is near and the batch is not full; returns whether it was added. The first always is."""
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
        """Jobs with addresses and the objects that keep the memory alive, and jobs whose rows have no address."""
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
