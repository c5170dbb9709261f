"""Sketches as data: the counts as a JSON object, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.sketch.codes import Coding
from torchparams.sketch.kernels import Counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.dtypes import DType

VERSION = 1
"""Version of the format of `Sketch.to_json`."""


def form_of(dtype: DType, counted: Counted, *, exact: bool) -> dict[str, Any]:
    """The data of `Sketch.to_json`, with arrays in place of lists: they pickle many times as fast.

    Args:
        dtype: Dtype of the elements.
        counted: Counts; only codes and counts for an exact coding.
        exact: Whether every value has its own code, so that the counts determine the rest.
    """
    form: dict[str, Any] = {
        "sketch": VERSION,
        "dtype": str(dtype),
        "codes": counted.codes,
        "counts": counted.counts,
    }
    if not exact:
        form |= {
            "zeros": counted.zeros,
            "posinf": counted.posinf,
            "neginf": counted.neginf,
            "min": counted.min,
            "max": counted.max,
            "sums": [hex(s) for s in (counted.sum, counted.abs, counted.square)],
        }
    return form


def counted_of(form: Mapping[str, Any]) -> Counted:
    """Counts of a form.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: The form is not that of a sketch.
    """
    coding = Coding.of(form["dtype"])
    codes, counts = np.array(form["codes"], np.uint32), np.array(form["counts"], np.uint64)
    if codes.ndim != 1 or codes.shape != counts.shape:
        raise ValueError("every code needs a count")
    if not counts.all() or (codes[1:] <= codes[:-1]).any():
        raise ValueError("codes must ascend, and counts must not be zero")
    if len(codes) and codes[-1] >= coding.size:
        raise ValueError(f"{codes[-1]} is not a code of {coding.dtype}")
    if coding.exact:
        return Counted(codes, counts)
    number = float if coding.is_float else int
    low, high = (None if form[key] is None else number(form[key]) for key in ("min", "max"))
    zeros, posinf, neginf = (int(form[key]) for key in ("zeros", "posinf", "neginf"))
    total, magnitudes, squares = (int(s, 16) for s in form["sums"])
    return Counted(codes, counts, zeros, posinf, neginf, low, high, total, magnitudes, squares)
