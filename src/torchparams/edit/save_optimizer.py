"""Saving the state of an optimizer, with everything that is no tensor."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from torchparams.edit.convert import choose, plan_of
from torchparams.edit.plan.entries import Entry
from torchparams.edit.plan.plan import MEMORY, SAFETENSORS, kind_of
from torchparams.edit.plan.written import Written
from torchparams.errors import PlanError, shorten
from torchparams.io.write import OneFile, check_target, telling
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
    """Write all of an optimizer's state to a file, at once: the complete new one takes the place of the old.

    Args:
        state: The state.
        path: A file that ends in `.safetensors`, or in `.pt`, `.pth`, `.bin` or `.ckpt` for what `torch.save` makes of
            `state.state_dict()`.
        overwrite: Replace what is there.
        progress: Told bytes written, and bytes in all.
        metadata: Text that a safetensors file says beside.
        format: `safetensors` or `torch zip`; what the path's suffix says unless given.
        memory: Bytes of memory that tensors may take while a safetensors file is written.

    Raises:
        PlanError: It holds a value that the file cannot hold, or something is at the target.
        WriteError: Writing failed. What was at the path is as it was.

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
            "the state of an optimizer is one file", where=target, hint="name a file: optimizer.safetensors"
        )
    if kind != SAFETENSORS:
        if metadata:
            raise PlanError("a torch file holds no metadata", where=target, hint="write a .safetensors file")
        return _pickled(state, target, overwrite)
    tensors, text = as_tensors(state)
    params, _, _ = choose(tensors, None)
    # A tensor of several names is written under each: the text names all of them.
    entries = [Entry(params.source, info, (info.name, *info.aliases), info.dtype) for info in params.infos.values()]
    told = {**(metadata or {}), KEY: text}
    plan = plan_of(
        entries, target, params.source, shared="clone", metadata=told, format=kind, memory=memory, overwrite=overwrite
    )
    return plan.run(progress)


def _pickled(state: OptimizerState, path: str, overwrite: bool) -> Written:
    import torch

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
                f"it holds a value that torch.load(weights_only=True) does not take: {shorten(str(error), 200)}",
                where=path,
            ) from error
        size = os.fstat(fd).st_size
        target.finish(name)
        target.commit(None)
    seconds = time.perf_counter() - begun
    return Written(path, ((name, size),), len(state), size, 0, seconds, notes=target.notes)
