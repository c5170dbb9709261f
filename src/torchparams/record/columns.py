"""Columns of a record: from the numbers of tensors to what is written and watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torchparams.record.measured import Measured

    Array = np.ndarray[Any, Any]


class Lists(NamedTuple):
    """A column of lists.

    Attributes:
        offsets: Start of each list in `values`, and the end of the last; shape (n + 1,).
        values: The elements of all lists.
    """

    offsets: Array
    values: Array


def numbers_of(
    weight: Measured, gradient: Measured, update: Array | None, due: frozenset[str], dead: Array | None = None
) -> dict[str, Array]:
    """Numbers by column, one row per parameter; NaN if there is none.

    Args:
        weight: Numbers of the parameters.
        gradient: Numbers of their gradients.
        update: Norms of the updates, and of the parameters before; shape (n, 2). None if they were not measured.
        due: Quantities that were measured.
        dead: Number of dead rows; None if they were not counted.
    """
    columns: dict[str, Array] = {}
    with np.errstate(all="ignore"):
        if "weights" in due:
            finite = (weight.counts > weight.nonfinite) | (weight.counts == 0)
            columns["weight_norm"] = np.where(finite, weight.norms, np.nan)
            columns["mean"] = weight.means
            columns["std"] = weight.deviations
            columns["max_abs"] = np.where(finite, weight.most, np.nan)
            columns["zeros"] = weight.zeros / np.maximum(weight.counts, 1)
            columns["nonfinite"] = weight.nonfinite.astype(np.float64)
        if "gradients" in due:
            known = gradient.counts > 0
            columns["grad_norm"] = np.where(gradient.counts > gradient.nonfinite, gradient.norms, np.nan)
            columns["grad_nonfinite"] = np.where(known, gradient.nonfinite, np.nan)
        if update is not None:
            columns["update_norm"] = update[:, 0]
            columns["update_ratio"] = np.where(update[:, 1] > 0, update[:, 0] / update[:, 1], np.nan)
    if dead is not None:
        columns["dead_rows"] = dead
    return columns


def histograms_of(weight: Measured, due: frozenset[str]) -> dict[str, Any]:
    """Columns of the histograms: the first exponent of each, and its counts without the zeros around them."""
    if "histograms" not in due or weight.exponents is None:
        return {}
    bins = weight.exponents[:, :-1].copy()  # the last bin counts non-finite elements
    bins[:, 0] -= weight.zeros
    used = bins != 0
    some = used.any(axis=1)
    first = used.argmax(axis=1)
    last = bins.shape[1] - used[:, ::-1].argmax(axis=1)  # exclusive
    at = np.arange(bins.shape[1])
    inside = some[:, None] & (at >= first[:, None]) & (at < last[:, None])
    offsets = np.concatenate([[0], np.cumsum(np.where(some, last - first, 0))])
    return {"exponent": np.where(some, first - 127.0, np.nan), "counts": Lists(offsets.astype(np.int32), bins[inside])}
