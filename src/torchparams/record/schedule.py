"""Steps at which a recorder records, and what."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torchparams.errors import OptionError

QUANTITIES = ("weights", "gradients", "updates", "histograms")
"""Quantities to record, each with its own interval."""

LONGEST = 100
"""Default maximum number of steps between two full records."""

SHORTEST = 10
"""Default minimum number of steps between two full records."""

BUDGET = 0.005
"""Default fraction of the run time for full records."""


class Schedule:
    """Which quantities are due at a step.

    Args:
        every: Steps between two records: a number, or a mapping from quantities to numbers, where 0 or a missing key
            means never. None adapts the interval to the cost of a record.

    Attributes:
        first: First step.

    Raises:
        OptionError: `every` has an unknown key, or a value that is not a number of steps.
    """

    def __init__(self, every: int | Mapping[str, int] | None) -> None:
        self._every = None if every is None else _intervals(every)
        self.first = self._next = 0

    def begin(self, step: int) -> None:
        """Set the first step, at which everything is due."""
        self.first = self._next = step

    @property
    def adapts(self) -> bool:
        """Whether the interval depends on the cost of a record."""
        return self._every is None

    def due(self, step: int) -> frozenset[str]:
        """Quantities to record at a step."""
        if self._every is None:
            return frozenset(QUANTITIES) if step >= self._next else frozenset()
        at = step - self.first
        return frozenset(name for name, steps in self._every.items() if at % steps == 0)

    def adapt(self, step: int, seconds: float, period: float | None) -> None:
        """Choose the step of the next full record, if the interval adapts.

        Args:
            step: The step that was recorded.
            seconds: Duration of the record.
            period: Duration of a step without recording; None if it is unknown, or differs between ranks that must
                record together.
        """
        if period is not None:
            wanted = math.ceil(seconds / (BUDGET * period)) if period > 0 else LONGEST
            self._next = step + min(max(wanted, SHORTEST), LONGEST)
        else:
            self._next = step + (LONGEST if step > self.first else SHORTEST)


def _intervals(every: int | Mapping[str, int]) -> dict[str, int]:
    asked = dict(every) if isinstance(every, Mapping) else dict.fromkeys(QUANTITIES, every)
    for name, steps in asked.items():
        if name not in QUANTITIES:
            raise OptionError(f"every has the key {name!r}", exists=f"quantities are {', '.join(QUANTITIES)}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise OptionError(f"every must be a number of steps, not {steps!r}")
    return {name: steps for name, steps in asked.items() if steps}
