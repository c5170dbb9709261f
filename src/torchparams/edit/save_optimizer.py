"""Save the complete state of an optimizer, including values that are not tensors."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from torchparams.edit.convert import plan_of, select_to_write
from torchparams.edit.plan.plan import MEMORY, SAFETENSORS, kind_of
from torchparams.edit.plan.to_write import ToWrite
from torchparams.edit.plan.written import Written
from torchparams.errors import PlanError, shorten
from torchparams.io.write import OneFile, check_target, telling
from torchparams.sources.live.sharding import is_dtensor
from torchparams.train.optimizer_file import KEY, as_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.engines.base import Progress
    from torchparams.train.optimizer import OptimizerState


def save_optimizer(
    state: OptimizerState,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
    format: str | None = None,
    memory: int | str = MEMORY,
) -> Written:
    """Write an optimizer state to a file; the complete new file replaces the old one.

    Args:
        state: The state.
        path: Target: a `.safetensors` file, or a `.pt`, `.pth`, `.bin` or `.ckpt` file, written as `torch.save` writes
            `state.state_dict()`.
        overwrite: Replace an existing target.
        progress: Callback with the bytes written so far and in total.
        metadata: Text metadata for a safetensors file.
        format: `safetensors` or `torch zip`; by default, follows the suffix of the path.
        memory: Memory limit for tensors while a safetensors file is written, in bytes.

    Raises:
        PlanError: The file cannot store a value of the state, or the target exists.
        WriteError: Writing failed. The old file is unchanged.

    >>> import tempfile, torch
    >>> import torchparams as tp
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = save_optimizer(tp.optimizer_state(model, optimizer), f"{folder}/optimizer.safetensors")
    ...     tp.load_optimizer_state(model, optimizer, f"{folder}/optimizer.safetensors").complete
    True
    """
    target = os.fspath(path)
    is_directory, kind = kind_of(target, format)
    if is_directory:
        raise PlanError(
            "an optimizer state is written to one file, not to a directory",
            where=target,
            hint="name a file: optimizer.safetensors",
        )
    if kind != SAFETENSORS:
        if metadata:
            raise PlanError("a torch file cannot store metadata", where=target, hint="write a .safetensors file")
        return _pickled(state, target, overwrite)
    tensors, text = as_tensors(state)
    params, _, _ = select_to_write(tensors, None)
    # A tensor with several names is written under each, because the JSON text refers to all of them.
    entries = [ToWrite(params.source, info, (info.name, *info.aliases), info.dtype) for info in params.infos.values()]
    told = {**(metadata or {}), KEY: text}
    plan = plan_of(
        entries, target, params.source, shared="clone", metadata=told, format=kind, memory=memory, overwrite=overwrite
    )
    return plan.run(progress)


def _pickled(state: OptimizerState, path: str, overwrite: bool) -> Written:
    import torch

    sharded = next((name for name, tensor in state.items() if is_dtensor(tensor)), None)
    if sharded is not None:
        raise PlanError(
            f"{sharded} is sharded, and a pickle would hold this rank's part of it",
            where=path,
            hint="write a .safetensors file, which holds the whole",
        )
    if os.path.isdir(path) or (os.path.lexists(path) and not overwrite):
        what = "it is a directory" if os.path.isdir(path) else "it exists already"
        raise PlanError(what, where=path, hint="name another target, or pass overwrite=True")
    check_target(path)
    begun = time.perf_counter()
    name = os.path.basename(path)
    with telling(path), OneFile(path) as target:
        fd = target.create(name, 0)
        with os.fdopen(os.dup(fd), "wb") as file:
            torch.save(state.state_dict(), file)
        temporary = target.temporary(name)
        try:
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise PlanError(
                f"torch.load(weights_only=True) cannot read a value of the state: {shorten(str(error), 200)}",
                where=path,
            ) from error
        size = os.fstat(fd).st_size
        target.finish(name)
        target.commit(None)
    seconds = time.perf_counter() - begun
    return Written(path, ((name, size),), len(state), size, 0, seconds, notes=target.notes)
