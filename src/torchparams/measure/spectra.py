"""Singular values of matrices, and the figures that are made of them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from torchparams.engines.base import Folding, Job, Task, Unread, readable_jobs
from torchparams.engines.by_name import named
from torchparams.engines.threads import ThreadEngine
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
"""Longest smaller side of a matrix of which all singular values are computed, unless told otherwise."""


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
    """Compute the singular values of every matrix, and norms, ranks and the tail's exponent from them.

    A tensor of shape (m, n) is a matrix. One of more dimensions is taken as the kernel of a convolution,
    (out, in, …), and flattened to (out, in · …). Tensors of fewer dimensions are left out and counted. For stacks of
    matrices (experts, m, n), name them by `stacked`: each matrix is a row of its own.

    Singular values are the square roots of the eigenvalues of the float64 Gram matrix. They are right to about 10⁻⁶ of
    themselves down to 10⁻⁵ of the largest one, and not told apart from zero below that. A matrix whose smaller side is
    longer than `exact` gets estimates, each with its error, and no singular values; see `Spectrum.errors`.

    Memory is that of a Gram matrix (8 bytes × the smaller side squared) for each thread, and the matrix itself where it
    has fewer rows than columns.

    Args:
        x: Anything that has parameters: a model, a checkpoint's path, a mapping of tensors, a plan.
        selector: The tensors to measure; None for all.
        exact: Longest smaller side for which all singular values are computed.
        stacked: Selects tensors of three or more dimensions that are stacks of matrices: the last two dimensions are
            the matrix.
        sort: Column that rows are ordered by, `-` before it for descending; see `Spectra.sorted`.
        limit: Most rows that printing shows; None for all.
        strict: Refuse selectors of which any union branch matches nothing.
        engine: The engine that reads, or its name (`ray`); a `ThreadEngine` that maps files unless given.
        progress: Called with bytes read and bytes in all.

    Raises:
        NoMatch: A branch of a selector matches nothing.
        SelectorError: No such column to sort by.
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
    engine = named(engine) or ThreadEngine(mapped=True)
    coded = source.coded()
    unread = [Unread(name, coded[name].reason) for name in infos if name in coded and not coded[name].numbers]
    refused = {each.name for each in unread}
    matrices = [info for info in infos.values() if info.ndim is None or info.ndim > 1]
    chosen = [info for info in matrices if info.name not in refused]
    whole, cannot = readable_jobs(source, _floats(chosen, unread))
    unread += cannot
    small: list[Job] = []
    large: list[Job] = []
    for job in _matrices(whole, stacks):
        if not job.numel:
            unread.append(Unread(job.key, "has no elements"))
        else:
            (small if min(job.rows[0].shape) <= exact else large).append(job)
    found: dict[str, Spectrum] = {}
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
    """A tensor as a matrix: elements as they are, under two dimensions.

    Args:
        x: The tensor.
        start, stop: The part of its first dimension that is the matrix.
        shape: Rows and columns.
    """

    def __init__(self, x: Expression, start: int, stop: int, shape: tuple[int, int]) -> None:
        super().__init__(x, 0, start, stop)
        self.shape = shape


def _floats(infos: Iterable[ParameterInfo], unread: list[Unread]) -> list[ParameterInfo]:
    """The tensors of real floating-point values; the others are added to `unread`."""
    found = []
    for info in infos:
        if info.dtype is not None and info.dtype.kind != "float":
            unread.append(Unread(info.name, f"has values of {info.dtype}: a spectrum is of floating-point values"))
        else:
            found.append(info)
    return found


def _matrices(jobs: Iterable[Job], stacks: frozenset[str]) -> list[Job]:
    """A job for each matrix."""
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
    """The task that makes a row of each matrix, from all of its singular values."""

    order = "stream"

    def begin(self, job: Job) -> Gram:
        """Start from a Gram matrix of zeros."""
        return Gram(_sides(job), job.dtype.numpy)

    def combine(self, job: Job, parts: Sequence[Any]) -> Spectrum | Unread:
        """The row."""
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
    """The row of a large matrix: an engine run for each product."""

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
