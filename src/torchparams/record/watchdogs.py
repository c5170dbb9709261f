"""Watchdogs: the checks of a recorder, each with an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Array = np.ndarray[Any, Any]

EXPLODING = 0.3
"""Update-to-weight ratio above which an update counts as exploding."""

TIMES = 100.0
"""Factor to the median of earlier ratios at which an update counts as exploding, or its inverse as vanishing."""

HISTORY = 5
"""Minimum number of earlier ratios for a median."""

YOUNG = 20
"""Number of steps in which a parameter that started at zero may change by a large part of its norm."""


@dataclass(frozen=True, slots=True)
class RecordFinding:
    """Finding of a watchdog.

    Attributes:
        step: The step.
        rule: Name of the watchdog.
        name: The parameter.
        value: The number that triggered it.
        message: One sentence.
    """

    step: int
    rule: str
    name: str
    value: float
    message: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON data."""
        return {
            "step": self.step,
            "rule": self.rule,
            "name": self.name,
            "value": self.value if np.isfinite(self.value) else str(self.value),
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """Input of a watchdog: the numbers of one record by column, with one row per parameter.

    Attributes:
        step: The step.
        names: The parameters.
        trainable: Whether each has `requires_grad`.
        columns: Values by column of the record; see `store.TABLES`. Columns may be missing, and values NaN. An infinite
            `grad_nonfinite` is an unknown number.
        before: Latest earlier values; empty for the first record.
        ratios: Earlier update-to-weight ratios of each parameter, oldest first, NaN if there were fewer; shape (n, 9).
        young: Whether each was zero less than `YOUNG` steps ago.
        largest: Largest weight norm of each parameter in earlier records; NaN if there is none.
        single: Whether updates are those of one step, rather than of all since the previous checkpoint.
    """

    step: int
    names: Sequence[str]
    trainable: Array
    columns: Mapping[str, Array]
    before: Mapping[str, Array]
    ratios: Array
    young: Array
    largest: Array
    single: bool = True

    def found(self, rule: str, places: Array, value: Array, message: Callable[[float], str]) -> Iterator[RecordFinding]:
        """Yield a finding for each marked parameter."""
        for i in np.flatnonzero(places).tolist():
            number = float(value[i])
            yield RecordFinding(self.step, rule, self.names[i], number, message(number))


@dataclass(frozen=True, slots=True)
class Watchdog:
    """A check that a recorder runs on each record.

    Attributes:
        name: Its name.
        about: What it finds, and why it matters.
        look: Callable that yields the findings of one record; each parameter is reported once.
        example: Columns of two records of one parameter; the second triggers a finding.
    """

    name: str
    about: str
    look: Callable[[Seen], Iterator[RecordFinding]]
    example: tuple[Mapping[str, float], Mapping[str, float]]


def _column(seen: Seen, name: str) -> Array:
    found = seen.columns.get(name)
    return np.zeros(len(seen.names)) if found is None else np.nan_to_num(found, nan=0.0, posinf=np.inf)


def _odd(count: float) -> str:
    if not np.isfinite(count):
        return "elements that are not finite"
    return f"{plural(int(count), 'element')} that {'is' if count == 1 else 'are'} not finite"


def _gradients(seen: Seen) -> Iterator[RecordFinding]:
    odd = _column(seen, "grad_nonfinite")
    value = np.where(np.isinf(odd), np.nan, odd)
    yield from seen.found("nonfinite-gradient", odd > 0, value, lambda count: f"the gradient has {_odd(count)}")


def _weights(seen: Seen) -> Iterator[RecordFinding]:
    odd = _column(seen, "nonfinite")
    yield from seen.found("nonfinite-weight", odd > 0, odd, lambda count: f"the parameter has {_odd(count)}")


def _exploding(seen: Seen) -> Iterator[RecordFinding]:
    ratio, usual = _column(seen, "update_ratio"), medians(seen.ratios, HISTORY)
    with np.errstate(invalid="ignore"):
        # A parameter that starts at zero, such as a bias, changes by its whole norm at first.
        jumped = (ratio > TIMES * usual) & (ratio > EXPLODING / 10)
        # A parameter that passes near zero changes by a large part of a small norm.
        small = _column(seen, "update_norm") <= EXPLODING * seen.largest if "update_norm" in seen.columns else False
        places = seen.trainable & (((ratio > EXPLODING) & ~seen.young & ~np.array(small) & seen.single) | jumped)
    what = "one step changed the parameter" if seen.single else "it changed since the previous checkpoint"
    yield from seen.found("exploding-update", places, ratio, lambda value: f"{what} by {value:.3g} times its norm")


def _vanishing(seen: Seen) -> Iterator[RecordFinding]:
    if "update_ratio" not in seen.columns:
        return
    ratio = _column(seen, "update_ratio")
    # One small step is an accident: three in a row are not.
    usual = medians(seen.ratios[:, :-2], HISTORY)
    with np.errstate(invalid="ignore"):
        small = np.maximum(ratio, seen.ratios[:, -2:].max(axis=1)) < usual / TIMES
        places = seen.trainable & (_column(seen, "weight_norm") > 0) & small
    yield from seen.found(
        "vanishing-update",
        places,
        ratio,
        lambda value: f"it changes by {value:.3g} times its norm, a hundredth of before or less",
    )


def medians(ratios: Array, least: int) -> Array:
    """Median of each row, whose first values may be NaN; NaN if fewer than `least` values are known.

    >>> medians(np.array([[np.nan, 1.0, 2.0, 9.0], [np.nan, np.nan, np.nan, 1.0]]), 3).tolist()
    [2.0, nan]
    """
    ordered = np.sort(ratios, axis=1)  # NaN last
    known = (~np.isnan(ratios)).sum(axis=1)
    rows, last = np.arange(len(ratios)), np.maximum(known - 1, 0)
    found = (ordered[rows, last // 2] + ordered[rows, (last + 1) // 2]) / 2
    return np.where(known >= least, found, np.nan)


def _dead(seen: Seen) -> Iterator[RecordFinding]:
    dead, before = _column(seen, "dead_rows"), seen.before.get("dead_rows")
    grown = dead > (0 if before is None else np.nan_to_num(before))
    yield from seen.found(
        "dead-rows",
        seen.trainable & grown,
        dead,
        lambda count: f"{plural(int(count), 'row')} {'has' if count == 1 else 'have'} no gradient: dead units",
    )


def _moving(seen: Seen) -> Iterator[RecordFinding]:
    moved = _column(seen, "update_norm") > 0
    for key in ("weight_norm", "mean", "max_abs", "zeros"):
        now, before = seen.columns.get(key), seen.before.get(key)
        if now is not None and before is not None:
            moved |= (now != before) & ~np.isnan(now) & ~np.isnan(before)
    yield from seen.found(
        "frozen-moves",
        moved & ~seen.trainable,
        _column(seen, "weight_norm"),
        lambda _: "frozen, but its values changed",
    )


WATCHDOGS: tuple[Watchdog, ...] = (
    Watchdog(
        "nonfinite-gradient",
        "A gradient has NaN or infinite elements. With mixed precision a few such steps are usual: the scaler skips "
        "them.",
        _gradients,
        ({"grad_nonfinite": 0}, {"grad_nonfinite": 3}),
    ),
    Watchdog(
        "nonfinite-weight",
        "A parameter has NaN or infinite elements: all later results are invalid.",
        _weights,
        ({"nonfinite": 0}, {"nonfinite": 2}),
    ),
    Watchdog(
        "exploding-update",
        f"One step changed a parameter by more than {EXPLODING:.0%} of its norm, or {TIMES:.0f} times as much as "
        "before: the learning rate is too high.",
        _exploding,
        ({"update_ratio": 0.001, "weight_norm": 1}, {"update_ratio": 2, "weight_norm": 1}),
    ),
    Watchdog(
        "vanishing-update",
        f"Three records in a row change a parameter {TIMES:.0f} times less than before: its gradient vanished, or its "
        "learning rate.",
        _vanishing,
        ({"update_ratio": 0.001, "weight_norm": 1}, {"update_ratio": 1e-9, "weight_norm": 1}),
    ),
    Watchdog(
        "dead-rows",
        "Rows of a weight (output units) have a gradient of exactly zero, and more of them than before: units behind a "
        "ReLU that no input activates any more.",
        _dead,
        ({"dead_rows": 0}, {"dead_rows": 12}),
    ),
    Watchdog(
        "frozen-moves",
        "A parameter without `requires_grad`, or a buffer that is frozen, changed: weight decay, momentum, a running "
        "statistic, or an optimizer that was made before the freeze.",
        _moving,
        ({"weight_norm": 1, "trainable": 0}, {"weight_norm": 2, "trainable": 0}),
    ),
)
"""All watchdogs, in the order in which they run."""
