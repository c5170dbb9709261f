"""Flags: tensors worth a look, each with a reason.

The rules give no flags to freshly initialised or published models. Vectors (all dimensions but one have size 1) may be
zero or constant, because biases and norm gains are so before training. They are flagged only if their siblings are
different.

**Siblings** are tensors with the same role: equal shape, and names that differ only in components that are numbers. A
scale is compared with its 8 nearest siblings, not with all: some schemes scale with depth. A scale is flagged if its
log2 differs from their median by at least 2 (a factor of 4), and by more than 6 robust standard deviations of such
differences: 1.4826 times their median absolute deviation (Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers,
with a threshold of 3.5).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.errors import OptionError
from torchparams.measure.columns import Rows
from torchparams.render.tree import human_count, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torchparams.measure.tensor_stats import TensorStats

KINDS = ("non-finite", "zero", "constant", "saturated", "scale")
"""Kinds of flags."""

SIBLINGS = 4
"""Minimum number of siblings for a comparison with siblings."""

NEAREST = 8
"""Number of siblings whose median a scale is compared with."""

OCTAVES = 2.0
"""Minimum difference of log2 of a scale."""

DEVIATIONS = 6.0
"""Minimum difference in robust standard deviations."""

_LEAST_DEVIATION = 0.1  # octaves; fresh layers differ only by chance
_SATURATED_SHARE = 0.02  # float8 scaled per block of 128 has about 1 % of its values at the maximum


@dataclass(frozen=True, slots=True)
class Flag:
    """Flag of one tensor.

    Attributes:
        name: Canonical name of the tensor.
        kind: One of `KINDS`.
        reason: Reason in words.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> tp.stats({"w": np.array([[1.0, np.nan], [np.inf, 2.0]], np.float16)}).flags
    (Flag(name='w', kind='non-finite', reason='1 NaN and 1 +Inf among 4 values'),)
    """

    name: str
    kind: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The flag as JSON data."""
        return {"name": self.name, "kind": self.kind, "reason": self.reason}


def flags_of(rows: Sequence[TensorStats]) -> list[Flag]:
    """Flags of tensors, in order, most serious first for each; linear in the number of tensors.

    For `Rows` in columns, only rows that may have a flag are created.
    """
    table = rows if isinstance(rows, Rows) else Rows(rows)
    std, odd = table.scan()
    # Shapes as text: a hostile file could choose numbers whose hashes collide.
    roles: dict[tuple[str, str], list[int]] = {}
    vectors: set[tuple[str, str]] = set()
    for i, (name, shape, dtype, numel) in enumerate(table.heads() if odd.any() or _far_apart(std) else ()):
        if shape is not None and numel and dtype is not None and dtype.kind in _FLOATS:
            key = role_of(name), str(shape)
            roles.setdefault(key, []).append(i)
            if len(roles[key]) == 1 and _is_vector(shape):
                vectors.add(key)
    found: dict[int, list[Flag]] = {}
    alone = np.flatnonzero(odd).tolist()
    for i, row in zip(alone, table.some(alone), strict=True):
        found[i] = list(_alone(row))
    for key, which in roles.items():
        is_vector = key in vectors
        if len(which) > SIBLINGS and (odd[which].any() if is_vector else _far_apart(std[which])):
            siblings = table.some(which)
            places = {row.name: i for row, i in zip(siblings, which, strict=True)}
            for flag in _vectors(key[0], siblings) if is_vector else _scales(key[0], siblings):
                found.setdefault(places[flag.name], []).append(flag)
    return [flag for i in sorted(found) for flag in found[i]]


def _far_apart(scales: np.ndarray[Any, Any]) -> bool:
    """Cheap test, before `_scales`, whether one scale may be far enough from the others."""
    scales = scales[(scales > 0) & (scales < math.inf)]
    return len(scales) > SIBLINGS and math.log2(scales.max()) - math.log2(scales.min()) >= OCTAVES - 0.001


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def role_of(name: str) -> str:
    """Name with `*` for each component that is a number.

    >>> role_of("layers.3.experts.12.w1.weight")
    'layers.*.experts.*.w1.weight'
    """
    return _NUMBER.sub("*", name)


def place_of(name: str) -> list[tuple[int, str]]:
    """Sort key for names of one role, by the numbers in them.

    >>> sorted(["h.10.w", "h.9.w"], key=place_of)
    ['h.9.w', 'h.10.w']
    """
    return [(len(part), part) for part in name.split(".") if part.isdecimal()]


_FLOATS = ("float", "complex")


def _is_vector(shape: tuple[int, ...] | None) -> bool:
    return sum(size > 1 for size in shape or ()) <= 1


