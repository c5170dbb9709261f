"""Check files against the rules and checksums of their format."""

from __future__ import annotations

import threading
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, LimitExceeded, NotReadable, RemoteError, SourceError, shorten
from torchparams.info import Location
from torchparams.io.files import Files, read_into
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

_PIECE = 1 << 20  # bytes per read
_SHOWN = 6  # tensors named per line
_STYLES = {OK: "good", FAILED: "error", IMPOSSIBLE: "warn"}


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check.

    Attributes:
        what: Subject of the check.
        outcome: `ok`, `failed` or `not possible`.
        detail: Finding, or reason why the check was not possible.
        tensors: Affected tensors, if it failed for some. For `ties`: names on one side only, each with the name that
            holds its values, such as `head = embed`.
    """

    what: str
    outcome: str
    detail: str
    tensors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The check as JSON data."""
        return {"check": self.what, "outcome": self.outcome, "detail": self.detail, "tensors": list(self.tensors)}

    def row(self) -> Row:
        """The check as a row of a table."""
        more = len(self.tensors) - _SHOWN
        named = ", ".join((*self.tensors[:_SHOWN], *([f"… {more:,} more"] if more > 0 else [])))
        detail = f"{self.detail}: {named}" if named else self.detail
        return Row((self.what, Cell(self.outcome, _STYLES[self.outcome]), detail))


def told(error: SourceError, path: str) -> str:
    """Message of an error, without a leading path."""
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
    """Run the checks that the format of an open source allows.

    Args:
        source: Source to check. Opening it already checked its structure.
        infos: Tensors to check.
        whole: Names of tensors that already matched the manifest.
        everything: Check whole files, not only the tensors.
        read: Read files without checksums, to find unreadable parts.
        progress: Callback with the bytes read so far and in total.
    """
    if not source.files:
        yield Check("structure", IMPOSSIBLE, f"a {source.format} has no stored form; verify it against a manifest")
        return
    if source.format.startswith("sharded"):
        from torchparams.sources.sharded import ShardedSource

        assert isinstance(source, ShardedSource)  # the format name implies the class
        parts = tuple(source.shards.values())
        yield from _shards(source, everything)
        fine = "sizes and byte ranges of the shards are consistent"
    else:
        parts = (source,)
        fine = f"sizes and byte ranges of the {source.format} file are consistent"
    yield _structure(parts, infos, everything, fine)
    zips = [part for part in parts if part.format == "torch zip"]
    if zips:
        yield from _crcs(zips, infos, whole, everything, progress)
    others = [part for part in parts if part.format != "torch zip"]
    if others and read:
        if everything:
            ranges = [(path, 0, size) for part in others for path, size, _ in part.fingerprint()]
        else:
            inside = {path for part in others for path in part.files}
            places = (place for info in infos.values() for place in _places(source, info))
            ranges = [(at.file, at.start, at.stop) for at in places if at.file in inside]
        yield _read(ranges, progress)
    if others and not all(name in whole for name in infos):
        formats = ", ".join(sorted({part.format for part in others}))
        # The parts of a training checkpoint are zips of torch, and have a CRC-32 each.
        have = "files have checksums that are not compared" if _are_zips(others) else "files have none"
        yield Check("checksums", IMPOSSIBLE, f"{formats} {have}; only a manifest can show whether values changed")


def _places(source: Source, info: ParameterInfo) -> Iterator[Location]:
    """Byte ranges of a tensor, or of its parts."""
    if info.location is not None:
        yield info.location
        return
    with suppress(NotReadable):
        yield from (leaf.place for leaf in source.row(info.name).leaves() if leaf.place is not None)


def _are_zips(parts: Iterable[Source]) -> bool:
    from torchparams.sources.training.parted import PartedSource

    return any(isinstance(part, PartedSource) and part.zips for part in parts)


def _unfit(part: Source, asked: Collection[str], everything: bool) -> FileFormatError | None:
    """First error in the parts of a training checkpoint, which are checked in place; None if they are valid."""
    from torchparams.sources.training.parted import PartedSource

    if isinstance(part, PartedSource):
        for name in part.infos():
            try:
                if everything or name in asked:
                    part.row(name)
            except FileFormatError as error:
                return error
            except NotReadable:
                continue  # not supported
    return None


