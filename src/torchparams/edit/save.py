"""Saving what is live, whole or only what differs from a base; and putting a difference back on its base."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from torchparams.edit.convert import as_stored, choose, convert, plan_of
from torchparams.edit.plan.entries import Entry
from torchparams.edit.plan.plan import MEMORY, Plan
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
"""The metadata of a delta: JSON with `version`, `base` (the digest of the set it is of) and `removed` (names)."""

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
    """Write the tensors of anything to a file, at once: the complete new one takes the place of the old.

    It is `convert(…).run()` for programs that train. Unlike there, what is at the path is replaced unless told
    otherwise, as by `torch.save`; unlike there, a run that is killed leaves the old file as it was.

    With `base`, a **delta** is written: a safetensors file of the tensors that differ from those of the base in a bit
    of their elements, in shape or in type, or are new; and the names of those that are gone. `apply_delta` makes the
    whole of the two. With a selector, only what it selects is compared, and nothing counts as gone.

    The state of an optimizer is written whole, its options and counters beside the tensors, as a safetensors file or
    as what `torch.save` makes of its `state_dict()`; `load_optimizer_state` reads either.

    Args:
        x: Anything that has parameters; of a live model, what its state dict holds.
        path: The target: see `convert`.
        selector: Only these; None for all.
        only: `trainable` for the parameters that require grad, within the selection.
        base: Anything that has parameters: what a delta is relative to.
        overwrite: Replace what is there.
        progress: Told bytes written, and bytes in all.
        options: Those of `convert`.

    Returns:
        What was written.

    Raises:
        PlanError: As `convert`; or `only` is something else.
        WriteError: The disk said no. What was at the path is as it was.

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
        raise PlanError(f"only={only!r} says nothing", exists="there is only='trainable'")
    if only is not None:
        from torchparams.selectors import Selector

        trainable = Selector.of(":trainable")
        selector = trainable if selector is None else Selector.of(selector) & trainable
    from torchparams.train.optimizer import OptimizerState

    if isinstance(x, OptimizerState):
        if selector is not None or base is not None:
            raise PlanError(
                "the state of an optimizer is written whole",
                where=os.fspath(path),
                hint="torchparams.convert(state, path, selector) writes chosen tensors alone",
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
    """The plan of a delta: see `save`. Making it reads both sides.

    Args:
        x: Anything that has parameters.
        base: What the delta is relative to.
        path: A file that ends in `.safetensors`.
        selector: Compare only these; None for all.
        metadata: Text that the file says beside.
        memory: Bytes of memory that tensors may take while it runs.
        overwrite: Replace what is there.

    Raises:
        PlanError: The path is no safetensors file, or something is there.
        NoMatch: The selector hits nothing.

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
    params, dropped, notes = choose(x, selector, raw=True)
    below, _, _ = choose(base, None, raw=True)
    ours, theirs = _by_name(params.source, as_stored(params)), _by_name(below.source, as_stored(below))
    new = [name for name in ours if name not in theirs]
    gone = [name for name in theirs if name not in ours] if selector is None else []
    changed = differing(ours, theirs)
    entries = [
        Entry(source, info, (name,), info.dtype)
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
    """The plan that writes what a delta was made of, bit for bit: its base with what differs put in place.

    Making it reads the base once, to hold its digest against the one that the delta names.

    Args:
        base: Anything that has parameters: what the delta was made relative to.
        delta: The delta's file.
        path: The target; None for a view: see `convert`.
        check: Refuse a base whose digest is another.
        options: `shared`, `max_shard_size`, `metadata`, `format`, `memory`, `overwrite`: those of `convert`.

    Raises:
        MismatchError: It is another base.
        PlanError: The file is no delta; or as `convert`.

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
    below, _, _ = choose(base, None, raw=True)
    if check:
        from torchparams.measure.digest import digest

        found = digest(below).digest
        if found != told["base"]:
            raise MismatchError(
                f"it is a delta to another base, of digest {shorten(told['base'], 16)}",
                where=over.source.label,
                exists=f"that of {below.source.label} is {shorten(found, 16)}",
                hint="name the base that it was made from",
            )
    removed = set(told["removed"])
    changed = as_stored(over)
    entries: list[Entry] = []
    for info in as_stored(below).values():
        kept = []
        for name in (info.name, *info.aliases):
            if name in changed:
                entries.append(Entry(over.source, changed[name], (name,), changed[name].dtype))
            elif name not in removed:
                kept.append(name)
        if kept:
            entries.append(Entry(below.source, info, tuple(kept), info.dtype))
    placed = {name for entry in entries for name in entry.names}
    entries += [Entry(over.source, info, (name,), info.dtype) for name, info in changed.items() if name not in placed]
    notes = [
        f"{plural(len(changed), 'tensor')} from the delta, "
        f"{plural(sum(entry.source is below.source for entry in entries), 'tensor')} from the base"
    ]
    return plan_of(entries, path, below.source, notes=notes, **options)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _by_name(source: Source, infos: Mapping[str, ParameterInfo]) -> dict[str, tuple[Source, ParameterInfo]]:
    """Every name of every tensor: a delta does not know which names were tied."""
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
        "it is no delta" if KEY not in metadata else "it is a delta of a kind that is not known here",
        where=label,
        hint="a delta is what torchparams delta, or torchparams.save with a base, writes",
    )


def differing(ours: Named, theirs: Named) -> set[str]:
    """The names that both have, whose tensors differ in type, shape or a bit."""
    from torchparams.engines.base import Job
    from torchparams.engines.equality import SameBits
    from torchparams.engines.threads import ThreadEngine

    found: set[str] = set()
    jobs = []
    for name, (source, info) in ours.items():
        if name not in theirs:
            continue
        base, other = theirs[name]
        if info.dtype != other.dtype or info.shape != other.shape:
            found.add(name)
        elif info.dtype.numpy_name is None:
            # Bits of a type that numpy lacks cannot be compared here: such a tensor is taken to differ.
            found.add(name)
        else:
            jobs.append(Job(name, (source.row(info.name, info), base.row(other.name, other))))
    same = ThreadEngine().map(jobs, SameBits())
    return found | {name for name, equal in same.items() if not equal}
