"""Losses of the casts of a load, counted before the model is changed."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.engines.base import Folding, Job
from torchparams.engines.threads import ThreadEngine
from torchparams.errors import MismatchError
from torchparams.expressions.casts import Losses, count_losses, exact
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from torchparams.io.blocks import Block
    from torchparams.train._assignment import Assignment

CAST_BYTES = 1 << 20
"""Block size in bytes for casts; the engine maps several blocks at once."""

CASTERS = 2  # one maps its block while torch casts the other's on its own threads


def lossy_names(pairs: Sequence[Assignment]) -> list[str]:
    """Names of the tensors whose cast can lose values."""
    kinds = {dtype: DType.of(dtype) for dtype in {pair.target.dtype for pair in pairs}}
    return [pair.name for pair in pairs if not exact(pair.info.dtype, kinds[pair.target.dtype])]


def losses_of(pairs: Sequence[Assignment]) -> dict[str, Losses]:
    """Name → values that the tensor's cast would lose, for casts with losses.

    The values are read once; nothing is cast.
    """
    names = frozenset(lossy_names(pairs))
    if not names:
        return {}
    lossy = {pair.name: pair for pair in pairs if pair.name in names}
    kinds = {dtype: DType.of(dtype) for dtype in {pair.target.dtype for pair in lossy.values()}}
    engine = ThreadEngine(CASTERS, block_bytes=CAST_BYTES, mapped=True)
    jobs = [Job(name, (pair.source.row(pair.info.name, pair.info),)) for name, pair in lossy.items()]

    def begin(job: Job) -> _Counting:
        return _Counting(job.dtype, kinds[lossy[job.key].target.dtype])

    def combine(job: Job, parts: Sequence[Losses]) -> Losses:
        return sum(parts, Losses())

    found = engine.map(jobs, Folding(begin, combine))
    return {name: lost for name, lost in found.items() if lost}


def refuse_overflow(lost: Mapping[str, Losses], pairs: Sequence[Assignment], where: str) -> None:
    """Raise if a finite value of the source would become infinite in the model.

    Raises:
        MismatchError: A value would overflow.
    """
    over = {name: losses.overflow for name, losses in lost.items() if losses.overflow}
    if over:
        worst = max(over, key=over.__getitem__)
        dtype = next(DType.of(pair.target.dtype) for pair in pairs if pair.name == worst)
        more = f", as are values of {plural(len(over) - 1, 'other tensor')}" if len(over) > 1 else ""
        verb = "is" if over[worst] == 1 else "are"
        raise MismatchError(
            f"{plural(over[worst], 'value')} of {worst!r} {verb} too large for {dtype}{more}",
            where=where,
            exists="nothing was changed",
            hint="load into a model of a wider dtype, or pass allow_overflow=True",
        )


def tensor_of(block: Block) -> torch.Tensor:
    """Values of a block as a flat tensor, a view of the block's memory if torch has the dtype."""
    import numpy as np
    import torch

    dtype = block.dtype
    if dtype.torch_name is None:
        # Torch has no dtypes of less than a byte. Their values are exact in float32.
        return torch.from_numpy(block.values().astype(np.float32))
    data = block.data
    if data.ctypes.data % dtype.itemsize:
        data = data.copy()
    if not data.nbytes:
        return torch.empty(0, dtype=dtype.torch, device="cpu")
    # torch.frombuffer would warn about the read-only memory. The tensor is only read.
    raw: Any = (ctypes.c_uint8 * data.nbytes).from_address(data.ctypes.data)
    raw.memory = data  # kept as long as the tensor, which keeps `raw`
    return torch.frombuffer(raw, dtype=dtype.torch)


class _Counting:
    """Counter of the losses when blocks are cast."""

    def __init__(self, old: DType, new: DType) -> None:
        self._types = old, new
        self._lost = Losses()

    def update(self, block: Block) -> None:
        self._lost += count_losses(block.values(), *self._types)

    def finish(self) -> Losses:
        return self._lost