def _shards(source: ShardedSource, everything: bool) -> Iterator[Check]:
    count = plural(len(source.shards), "shard")
    if len(source.files) == len(source.shards):
        yield Check("shards", OK, f"{count}, a complete set; no tensor is in two shards")
    else:
        yield Check("index", OK, f"{count}: the shards hold exactly the tensors of the index")
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
                    "the total size matches the index" if stated else "the index does not record the total size",
                )


def _structure(parts: tuple[Source, ...], asked: Collection[str], everything: bool, fine: str) -> Check:
    """Check the structure of open files without reading values."""
    from torchparams.sources.torchfile.torchzip import TorchZipSource

    for part in parts:
        if isinstance(part, TorchZipSource) and everything:
            try:
                part.check_headers()
            except (FileFormatError, NotReadable) as error:  # NotReadable: an encrypted member
                return Check("structure", FAILED, str(error) if len(parts) > 1 else told(error, part.label))
    for part in parts:
        for name in part.infos():
            if everything or name in asked:
                try:
                    part.check_size(name)
                except LimitExceeded as error:
                    return Check("structure", FAILED, str(error) if len(parts) > 1 else told(error, part.label))
    for part in parts:
        unfit = _unfit(part, asked, everything)
        if unfit is not None:
            return Check("structure", FAILED, told(unfit, part.label))
    return Check("structure", OK, fine)


# --- files without checksums -----------------------------------------------------------------


def _read(ranges: Iterable[tuple[str, int, int]], progress: Progress | None) -> Check:
    """Read ranges of files to find disk errors."""
    listed = list(ranges)
    total = sum(stop - start for _, start, stop in listed)
    done = 0
    memory = memoryview(bytearray(_PIECE))
    files = Files()
    files.expect(Location(*each) for each in listed)
    for path, start, stop in listed:
        at = start
        try:
            with closing(files.open(path)) as file:
                while at < stop:
                    count = read_into(file, [memory[: min(_PIECE, stop - at)]], at, path)
                    if not count:
                        return Check("reading", FAILED, f"{path} ends at byte {at:,}; expected {stop:,}")
                    at += count
                    if progress is not None:
                        progress(done + at - start, total)
        except SourceError as error:
            if not isinstance(error, RemoteError) and not isinstance(error.__cause__, OSError):
                raise  # somebody writes to it
            return Check("reading", FAILED, f"{path}, byte {at:,}: {error.what}")
        done += stop - start
    return Check("reading", OK, f"{human_bytes(total)} read")


# --- torch zips ------------------------------------------------------------------------------

Task = tuple["TorchZipSource", "StoredCrc", tuple[str, ...]]
"""Zip member to checksum, with the tensors whose bytes it holds."""


def _crcs(
    zips: Iterable[Source],
    infos: Mapping[str, ParameterInfo],
    whole: Collection[str],
    everything: bool,
    progress: Progress | None,
) -> Iterator[Check]:
    """Compare the stored CRC-32 of members with their contents."""
    from torchparams.sources.torchfile.torchzip import TorchZipSource

    tasks: list[Task] = []
    for source in zips:
        assert isinstance(source, TorchZipSource)  # the format name implies the class
        holds = _held(source)
        try:
            listed = source.stored_crcs()
        except (FileFormatError, NotReadable) as error:  # NotReadable: an encrypted member
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
        elif stored.crc == 0:  # zero is the placeholder of writers that compute no CRC
            silent += 1
        else:
            yield Check(where, FAILED, f"stored {stored.crc:#010x}, computed {found:#010x}", names)
    if fine:
        yield Check("CRC-32", OK, f"{plural(fine, 'member')} of the zip match")
    if silent:
        yield Check("CRC-32", IMPOSSIBLE, f"{plural(silent, 'member')} of the zip have no CRC-32")


def _held(source: Source) -> dict[str, tuple[str, ...]]:
    """Zip member, without the top folder → tensors whose bytes it holds."""
    found: dict[str, list[str]] = {}
    for info in source.infos().values():
        if info.storage is not None:
            found.setdefault(f"data/{info.storage.key}", []).extend((info.name, *info.aliases))
    return {member: tuple(names) for member, names in found.items()}


def _computed(tasks: list[Task], progress: Progress | None) -> Iterator[tuple[Task, int | FileFormatError]]:
    """Yield each task with the CRC-32 of its member, in order; several are computed in parallel."""
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
