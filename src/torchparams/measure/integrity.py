"""What the format of a file promises of it, and whether the file keeps it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, LimitExceeded, NotReadable, SourceError, shorten
from torchparams.io.threads import Shared, Ticker, processors, results_of
from torchparams.render.tree import Cell, Row, human_bytes, plural

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from torchparams.engines.base import Progress
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source
    from torchparams.sources.sharded import ShardedSource
    from torchparams.sources.torchfile.torchzip import StoredCrc, TorchZipSource

OK, FAILED, IMPOSSIBLE = "ok", "failed", "not possible"

_PIECE = 1 << 20  # bytes that are read at once
_SHOWN = 6  # tensors named in one line
_STYLES = {OK: "good", FAILED: "error", IMPOSSIBLE: "warn"}


@dataclass(frozen=True, slots=True)
class Check:
    """Something that was checked, or could not be.

    Attributes:
        what: What was checked.
        outcome: `ok`, `failed` or `not possible`.
        detail: What was found, or why it could not be checked.
        tensors: The tensors that it concerns, where it failed for some; of `ties`, the names that are on one side only,
            each with the name that has its values: `head = embed`.
    """

    what: str
    outcome: str
    detail: str
    tensors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All attributes."""
        return {"check": self.what, "outcome": self.outcome, "detail": self.detail, "tensors": list(self.tensors)}

    def row(self) -> Row:
        """The check as a row of a report."""
        more = len(self.tensors) - _SHOWN
        named = ", ".join((*self.tensors[:_SHOWN], *([f"… {more:,} more"] if more > 0 else [])))
        detail = f"{self.detail}: {named}" if named else self.detail
        return Row((self.what, Cell(self.outcome, _STYLES[self.outcome]), detail))


def told(error: SourceError, path: str) -> str:
    """What an error says, without the path where that is all it says of the place."""
    return str(error).removeprefix(f"{path}: ")


def integrity(
    source: Source,
    infos: Mapping[str, ParameterInfo],
    whole: Collection[str],
    *,
    everything: bool,
    read: bool,
    progress: Progress | None = None,
) -> Iterator[Check]:
    """The checks that the format of an open source allows.

    Args:
        source: It; what had to hold for it to be opened, holds.
        infos: The tensors that are asked about.
        whole: Names of those that are known to be as they should be.
        everything: Whether the files are asked about as a whole, not only the tensors.
        read: Whether to read files that have no checksums, to see whether that can be done.
        progress: Told bytes done and bytes in all.
    """
    if not source.files:
        yield Check("structure", IMPOSSIBLE, f"a {source.format} has no stored form; only a manifest says what it was")
        return
    if source.format.startswith("sharded"):
        from torchparams.sources.sharded import ShardedSource

        assert isinstance(source, ShardedSource)  # no other source is called so
        parts = tuple(source.shards.values())
        yield from _shards(source, everything)
        fine = "what the shards say of their sizes and byte ranges holds"
    else:
        parts = (source,)
        fine = f"what a {source.format} file says of its sizes and byte ranges holds"
    yield _structure(parts, infos, everything, fine)
    zips = [part for part in parts if part.format == "torch zip"]
    if zips:
        yield from _crcs(zips, infos, whole, everything, progress)
    others = [part for part in parts if part.format != "torch zip"]
    if others and read:
        if everything:
            ranges = [(path, 0, os.path.getsize(path)) for part in others for path in part.files]
        else:
            inside = {path for part in others for path in part.files}
            places = [info.location for info in infos.values() if info.location is not None]
            ranges = [(at.file, at.start, at.stop) for at in places if at.file in inside]
        yield _read(ranges, progress)
    if others and not all(name in whole for name in infos):
        formats = ", ".join(sorted({part.format for part in others}))
        yield Check("checksums", IMPOSSIBLE, f"{formats} stores none; only a manifest tells whether values changed")


def _shards(source: ShardedSource, everything: bool) -> Iterator[Check]:
    count = plural(len(source.shards), "shard")
    if len(source.files) == len(source.shards):
        yield Check("shards", OK, f"{count}, a complete set; no tensor is in two of them")
    else:
        yield Check("index", OK, f"{count}: each tensor is where the index says, and none is there beside these")
        if everything:
            stated = "total_size" in source.metadata
            try:
                source.check_total_size()
            except FileFormatError as error:
                yield Check("total_size", FAILED, error.what)
            else:
                yield Check(
                    "total_size",
                    OK if stated else IMPOSSIBLE,
                    "the tensors take as many bytes as the index says" if stated else "the index says none",
                )