# --- single tensors ------------------------------------------------------------------------------


def _alone(row: TensorStats) -> Iterator[Flag]:
    if row.dtype is None or row.dtype.kind not in _FLOATS:
        return
    values = row.values
    # Attention masks hold only 0 and -Inf, or 0 and the lowest value.
    if row.nonfinite and not (row.zeros and row.zeros + row.neginf == values):
        kinds = ((row.nan, "NaN"), (row.posinf, "+Inf"), (row.neginf, "-Inf"))
        what = " and ".join(f"{count:,} {name}" for count, name in kinds if count)
        yield Flag(row.name, "non-finite", f"{what} among {plural(values, 'value')}")
    if values > 1 and not _is_vector(row.shape) and not row.nonfinite:
        if row.zeros == values:
            yield Flag(row.name, "zero", f"all {values:,} values are 0")
        elif row.min == row.max:
            yield Flag(row.name, "constant", f"all {values:,} values are {row.min:g}")
    if row.saturated and row.dtype.bits >= 8 and not (row.zeros and row.zeros + row.saturated == values):
        share = row.saturated / values
        # Scaled float8 tensors reach their maximum by design; a 16-bit float at its maximum was clipped.
        if share >= _SATURATED_SHARE or row.dtype.bits == 16:
            yield Flag(
                row.name,
                "saturated",
                f"{row.saturated:,} of {values:,} values ({_percent(share)}) are ±{row.linf:g}, "
                f"the largest value of {row.dtype}",
            )


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else f"{share:.0e}".replace("e-0", "e-")


# --- comparison with siblings --------------------------------------------------------------------


def _vectors(role: str, siblings: Sequence[TensorStats]) -> Iterator[Flag]:
    """Constant vectors whose siblings are not constant."""
    if siblings[0].numel < 2:
        return
    constant = [row for row in siblings if row.min == row.max and not row.nonfinite]
    if len(constant) * 4 > len(siblings):
        return
    for row in constant:
        kind, what = ("zero", "0") if row.zeros == row.values else ("constant", f"{row.min:g}")
        others = len(siblings) - len(constant)
        yield Flag(
            row.name, kind, f"all {row.values:,} values are {what}; of {others} siblings {role} none is constant"
        )


def _scales(role: str, siblings: Sequence[TensorStats]) -> Iterator[Flag]:
    """Standard deviations far from those of the nearest siblings."""
    # File order is often alphabetical: 1, 10, 11, 2.
    rows = sorted((row for row in siblings if 0 < row.std < math.inf), key=lambda row: place_of(row.name))
    if len(rows) <= SIBLINGS:
        return
    logs = [math.log2(row.std) for row in rows]
    differences = []
    for i, log in enumerate(logs):
        first = max(0, min(i - NEAREST // 2, len(logs) - 1 - NEAREST))
        near = logs[first : first + NEAREST + 1]
        near.remove(log)
        differences.append(log - median(near))
    deviation = max(1.4826 * median(map(abs, differences)), _LEAST_DEVIATION)
    for row, difference in zip(rows, differences, strict=True):
        if abs(difference) >= max(OCTAVES, DEVIATIONS * deviation):
            usual = row.std / 2**difference
            factor = 2 ** abs(difference)
            times = f"{factor:.1f}" if factor < 100 else human_count(round(factor))
            how = f"{times} times" if difference > 0 else f"1/{times} of"
            count = min(NEAREST, len(rows) - 1)
            yield Flag(
                row.name,
                "scale",
                f"its std {row.std:.3g} is {how} the {usual:.3g} of its {count} nearest siblings {role}",
            )


def median(values: Iterable[float]) -> float:
    """Median of numbers; the module `statistics` is slow to import.

    >>> median([3, 1, 2]), median([4, 1, 2, 3])
    (2, 2.5)
    """
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def kinds_of(flags: Iterable[Flag]) -> dict[str, int]:
    """Number of flags of each kind."""
    found: dict[str, int] = {}
    for flag in flags:
        found[flag.kind] = found.get(flag.kind, 0) + 1
    return found


def kinds_in(text: str) -> tuple[str, ...]:
    """Parse kinds of flags from comma-separated text.

    Raises:
        OptionError: A kind is not in `KINDS`.

    >>> kinds_in("non-finite, zero")
    ('non-finite', 'zero')
    """
    found = tuple(part.strip() for part in text.split(","))
    for kind in found:
        if kind not in KINDS:
            raise OptionError(f"unknown kind of flag {kind!r}", exists=f"kinds are {', '.join(KINDS)}")
    return found
