"""Writes shards on the workers of a Ray cluster: a worker writes a file, and the driver commits the index last.

The driver holds the lock and the journal of the directory. Workers write under the temporary names of that run, which
no reader opens, so a worker that dies leaves nothing that counts: its file is written again, or discarded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torchparams.edit.write.execute import write_files
from torchparams.engines.parcel import can_travel, packed, unpacked
from torchparams.engines.ray import RayEngine
from torchparams.errors import OptionError
from torchparams.io.threads import Ticker
from torchparams.io.write import Target, telling

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchparams.edit.plan.layout import FileLayout, Output, Writable
    from torchparams.edit.write.execute import Contents, Writer
    from torchparams.engines.base import Engine, Progress
    from torchparams.expressions.base import Readable
    from torchparams.expressions.casts import Losses


def writer(plan: Writable, engine: Engine) -> Writer:
    """What writes the files of a plan on an engine.

    Raises:
        OptionError: It is no `RayEngine`, or the plan writes one file.
    """
    if not isinstance(engine, RayEngine):
        raise OptionError(f"the engine {engine.label!r} does not write files", exists="engines are 'threads' and 'ray'")
    if not plan.is_directory:
        raise OptionError(
            "on Ray, a worker writes a shard, but the plan writes one file",
            where=plan.path,
            hint="write a directory with max_shard_size (--max-shard-size), or leave the engine out",
        )
    return partial(write_on_workers, engine)


def write_on_workers(
    engine: RayEngine, plan: Contents, target: Target, threads: int, progress: Progress | None
) -> Mapping[int, Losses]:
    """Write the files of a plan, each by a worker; those with tensors in memory by the threads of this process.

    Returns:
        Losses of casts, by the id of the expression.
    """
    outputs = {output.name: output for output in plan.outputs}
    shares = [Share.of(plan, [file], outputs) for file in plan.files]
    away = [share for share in shares if all(can_travel(output.expression) for output in share.outputs)]
    sent = {id(share) for share in away}
    here = [file for file, share in zip(plan.files, shares, strict=True) if id(share) not in sent]
    for file in plan.files:
        target.claim(file.name)
    tick = Ticker(progress, plan.nbytes)
    own = Share.of(plan, here, outputs)
    lost = dict(write_files(own, target, threads, None if progress is None else lambda at, _: tick(at)))
    done = own.nbytes
    folder = os.path.abspath(target.folder)

    def tell() -> None:
        tick(done)

    parcels = (packed((share, folder), [output.expression for output in share.outputs]) for share in away)
    for number, (found, not_kept) in engine.scatter(_write_share, parcels, tell):
        share = away[number]
        for output, each in zip(share.outputs, found, strict=True):
            for x, losses in zip(output.expression.walk(), each, strict=True):
                if losses is not None:
                    lost[id(x)] = losses
        target.not_kept += [each for each in not_kept if each not in target.not_kept]
        done += share.nbytes
        tick(done)
    return lost


@dataclass(frozen=True, slots=True)
class Share:
    """Some files of a plan, and what is written to them; see `Plan`."""

    outputs: tuple[Output, ...]
    files: tuple[FileLayout, ...]
    path: str
    memory: int
    allow_overflow: bool

    @classmethod
    def of(cls, plan: Contents, files: Iterable[FileLayout], outputs: Mapping[str, Output]) -> Share:
        """The share of these files."""
        # What a file holds beside tensors is made now: it travels as bytes.
        own = tuple(replace(file, fixed=partial(_given, file.fixed({}))) for file in files)
        named = tuple(outputs[name] for file in own for name in file.offsets)
        return cls(named, own, plan.path, plan.memory, plan.allow_overflow)

    @property
    def sources(self) -> tuple[Readable, ...]:
        """Sources of the tensors."""
        leaves = [leaf for output in self.outputs for leaf in output.expression.leaves()]
        return tuple({id(leaf.source): leaf.source for leaf in leaves}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(output.expression.nbytes for output in self.outputs)


def _given(data: list[tuple[int, bytes]], crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
    return data


# --- in a worker -----------------------------------------------------------------------------------


def _write_share(parcel: bytes) -> tuple[list[list[Losses | None]], list[str]]:
    share, folder = unpacked(parcel)
    for source in share.sources:
        source.check_unchanged()
    target = Target(share.path, folder)
    try:
        with telling(share.path):
            lost: Mapping[int, Any] = write_files(share, target, 1, None)
    except BaseException:
        target.discard()
        raise
    return [[lost.get(id(x)) for x in output.expression.walk()] for output in share.outputs], target.not_kept