def _structure(parts: tuple[Source, ...], asked: Collection[str], everything: bool, fine: str) -> Check:
    """Whether what can be looked at of open files without reading their values holds."""
    from torchparams.sources.torchfile.torchzip import TorchZipSource

    for part in parts:
        if isinstance(part, TorchZipSource) and everything:
            try:
                part.check_headers()
            except (FileFormatError, NotReadable) as error:  # the second: a member that is encrypted
                return Check("structure", FAILED, str(error) if len(parts) > 1 else told(error, part.label))
    for part in parts:
        for name in part.infos():
            if everything or name in asked:
                try:
                    part.check_size(name)
                except LimitExceeded as error:
                    return Check("structure", FAILED, str(error) if len(parts) > 1 else told(error, part.label))
    return Check("structure", OK, fine)


# --- files without checksums -----------------------------------------------------------------


def _read(ranges: Iterable[tuple[str, int, int]], progress: Progress | None) -> Check:
    """Read ranges of files, so that a failing disk shows."""
    listed = list(ranges)
    total = sum(stop - start for _, start, stop in listed)
    done = 0
    memory = memoryview(bytearray(_PIECE))
    for path, start, stop in listed:
        at = start
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                while at < stop:
                    count = file.readinto(memory[: min(_PIECE, stop - at)])
                    if not count:
                        return Check("reading", FAILED, f"{path} ends at byte {at:,}, and had {stop:,}")
                    at += count
                    if progress is not None:
                        progress(done + at - start, total)
        except OSError as error:
            return Check("reading", FAILED, f"{path}, byte {at:,}: {error.strerror or error}")
        done += stop - start
    return Check("reading", OK, f"{human_bytes(total)} were read")


# --- torch zips ------------------------------------------------------------------------------

Task = tuple["TorchZipSource", "StoredCrc", tuple[str, ...]]
"""A member whose CRC-32 is computed, with the tensors whose bytes are in it."""


def _crcs(
    zips: Iterable[Source],
    infos: Mapping[str, ParameterInfo],
    whole: Collection[str],
    everything: bool,
    progress: Progress | None,
) -> Iterator[Check]:
    """Compare the stored CRC-32 of members with that of their contents."""
    from torchparams.sources.torchfile.torchzip import TorchZipSource

    tasks: list[Task] = []
    for source in zips:
        assert isinstance(source, TorchZipSource)  # no other source is called so
        holds = _held(source)
        try:
            listed = source.stored_crcs()
        except (FileFormatError, NotReadable) as error:  # the second: a member that is encrypted
            yield Check("CRC-32", FAILED, told(error, source.label))
            continue
        for stored in listed:
            names = holds.get(stored.member.partition("/")[2]) or holds.get(stored.member) or ()
            asked = [name for name in names if name in infos]
            if (asked and all(name in whole for name in asked)) or not (asked or everything):
                continue
            tasks.append((source, stored, names))
    fine, silent = 0, 0
    for (_, stored, names), found in _computed(tasks, progress):
        where = f"CRC-32 of {shorten(stored.member)}"
        if isinstance(found, FileFormatError):
            yield Check(where, FAILED, found.what, names)
        elif found == stored.crc:
            fine += 1
        elif stored.crc == 0:  # that of contents with another CRC: nobody computed it
            silent += 1
        else:
            yield Check(where, FAILED, f"stored is {stored.crc:#010x}, its contents have {found:#010x}", names)
    if fine:
        yield Check("CRC-32", OK, f"{plural(fine, 'member')} of the zip as when stored")
    if silent:
        yield Check("CRC-32", IMPOSSIBLE, f"{plural(silent, 'member')} of the zip stored without one")


def _held(source: Source) -> dict[str, tuple[str, ...]]:
    """Member, without the top folder → the tensors whose bytes are in it."""
    found: dict[str, list[str]] = {}
    for info in source.infos().values():
        if info.storage is not None:
            found.setdefault(f"data/{info.storage.key}", []).extend((info.name, *info.aliases))
    return {member: tuple(names) for member, names in found.items()}


def _computed(tasks: list[Task], progress: Progress | None) -> Iterator[tuple[Task, int | FileFormatError]]:
    """Each task with the CRC-32 of its member, in order; several are computed at a time."""
    stop = threading.Event()
    done = [0] * len(tasks)
    total = sum(stored.location.stop - stored.location.start for _, stored, _ in tasks)

    def compute(number: int) -> int | FileFormatError:
        import zlib

        source, stored, _ = tasks[number]
        crc = 0
        try:
            for chunk in source.member_chunks(stored.member):
                if stop.is_set():
                    break
                crc = zlib.crc32(chunk, crc)
                done[number] += len(chunk)
        except FileFormatError as error:
            return error
        return crc

    numbers = Shared(range(len(tasks)))
    tick = Ticker(progress, total)
    workers = [((number, compute(number)) for number in numbers) for _ in range(min(processors(), len(tasks)))]
    found = dict(results_of(workers, stop, lambda: tick(sum(done))))
    if progress is not None:
        progress(total, total)
    for number, task in enumerate(tasks):
        yield task, found[number]
