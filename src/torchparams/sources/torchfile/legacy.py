"""Readers of the format of `torch.save` before version 1.6, and of plain pickles.

A legacy file is five pickles (a magic number, the protocol, information on the machine, the object, the keys of the
storages), followed by the number of elements and the bytes of each storage. Both are little-endian on every machine,
whatever the third pickle says.

A plain pickle contains the bytes itself: numpy arrays, and torch tensors, each of which `pickle` writes as a legacy
file inside the pickle.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from torchparams import limits
from torchparams.errors import FileFormatError, LimitExceeded, SizeMismatch, TrailingBytes, TruncatedFile, shorten
from torchparams.io.filebytes import paused_gc
from torchparams.io.opened import bytes_of_file
from torchparams.io.paths import is_url
from torchparams.render.tree import plural
from torchparams.sources.torchfile._describe import describe
from torchparams.sources.torchfile._pickle import Machine
from torchparams.sources.torchfile._pickle_values import Blob, Malformed
from torchparams.sources.torchfile._rebuild import CONSTRUCTORS
from torchparams.sources.torchfile._refs import Region, StorageRef, Storages
from torchparams.sources.torchfile._tree import Contents
from torchparams.sources.torchfile._views import PickledSource, refuse_tensorless

if TYPE_CHECKING:
    from torchparams.io.filebytes import FileBytes
    from torchparams.sources.torchfile._pickle_values import Buffer, Constructor, Global, Services

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_FIRST = 256 << 10  # bytes of a remote file that are read first to find its pickles
_COUNT = 8  # bytes of the number of elements of a storage


def open_legacy(path: str, inner: str | None = None) -> LegacySource:
    """Open a file in the torch format from before version 1.6.

    Args:
        path: The file.
        inner: Dotted path of the mapping or object to list, or None for everything.

    Raises:
        SourceError: The file cannot be read.
        FileFormatError: The file is invalid; the message names the byte.
        LimitExceeded: The file exceeds a limit in `torchparams.limits`.
        UnknownName: `inner` does not exist.
    """
    with paused_gc():
        return LegacySource(bytes_of_file(path), inner)


def open_plain_pickle(path: str, inner: str | None = None) -> PlainPickleSource:
    """Open a pickle that contains numpy arrays or torch tensors.

    Args:
        path: The file.
        inner: Dotted path of the mapping or object to list, or None for everything.

    Raises:
        SourceError: The file cannot be read.
        FileFormatError: The file is not a single pickle, or has no tensors.
        LimitExceeded: The file exceeds a limit in `torchparams.limits`.
        UnknownName: `inner` does not exist.
    """
    with paused_gc():
        return PlainPickleSource(bytes_of_file(path), inner)


def refuse_tar(path: str, inner: str | None = None) -> NoReturn:
    """Raise for a tar file, and say what to do with it.

    Raises:
        FileFormatError: Always.
    """
    file = bytes_of_file(path)
    head = file.read(0, min(file.size, 512))
    if head[:100].rstrip(b"\0") in (b"sys_info", b"tensors", b"storages", b"pickle"):
        raise FileFormatError(
            "a tar archive of torch 0.1, which is not supported",
            where=path,
            hint="load it with torch.load(path, weights_only=False) if you trust it, and save it again",
        )
    raise FileFormatError(
        "a tar archive, not a checkpoint", where=path, hint="unpack it, and open the checkpoint in it"
    )


class LegacySource(PickledSource):
    """A checkpoint in the torch format from before version 1.6.

    Args:
        file: The file.
        inner: Dotted path of the part to list, or None for everything.
    """

    format = "torch legacy"

    def __init__(self, file: FileBytes, inner: str | None) -> None:
        machine, root, end = _read_remote(file) if is_url(file.path) else _read(file)
        if end != file.size:
            raise TrailingBytes(
                f"{plural(file.size - end, 'byte')} after the last storage, at byte {end}", where=file.path
            )
        listing = Contents(root, inner, file.path)
        refuse_tensorless("checkpoint", root, listing, machine, file.path)
        super().__init__(file, inner, listing, machine.imported)


class PlainPickleSource(PickledSource):
    """A pickle that contains the bytes of its arrays.

    Args:
        file: The file.
        inner: Dotted path of the part to list, or None for everything.
    """

    format = "pickle"

    def __init__(self, file: FileBytes, inner: str | None) -> None:
        if is_url(file.path) and file.size > limits.REMOTE_WHOLE_BYTES:
            raise LimitExceeded(
                f"a plain pickle of {file.size:,} bytes cannot be listed without reading all of it",
                where=file.path,
                exists=f"the limit is {limits.REMOTE_WHOLE_BYTES:,}",
                hint="download the file, or raise torchparams.limits.REMOTE_WHOLE_BYTES",
            )
        embedded = _Embedded(file)
        constructors: dict[tuple[str, str], Constructor] = {
            **CONSTRUCTORS,
            ("torch.storage", "_load_from_bytes"): embedded,
        }
        machine = Machine(
            file.view(0, file.size), file.size, file.path, constructors, Storages.refuse, file.size, in_file=True
        )
        root, end = machine.load(0)
        if end != file.size:
            raise TrailingBytes(
                f"{plural(file.size - end, 'byte')} after the end of the pickle, at byte {end}", where=file.path
            )
        listing = Contents(root, inner, file.path)
        refuse_tensorless("pickle", root, listing, machine, file.path)
        super().__init__(file, inner, listing, machine.imported)


def _read(file: FileBytes) -> tuple[Machine, Any, int]:
    """Read a legacy file: the interpreter, the contents, and the end offset."""
    storages = Storages()
    machine = Machine(file.view(0, file.size), file.size, file.path, CONSTRUCTORS, storages, file.size, in_file=True)
    return machine, *read_legacy(machine, storages, 0, file.size)


def _read_remote(file: FileBytes) -> tuple[Machine, Any, int]:
    """Read only the pickles of a remote legacy file; they come first.

    The number of elements of a storage is read together with the storage.
    """
    size = min(file.size, _FIRST)
    while True:
        storages = Storages()
        machine = Machine(file.view(0, size), size, file.path, CONSTRUCTORS, storages, file.size, in_file=True)
        try:
            return machine, *read_legacy(machine, storages, 0, file.size, file)
        except TruncatedFile:
            if size == file.size or size >= limits.PICKLE_BYTES:
                raise
            size = min(file.size, size * 4)


def read_legacy(
    machine: Machine, storages: Storages, begin: int, stop: int, file: FileBytes | None = None
) -> tuple[Any, int]:
    """Read the legacy file at `[begin, stop)` of the buffer: the contents, and the end offset.

    Sets the region of each of `storages`.

    Args:
        machine: The interpreter that runs the pickles.
        storages: Collects the storages.
        begin, stop: Range of the legacy file.
        file: Remote file, whose numbers of elements are checked when the storages are read.

    Raises:
        TruncatedFile: The file continues beyond `stop`.
        FileFormatError: The file is invalid.
    """
    where = machine.label
    magic, pos = machine.load(begin)
    if type(magic) is not int or magic != _MAGIC:
        raise FileFormatError("not torch's legacy format: it does not start with its magic number", where=where)
    protocol, pos = machine.load(pos)
    if type(protocol) is not int or protocol != _PROTOCOL:
        raise FileFormatError(
            f"torch's legacy format with the unknown protocol {describe(protocol)}; only {_PROTOCOL} is supported",
            where=where,
        )
    _, pos = machine.load(pos)
    root, pos = machine.load(pos)
    keys, pos = machine.load(pos)
    if type(keys) is not list:
        raise FileFormatError(f"the list of storages is {describe(keys)}", where=f"{where}, before byte {pos}")

    firsts = {storage.key: storage for storage in storages.by_key.values()}
    places: dict[str, Region] = {}
    counts: list[tuple[int, int, int, partial[None]]] = []
    for key in keys:
        name = key if type(key) is str else str(key) if type(key) is int and abs(key) < 1 << 64 else None
        storage = firsts.get(name) if name is not None else None
        if storage is None or name is None:
            raise FileFormatError(f"the file lists a storage {shorten(describe(key))} that is not used", where=where)
        if name in places:
            raise FileFormatError(f"the file lists the storage {shorten(repr(name))} twice", where=where)
        start = pos + _COUNT
        if start > stop:
            raise TruncatedFile(
                f"the file ends at byte {stop}, within the number of elements of the storage {shorten(repr(name))}",
                where=where,
            )
        check = partial(_check_count, storage.numel, name, f"{where}, byte {pos}")
        if file is None:
            check(machine.data[pos:start])
        else:
            counts.append((start, start + storage.nbytes, pos, check))
        pos = start + storage.nbytes
        if pos > stop:
            raise TruncatedFile(
                f"the file ends at byte {stop}, within the storage {shorten(repr(name))}, which takes bytes "
                f"{start} to {pos}",
                where=where,
            )
        places[name] = Region(start, storage.nbytes, False)
    for storage in storages:
        region = places.get(storage.key)
        if region is None:
            raise FileFormatError(
                f"the file lacks the storage {shorten(repr(storage.key))}",
                where=where,
                exists=f"it lists {len(places):,} storages",
            )
        if (storage.start + storage.numel) * storage.dtype.bits > region.nbytes * 8:
            raise SizeMismatch(
                f"the storage {shorten(repr(storage.key))} has {region.nbytes:,} bytes, but is used as one of "
                f"{storage.numel:,} × {storage.dtype}",
                where=where,
            )
        storage.region = region
    if file is not None:
        for each in counts:
            file.guard(*each)
    return root, pos


def _check_count(numel: int, name: str, where: str, data: bytes | memoryview) -> None:
    """Check the number of elements before a storage against the pickle."""
    count = int.from_bytes(data, "little", signed=True)
    if count != numel:
        raise SizeMismatch(
            f"the storage {shorten(repr(name))} has {count:,} elements by its own header and {numel:,} by the pickle",
            where=where,
        )


class _Embedded:
    """Replacement for `torch.storage._load_from_bytes`, whose argument is a legacy file with one storage."""

    def __init__(self, file: FileBytes) -> None:
        self.file = file
        self.known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, outer: Services, func: Global, args: Any) -> Any:
        raw = args[0] if type(args) is tuple and len(args) == 1 else None
        if not isinstance(raw, bytes | Blob):
            return NotImplemented
        known = self.known.get(id(raw))
        if known is None:
            known = self.known[id(raw)] = (raw, self._read(outer, raw))
        return known[1]

    def _read(self, outer: Services, raw: bytes | Blob) -> StorageRef:
        whole: Buffer = outer.data
        in_file = isinstance(raw, Blob) and raw.data is None
        if isinstance(raw, bytes):
            whole, begin, stop = raw, 0, len(raw)
        else:
            begin, stop = raw.start, raw.stop
        storages = Storages()
        # Its table of constructors has no entry for such a file, so these files cannot be nested.
        label = f"{outer.label}, a storage within the pickle"
        machine = Machine(whole, stop, label, CONSTRUCTORS, storages, stop - begin, in_file=in_file)
        machine.left, machine.imported = outer.left, outer.imported
        storage, end = read_legacy(machine, storages, begin, stop)
        outer.charge(outer.left - machine.left)
        if type(storage) is not StorageRef or storage.region is None or storage.region.start is None:
            raise Malformed("torch.storage._load_from_bytes of an object that is not a storage")
        if end != stop:
            raise Malformed(f"{plural(stop - end, 'byte')} after the storage within the pickle")
        start = storage.region.start
        storage.inline = Blob(None if in_file else whole, start, start + storage.nbytes)
        return storage
