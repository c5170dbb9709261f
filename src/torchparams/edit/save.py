"""Save a model or a delta of a base checkpoint, and apply a delta to its base."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from torchparams.edit.convert import as_stored, convert, plan_of, select_to_write
from torchparams.edit.plan.plan import MEMORY, Plan
from torchparams.edit.plan.to_write import ToWrite
from torchparams.errors import MismatchError, PlanError, shorten
from torchparams.parameters import of
from torchparams.render.tree import plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.edit.plan.written import Written
    from torchparams.engines.base import Progress
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

    Named = Mapping[str, tuple[Source, ParameterInfo]]

KEY = "torchparams.delta"
"""Metadata key of a delta: JSON with `version`, `base` (digest of the base) and `removed` (names)."""

_VERSION = 1


def save(
    x: object,
    path: str | os.PathLike[str],
    selector: object = None,
    *,
    only: str | None = None,
    base: object = None,
    overwrite: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Written:
    """Write tensors to a file at once; the complete new file replaces the old one.

    Equivalent to `convert(…).run()`, for training programs. Like `torch.save`, it replaces an existing file by default.
    Unlike `torch.save`, an interrupted run leaves the old file unchanged.

    With `base`, writes a **delta**: a safetensors file with the tensors that are new or differ from the base in a bit,
    shape or dtype, and the names of removed tensors. `apply_delta` restores the full checkpoint. With a selector, only
    selected tensors are compared, and no name counts as removed.

    The state of an optimizer is written whole, including options and counters, as a safetensors file or as `torch.save`
    would write its `state_dict()`. `load_optimizer_state` reads both.

    Of sharded parameters, all their ranks make the call: the lowest writes, and fetches the parts of the others in
    messages (four collectives; six more where a part of the ranks has tensors of its own). Every rank gets the result.

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`. For a live model, the content of its state dict.
        path: Target; see `convert`.
        selector: Tensors to write; None for all.
        only: `trainable` to write only the selected parameters that require grad.
        base: Base of the delta: anything that `x` may be.
        overwrite: Replace an existing target.
        progress: Callback with the bytes written so far and in total.
        options: Options of `convert`.

    Returns:
        A summary of the written file.

    Raises:
        PlanError: As for `convert`, or `only` is invalid.
        WriteError: Writing failed. The old file is unchanged.

    >>> import tempfile, torch
    >>> import torchparams as tp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> _ = model[0].requires_grad_(False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = tp.save(model, f"{folder}/head.safetensors", only="trainable")
    ...     print(tp.of(f"{folder}/head.safetensors").names)
    ['1.weight', '1.bias']
    """
    if only not in (None, "trainable"):
        raise PlanError(f"`only` must be 'trainable' or None, not {only!r}")
    if only is not None:
        from torchparams.selectors import Selector

        trainable = Selector.of(":trainable")
        selector = trainable if selector is None else Selector.of(selector) & trainable
    from torchparams.train.optimizer import OptimizerState

    if isinstance(x, OptimizerState):
        if selector is not None or base is not None:
            raise PlanError(
                "an optimizer state is written whole, without a selector or base",
                where=os.fspath(path),
                hint="torchparams.convert(state, path, selector) writes selected tensors",
            )
        from torchparams.edit.save_optimizer import save_optimizer

        return save_optimizer(x, path, overwrite=overwrite, progress=progress, **options)
    if base is not None:
        return delta(x, base, path, selector, overwrite=overwrite, **options).run(progress)
    return convert(x, path, selector, overwrite=overwrite, **options).run(progress)


def delta(
    x: object,
    base: object,
    path: str | os.PathLike[str],
    selector: object = None,
    *,
    metadata: Mapping[str, str] | None = None,
    memory: int | str = MEMORY,
    overwrite: bool = False,
) -> Plan:
    """Plan a delta; see `save`. Planning reads both checkpoints.

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`.
        base: Base of the delta: anything that `x` may be.
        path: A file that ends in `.safetensors`.
        selector: Tensors to compare; None for all.
        metadata: Text metadata for the file.
        memory: Memory limit for tensors during the run, in bytes.
        overwrite: Replace an existing target.

    Raises:
        PlanError: The path is not a safetensors file, or it exists.
        NoMatch: The selector matches nothing.

    >>> import numpy as np, tempfile
    >>> base = {"a": np.zeros(2), "b": np.ones(2), "c": np.ones(1)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plan = delta({"a": np.zeros(2), "b": np.full(2, 3.0)}, base, f"{folder}/delta.safetensors")
    >>> [output.name for output in plan.outputs], plan.notes
    (['b'], ('a delta: 1 tensor differs, 0 are new, 1 is gone',))
    """
    from torchparams.measure.digest import digest

    if not os.fspath(path).endswith(".safetensors"):
        raise PlanError("a delta is a safetensors file", where=os.fspath(path), hint="end its name in .safetensors")
    params, dropped, notes = select_to_write(x, selector, raw=True)
    below, _, _ = select_to_write(base, None, raw=True)
    ours, theirs = _by_name(params.source, as_stored(params)), _by_name(below.source, as_stored(below))
    new = [name for name in ours if name not in theirs]
    gone = [name for name in theirs if name not in ours] if selector is None else []
    changed = differing(ours, theirs)
    entries = [
        ToWrite(source, info, (name,), info.dtype)
        for name, (source, info) in ours.items()
        if name in changed or name not in theirs
    ]
    told = {"version": _VERSION, "base": digest(below).digest, "removed": gone}
    count = len(changed)
    notes.append(
        f"a delta: {plural(count, 'tensor')} {'differs' if count == 1 else 'differ'}, "
        f"{len(new):,} {_are(len(new))} new, {len(gone):,} {_are(len(gone))} gone"
    )
    return plan_of(
        entries,
        path,
        params.source,
        metadata={**(metadata or {}), KEY: json.dumps(told)},
        dropped=dropped,
        notes=notes,
        memory=memory,
        overwrite=overwrite,
    )


def apply_delta(
    base: object,
    delta: object,
    path: str | os.PathLike[str] | None = None,
    *,
    check: bool = True,
    **options: Any,
) -> Plan:
    """Plan to apply a delta to its base: the result is bit for bit the checkpoint that the delta was made from.

    Planning reads the base once, to check its digest against the one in the delta.

    Args:
        base: The base that the delta was made from: model, checkpoint, mapping of tensors, or `Parameters`.
        delta: Path of the delta file.
        path: Target; None for a view. See `convert`.
        check: Raise if the base has a different digest.
        options: `shared`, `max_shard_size`, `metadata`, `format`, `memory`, `overwrite`, as in `convert`.

    Raises:
        MismatchError: The delta belongs to another base.
        PlanError: The file is not a delta, or as for `convert`.

    >>> import numpy as np, tempfile
    >>> import torchparams as tp
    >>> base, tuned = {"a": np.zeros(2), "b": np.ones(2)}, {"a": np.zeros(2), "b": np.full(2, 3.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = tp.save(tuned, f"{folder}/delta.safetensors", base=base)
    ...     _ = tp.apply_delta(base, f"{folder}/delta.safetensors", f"{folder}/tuned.safetensors").run()
    ...     print(tp.of(f"{folder}/tuned.safetensors").numpy("b"))
    [3. 3.]
    """
    over = of(delta, raw=True)
    told = _told(over.metadata, over.source.label)
    below, _, _ = select_to_write(base, None, raw=True)
    if check:
        from torchparams.measure.digest import digest

        found = digest(below).digest
        if found != told["base"]:
            raise MismatchError(
                f"the delta belongs to another base, with digest {shorten(told['base'], 16)}",
                where=over.source.label,
                exists=f"the digest of {below.source.label} is {shorten(found, 16)}",
                hint="pass the base that the delta was made from",
            )
    removed = set(told["removed"])
    changed = as_stored(over)
    entries: list[ToWrite] = []
    for info in as_stored(below).values():
        kept = []
        for name in (info.name, *info.aliases):
            if name in changed:
                entries.append(ToWrite(over.source, changed[name], (name,), changed[name].dtype))
            elif name not in removed:
                kept.append(name)
        if kept:
            entries.append(ToWrite(below.source, info, tuple(kept), info.dtype))
    placed = {name for entry in entries for name in entry.names}
    entries += [ToWrite(over.source, info, (name,), info.dtype) for name, info in changed.items() if name not in placed]
    notes = [
        f"{plural(len(changed), 'tensor')} from the delta, "
        f"{plural(sum(entry.source is below.source for entry in entries), 'tensor')} from the base"
    ]
    return plan_of(entries, path, below.source, notes=notes, **options)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _by_name(source: Source, infos: Mapping[str, ParameterInfo]) -> dict[str, tuple[Source, ParameterInfo]]:
    """Tensors by every name: a delta does not record ties."""
    return {name: (source, info) for info in infos.values() for name in (info.name, *info.aliases)}


def _told(metadata: Mapping[str, Any], label: str) -> dict[str, Any]:
    try:
        told = json.loads(metadata[KEY])
        known = told["version"] == _VERSION and isinstance(told["base"], str)
        if known and all(isinstance(name, str) for name in told["removed"]):
            return dict(told)
    except (KeyError, TypeError, ValueError):
        pass
    raise PlanError(
        "it is not a delta" if KEY not in metadata else "the version of this delta is not supported",
        where=label,
        hint="write a delta with torchparams delta, or torchparams.save with a base",
    )


def differing(ours: Named, theirs: Named) -> set[str]:
    """Names in both tables whose tensors differ in dtype, shape or a bit."""
    from torchparams.engines.base import Job
    from torchparams.engines.distributed import engine_for
    from torchparams.engines.equality import SameBits

    found: set[str] = set()
    jobs = []
    for name, (source, info) in ours.items():
        if name not in theirs:
            continue
        base, other = theirs[name]
        if info.dtype != other.dtype or info.shape != other.shape:
            found.add(name)
        elif info.dtype.numpy_name is None:
            # Bits of a dtype that NumPy lacks cannot be compared here: such a tensor counts as different.
            found.add(name)
        else:
            jobs.append(Job(name, (source.row(info.name, info), base.row(other.name, other))))
    same = engine_for(jobs, mapped=False).map(jobs, SameBits())
    return found | {name for name, equal in same.items() if not equal}
