"""Data of the page: measurements as JSON with columns of numbers."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.dtypes import BY_SPELLING
from torchparams.measure.tensor_stats import BINS
from torchparams.page.columns import counts, packed, reals, words
from torchparams.page.measured import FINE_BINS, REACH

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.info import ParameterInfo
    from torchparams.measure.diff import Diff
    from torchparams.measure.spectra_tree import Spectrum
    from torchparams.page.measuring import Target
    from torchparams.page.pictures import Picture

    Array = np.ndarray[Any, Any]

VERSION = 1
"""Version of the format."""

_REALS = ("mean", "std", "min", "max", "l1", "l2", "linf", "entropy")
_COUNTS = ("values", "zeros", "nan", "posinf", "neginf", "distinct")
_DIFF = ("share", "max", "relative", "cosine", "sqnr")


def listing(infos: Sequence[ParameterInfo]) -> dict[str, Any]:
    """Columns of the infos of tensors."""
    return {
        "names": [info.name for info in infos],
        "shape": words([info.shape for info in infos]),
        "dtype": words([str(info.dtype) for info in infos]),
        "numel": counts([info.numel for info in infos]),
        "nbytes": counts([info.nbytes for info in infos]),
        "kind": words([info.kind for info in infos]),
        "device": words([info.device for info in infos]),
        "grad": words([info.requires_grad for info in infos]),
        "encoding": words([info.encoding for info in infos]),
        "module": words([info.module for info in infos]),
        "bases": words([info.bases for info in infos]),
        "layout": words([info.layout for info in infos]),
        "sharded": counts([info.sharding is not None and info.sharding.is_split for info in infos]),
        "file": words([info.location.file if info.location else None for info in infos]),
        "aliases": {str(i): list(info.aliases) for i, info in enumerate(infos) if info.aliases},
        "raw": {str(i): info.raw_name for i, info in enumerate(infos) if info.raw_name and info.raw_name != info.name},
    }


def statistics(target: Target, names: Sequence[str | None]) -> dict[str, Any]:
    """Columns of statistics in the order of `names`; NaN and 0 for tensors that are missing or unread."""
    rows = [None if name is None else target.rows.get(name) for name in names]
    found: dict[str, Any] = {
        "read": counts([row is not None for row in rows]),
        "exact": counts([row is not None and row.exact for row in rows]),
    }
    for key in _REALS:
        found[key] = reals([math.nan if row is None else float(getattr(row, key)) for row in rows])
    for key in _COUNTS:
        found[key] = counts([0 if row is None else getattr(row, key) for row in rows])
    found["saturated"] = counts([0 if row is None else row.saturated or 0 for row in rows])
    found["kurtosis"] = reals([math.nan if name is None else target.kurtosis.get(name, math.nan) for name in names])
    if target.gradients:
        found["gradient"] = reals([target.gradients.get(name or "", math.nan) for name in names])
    width = len(target.quantiles)
    table = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        if row is not None:
            table[i] = [value for _, value in row.quantiles]
    found["quantiles"] = {"at": list(target.quantiles), "values": reals(table.ravel())}
    found["histogram"] = _histograms(target, names)
    found["octaves"] = _octaves(target, names) if target.detailed else None
    return found


def _histograms(target: Target, names: Sequence[str | None]) -> dict[str, Any]:
    bins = FINE_BINS if target.detailed else BINS
    ends, beyond = np.full((2, len(names)), np.nan), np.zeros((2, len(names)), np.uint64)
    table = np.zeros((len(names), bins), np.uint64)
    for i, name in enumerate(names):
        if name is None or name not in target.rows:
            continue
        if target.detailed:
            shape = target.shapes[name]
            ends[:, i], beyond[:, i], table[i] = (shape.low, shape.high), (shape.below, shape.above), shape.counts
        else:
            row = target.rows[name]
            ends[:, i], table[i] = (row.low, row.high), row.histogram
    return {
        "bins": bins,
        "reach": REACH if target.detailed else 3,
        "clipped": not target.detailed,  # whether the outermost intervals include all values beyond
        "low": reals(ends[0]),
        "high": reals(ends[1]),
        "below": counts(beyond[0]),
        "above": counts(beyond[1]),
        "counts": counts(table.ravel()),
    }


def _octaves(target: Target, names: Sequence[str | None]) -> dict[str, Any]:
    """Counts by power of two: `lengths[i]` counts for tensor i, from exponent `first[i]` on."""
    shapes = [None if name is None else target.shapes.get(name) for name in names]
    some = [np.zeros(0, np.uint64)]
    return {
        "first": packed(np.array([0 if shape is None else shape.octaves.first for shape in shapes], np.int16)),
        "lengths": counts([0 if shape is None else len(shape.octaves.negative) for shape in shapes]),
        "negative": counts(np.concatenate([*some, *(shape.octaves.negative for shape in shapes if shape)])),
        "positive": counts(np.concatenate([*some, *(shape.octaves.positive for shape in shapes if shape)])),
    }


def difference(diff: Diff) -> dict[str, Any]:
    """Columns of a difference, in the order of its rows."""
    rows = diff.rows
    found: dict[str, Any] = {"status": words([row.status for row in rows])}
    for key in _DIFF:
        found[key] = reals([float(getattr(row, key)) for row in rows])
    found["changed"] = counts([row.changed for row in rows])
    found["dtype"] = words([None if row.b is None else str(row.b.dtype) for row in rows])
    found["encoding"] = words([None if row.b is None else row.b.encoding for row in rows])
    found["shape"] = words([None if row.b is None else row.b.shape for row in rows])
    found["nbytes"] = counts([0 if row.b is None else row.b.nbytes for row in rows])
    found["reasons"] = {str(i): row.reason for i, row in enumerate(rows) if row.reason}
    return found


def pictures(found: Mapping[str, Picture], places: Mapping[str, int]) -> dict[str, Any]:
    """Pictures by the index of the tensor."""
    return {
        str(places[name]): {
            "rows": each.rows,
            "columns": each.columns,
            "down": each.down,
            "across": each.across,
            "min": reals(each.least),
            "max": reals(each.greatest),
            "rms": reals(each.rms),
            "nonfinite": counts(each.nonfinite),
        }
        for name, each in found.items()
    }


def spectra(found: Iterable[Spectrum], places: Mapping[str, int]) -> dict[str, Any]:
    """Singular values and their figures by the index of the tensor; matrices of stacks are left out."""
    return {
        str(places[row.name]): {
            "values": None if row.singular_values is None else reals(row.singular_values),
            **{key: _number(getattr(row, key)) for key in _FIGURES},
            "is_bound": row.is_bound,
            "errors": {key: _number(error) for key, error in row.errors.items()},
        }
        for row in found
        if row.name in places
    }


_FIGURES = (
    *("spectral_norm", "nuclear_norm", "stable_rank", "effective_rank", "rank", "condition"),
    *("tail_exponent", "tail_distance", "edge", "spikes"),
)


def _number(value: float | None) -> float | None:
    """The number, or None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def dtypes() -> dict[str, str]:
    """Spellings of dtypes → name, for the selector language in the page."""
    return {spelling: str(dtype) for spelling, dtype in BY_SPELLING.items()}


def metadata(found: Mapping[str, Any], most: int = 200) -> list[list[str]]:
    """Metadata of a source as pairs of text; long values are cut."""
    pairs = []
    for key, value in list(found.items())[:most]:
        text = value if isinstance(value, str) else json.dumps(value)
        pairs.append([str(key), text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"])
    return pairs


_LONGEST = 2000
