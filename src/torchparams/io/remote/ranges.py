"""Byte ranges to read: merged if they are close, and split into requests of similar size."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Range = tuple[int, int]

PIECE = 4 << 20
"""Maximum bytes per request. A merged range of 4 MiB or more is split into requests of at least 2 MiB."""

GAP = 32 << 10
"""Maximum gap between two ranges that is transferred too, because a separate request takes longer."""


def merged(ranges: Iterable[Range], gap: int = GAP) -> list[Range]:
    """Sort ranges `[start, stop)`, and join those that overlap or are at most `gap` bytes apart.

    >>> merged([(40, 50), (0, 10), (12, 20), (5, 6)], gap=2)
    [(0, 20), (40, 50)]
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if found and start - found[-1][1] <= gap:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def cut(start: int, stop: int, most: int = PIECE) -> Iterator[Range]:
    """Split a range into the fewest parts of at most `most` bytes, of similar size.

    >>> list(cut(0, 10, 4))
    [(0, 3), (3, 6), (6, 10)]
    """
    size = stop - start
    count = -(-size // most)
    for number in range(count):
        yield start + size * number // count, start + size * (number + 1) // count


class Ranges:
    """Requests for all ranges of a file that a run will read, in file order.

    Args:
        ranges: Byte ranges `[start, stop)`, in any order.

    Attributes:
        asked: For each piece, whether somebody has asked for it: nobody does so ahead for a second time.

    >>> planned = Ranges([(0, 100), (120, 300)])
    >>> list(planned), planned.at(150), planned.at(300), planned.wanted(0)
    ([(0, 300)], 0, None, 280)
    """

    def __init__(self, ranges: Iterable[Range]) -> None:
        exact = merged(ranges, 0)
        self._pieces = [piece for start, stop in merged(exact) for piece in cut(start, stop)]
        self._starts = [start for start, _ in self._pieces]
        self.asked = bytearray(len(self._pieces))
        self._wanted = [0] * len(self._pieces)
        number = 0
        for start, stop in exact:
            while start < stop:
                while self._pieces[number][1] <= start:
                    number += 1
                end = min(stop, self._pieces[number][1])
                self._wanted[number] += end - start
                start = end

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: int) -> Range:
        return self._pieces[number]

    def wanted(self, number: int) -> int:
        """How many bytes of a piece will be read: not those between two ranges."""
        return self._wanted[number]

    def at(self, offset: int) -> int | None:
        """Index of the piece that contains an offset, or None."""
        number = bisect_right(self._starts, offset) - 1
        return number if number >= 0 and offset < self._pieces[number][1] else None

    def after(self, offset: int) -> int | None:
        """Start of the first piece after an offset, or None."""
        number = bisect_right(self._starts, offset)
        return self._starts[number] if number < len(self._starts) else None
