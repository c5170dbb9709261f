"""Singular values of matrices, and norms and ranks computed from them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from torchparams.engines.base import Folding, Job, Task, Unread, readable_jobs
from torchparams.engines.by_name import named
from torchparams.engines.distributed import engine_for
from torchparams.errors import LimitExceeded
from torchparams.expressions.operations import Slice
from torchparams.measure import lanczos
from torchparams.measure.numbers import sort_key
from torchparams.measure.singular import Figures, Gram, figures, singular_values
from torchparams.measure.spectra_tree import ROWS_SHOWN, SORT_KEYS, Spectra, Spectrum
from torchparams.parameters import of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchparams.engines.base import Engine, Progress
    from torchparams.expressions.base import Expression
    from torchparams.info import ParameterInfo

EXACT = 4096
"""Largest smaller side of a matrix for which all singular values are computed by default."""


def spectra(
    x: object,
    selector: object = None,
    *,
    exact: int = EXACT,
    stacked: object = None,
    sort: str | None = None,
    limit: int | None = ROWS_SHOWN,
    strict: bool = True,
    engine: Engine | str | None = None,
    progress: Progress | None = None,
) -> Spectra:
    """Compute singular values, norms, ranks and tail exponents of matrices.

    A tensor of shape (m, n) is a matrix. A tensor with more dimensions is treated as the kernel of a convolution, (out,
    in, …), and flattened to (out, in · …). Tensors with fewer dimensions are omitted and counted. Select stacks of
    matrices, of shape (experts, m, n), with `stacked`: each matrix is then one row.

    Singular values are the square roots of the eigenvalues of the float64 Gram matrix. Their relative error is about
    10⁻⁶ down to 10⁻⁵ of the largest; smaller ones are not resolved. A matrix whose smaller side is longer than `exact`
    gets estimates with errors and no singular values; see `Spectrum.errors`.

    Each thread needs memory for a Gram matrix (8 bytes × the smaller side squared), and for the matrix itself if it has
    fewer rows than columns.

    Of sharded parameters, all their ranks make the call: the lowest fetches the elements in messages and computes, and
    every rank gets the result (six collectives; as many for each product with a matrix that is estimated).

    Args:
        x: Model, checkpoint, mapping of tensors, or plan.
        selector: Tensors to measure; None for all.
        exact: Largest smaller side for which all singular values are computed.
        stacked: Selector of tensors with three or more dimensions that are stacks of matrices: the last two dimensions
            are the matrix.
        sort: Column to sort by, with `-` before it for descending order; see `Spectra.sorted`.
        limit: Maximum number of rows to print; None for all.
        strict: Raise if any branch of a selector matches nothing.
        engine: Engine or its name (`ray`); by default, a `ThreadEngine` that maps files.
        progress: Callback with the bytes read so far and in total.

    Raises:
        NoMatch: A branch of a selector matches nothing.
        SelectorError: `sort` is not a column.
        SourceError: The source cannot be read.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> (row,) = tp.spectra({"w": np.diag([3.0, 4.0]).astype(np.float32)})
    >>> row.singular_values, row.condition, row.stable_rank
    ((4.0, 3.0), 1.3333333333333333, 1.5625)
    """
    if sort is not None:
        sort_key(SORT_KEYS, sort)  # before anything is read
    params = of(x)
    if selector is not None:
        params = params.select(selector, strict=strict)
    source = params.source
    infos = params.infos
    stacks = frozenset(params.select(stacked, strict=strict).names) if stacked is not None else frozenset()
    coded = source.coded()
    unread = [Unread(name, coded[name].reason) for name in infos if name in coded and not coded[name].numbers]
    refused = {each.name for each in unread}
    matrices = [info for info in infos.values() if info.ndim is None or info.ndim > 1]
    chosen = [info for info in matrices if info.name not in refused]
    whole, cannot = readable_jobs(source, _floats(chosen, unread))
    unread += cannot
    engine = named(engine) or engine_for(whole)
    small: list[Job] = []
    large: list[Job] = []
    for job in _matrices(whole, stacks):
        if not job.numel:
            unread.append(Unread(job.key, "has no elements"))
        else:
            (small if min(job.rows[0].shape) <= exact else large).append(job)
    found: dict[str, Spectrum] = {}
    # The engine's threads measure one matrix each; threads of the BLAS within each of them would wait for each other.
    with threadpool_limits(1 if len(small) > 1 else None, user_api="blas"):
        for job, result, _ in engine.run(small, SpectraTask(), progress=progress):
            if isinstance(result, Spectrum):
                found[job.key] = result
            else:
                unread.append(result)
    for job in large:
        estimated = _estimate(job, engine)
        if isinstance(estimated, Spectrum):
            found[job.key] = estimated
        else:
            unread.append(estimated)
    order = [job.key for job in _matrices(whole, stacks)]
    made = Spectra(
        label=source.label,
        format=source.format,
        selector=None if params.selector is None else str(params.selector),
        rows=tuple(found[key] for key in order if key in found),
        unread=tuple(unread),
        others=len(infos) - len(matrices),
        limit=limit,
        left_out=params.left_out,
        narrow=params.narrow,
    )
    return made if sort is None else made.sorted(sort)


class Matrix(Slice):
    """A tensor as a matrix: the same elements with two dimensions.

    Args:
        x: The tensor.
        start, stop: Range of its first dimension that is the matrix.
        shape: Rows and columns.
    """

    def __init__(self, x: Expression, start: int, stop: int, shape: tuple[int, int]) -> None:
        super().__init__(x, 0, start, stop)
        self.shape = shape


def _floats(infos: Iterable[ParameterInfo], unread: list[Unread]) -> list[ParameterInfo]:
    """Tensors with real floating-point values; the others are added to `unread`."""
    found = []
    for info in infos:
        if info.dtype is not None and info.dtype.kind != "float":
            unread.append(Unread(info.name, f"has the dtype {info.dtype}: only floating-point tensors have a spectrum"))
        else:
            found.append(info)
    return found


def _matrices(jobs: Iterable[Job], stacks: frozenset[str]) -> list[Job]:
    """Make a job for each matrix."""
    found = []
    for job in jobs:
        (row,) = job.rows
        shape = row.shape
        if job.key in stacks and len(shape) > 2:
            count, inner = prod(shape[:-2]), prod(shape[1:-2])
            flat = Matrix(row, 0, shape[0], (count * shape[-2], shape[-1])) if inner > 1 else row
            step = shape[-2] if inner > 1 else 1
            found += [
                Job(f"{job.key}[{i}]", (Matrix(flat, i * step, (i + 1) * step, (shape[-2], shape[-1])),))
                for i in range(count)
            ]
        elif len(shape) > 2:
            found.append(Job(job.key, (Matrix(row, 0, shape[0], (shape[0], prod(shape[1:]))),)))
        else:
            found.append(job)
    return found


class SpectraTask(Task[Any, "Spectrum | Unread"]):
    """Task that computes the row of each matrix from all of its singular values."""

    order = "stream"

    def begin(self, job: Job) -> Gram:
        """Start with a Gram matrix of zeros."""
        return Gram(_sides(job), job.dtype.numpy)

    def combine(self, job: Job, parts: Sequence[Any]) -> Spectrum | Unread:
        """Compute the row."""
        (gram,) = parts
        if not np.isfinite(gram).all():
            return Unread(job.key, _INFINITE)
        values = singular_values(gram)
        return _row(job, tuple(values.tolist()), figures(values, _sides(job)), {})


_INFINITE = "has values that are not finite, or too large to be squared in float64"


def _sides(job: Job) -> tuple[int, int]:
    rows, columns = job.rows[0].shape
    return rows, columns


def _row(job: Job, values: tuple[float, ...] | None, found: Figures, errors: dict[str, float]) -> Spectrum:
    (row,) = job.rows
    return Spectrum(
        name=job.key, shape=row.shape, dtype=row.dtype, singular_values=values, errors=errors, **found._asdict()
    )


def _estimate(job: Job, engine: Engine) -> Spectrum | Unread:
    """Row of a large matrix; each product is one run of the engine."""

    def multiply(vectors: Any) -> tuple[Any, float]:
        task = Folding(lambda _: lanczos.Product(_sides(job), vectors), lambda _, parts: parts[0], "stream")
        ((_, result, _),) = engine.run([job], task)
        if isinstance(result, Unread):
            raise result.error or LimitExceeded(result.reason)
        return result

    try:
        found, errors = lanczos.estimate(multiply, _sides(job))
    except FloatingPointError:
        return Unread(job.key, _INFINITE)
    return _row(job, None, found, errors)
