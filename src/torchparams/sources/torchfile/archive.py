"""A zip written by `torch.save`: the contents of its pickle, and the location of each storage.

Listing reads the directory of the zip, the pickle, and thirty bytes before each storage. For a remote file, those bytes
are read together with the storage.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torchparams import limits
from torchparams.errors import (
    FileFormatError,
    LimitExceeded,
    SizeMismatch,
    TrailingBytes,
    TruncatedFile,
    shorten,
)
from torchparams.io.paths import is_url
from torchparams.render.tree import plural
from torchparams.sources.torchfile._pickle import Machine
from torchparams.sources.torchfile._rebuild import CONSTRUCTORS
from torchparams.sources.torchfile._refs import Region, StorageRef, Storages
from torchparams.sources.torchfile._script import ScriptCode
from torchparams.sources.torchfile._zip import Member, ZipDirectory

if TYPE_CHECKING:
    from torchparams.io.filebytes import FileBytes
    from torchparams.sources.torchfile._pickle_values import Buffer

_PICKLE = "data.pkl"
_ZIP_HEADS = (b"PK\3\4", b"PK\5\6")
_LEGACY_HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_INFLATED_FREE = 64 << 20  # tensors may inflate to this size with any ratio
_INFLATED_PICKLE = 32 << 20  # a compressed pickle may inflate to this, or to twice the size of the file


class Archive:
    """A zip written by torch.

    Args:
        file: The file, or the part of a file that is the zip.

    Attributes:
        file: The same.
        zip: Directory of the zip.
        folder: Top folder, with the slash.
        root: Contents of the pickle; nothing was built.
        machine: The interpreter that ran the pickle.
        storages: Storages that the pickle names, with their regions.

    Raises:
        FileFormatError: The file is not a zip, not a checkpoint, or invalid.
        LimitExceeded: The file exceeds a limit in `torchparams.limits`.
    """

    def __init__(self, file: FileBytes) -> None:
        _check_head(file)
        self.file = file
        self.zip = ZipDirectory(file)
        self.folder = _find_folder(self.zip)
        pickle = self.zip.members[self.folder + _PICKLE]
        order = self.zip.members.get(self.folder + "byteorder")
        self._starts = self.zip.starts([pickle] if order is None else [pickle, order])
        self._big_endian_file = order is not None and self._read_order(order)
        label = f"{file.path}, {shorten(pickle.name)}"

        buffer, begin, stop = self._pickle_buffer(pickle, label)
        self.storages = Storages()
        # Positions in the pickle are file offsets if it is stored uncompressed.
        in_file = not pickle.compressed and not file.base and not is_url(file.path)
        self.machine = Machine(buffer, stop, label, CONSTRUCTORS, self.storages, file.size, in_file=in_file)
        self.root, end = self.machine.load(begin)
        if end != stop:
            raise TrailingBytes(f"{plural(stop - end, 'byte')} after the end of the pickle, at byte {end}", where=label)
        self._place_storages()

    @property
    def is_script(self) -> bool:
        """Whether `torch.jit.save` wrote it."""
        return self.folder + "constants.pkl" in self.zip.members

    @property
    def script(self) -> ScriptCode:
        """Parameters and buffers that its code declares."""
        return ScriptCode(self.zip, self.folder)

    def _read_order(self, member: Member) -> bool:
        if member.size > 16:
            text = b""
        else:
            text = b"".join(self.zip.chunks(member, self._starts[member.name])).strip()
        if text not in (b"little", b"big"):
            raise FileFormatError(
                f"{shorten(member.name)} is {shorten(repr(text)) if text else 'too long'}, neither 'little' nor 'big'",
                where=self.zip.file.path,
            )
        return text == b"big"

    def _pickle_buffer(self, pickle: Member, label: str) -> tuple[Buffer, int, int]:
        """Buffer that contains the pickle, and the range of the pickle in it."""
        file = self.zip.file
        if pickle.size > limits.PICKLE_BYTES:
            raise LimitExceeded(
                f"the pickle has {pickle.size:,} bytes; the limit is {limits.PICKLE_BYTES:,}",
                where=label,
                hint="if you trust the file, raise torchparams.limits.PICKLE_BYTES",
            )
        self.zip.refuse(pickle)
        begin = self._starts[pickle.name]
        if not pickle.compressed:
            if is_url(file.path):  # only this part was downloaded
                return file.view(begin, begin + pickle.size), 0, pickle.size
            return file.view(0, file.size), begin, begin + pickle.size
        most = min(limits.PICKLE_BYTES, _INFLATED_PICKLE + 2 * file.size)
        return bytes(self.zip.inflate(pickle, begin, most)), 0, pickle.size

    def member(self, storage: StorageRef) -> Member:
        """The zip member of a storage."""
        name = f"{self.folder}data/{storage.key}"
        member = self.zip.members.get(name)
        if member is None:
            there = sum(other.startswith(self.folder + "data/") for other in self.zip.members)
            raise FileFormatError(
                f"the zip lacks {shorten(repr(name))}, the storage of a tensor",
                where=self.zip.file.path,
                exists=f"it holds {plural(there, 'storage')}",
            )
        return member

    def _place_storages(self) -> None:
        """Find the member of each storage and set its region."""
        placed = [(storage, self.member(storage)) for storage in self.storages]
        members = {member.name: member for _, member in placed}
        expected = self.zip.expected(members.values(), self._starts) if is_url(self.file.path) else None
        starts = self.zip.starts(members.values()) if expected is None else expected
        compressed = {member.name: member for _, member in placed if member.compressed}.values()
        self._deflated = sum(member.stored for member in compressed)
        self._inflates_to = sum(member.size for member in compressed)
        for storage, member in placed:
            if storage.nbytes != member.size and not storage.is_view:
                raise SizeMismatch(
                    f"{shorten(repr(member.name))} has {member.size:,} bytes, but its storage of {storage.numel:,} × "
                    f"{storage.dtype} takes {storage.nbytes:,}",
                    where=self.zip.file.path,
                )
            start = None if member.compressed else self.file.base + starts[member.name]
            problem = None if member.problem is None else f"{shorten(repr(member.name))} {member.problem}"
            storage.region = Region(start, member.size, self._big_endian_file, problem, expected is not None)
        self._starts |= starts
        for name, begin in (expected or {}).items():
            member = members[name]
            self.file.guard(begin, begin + member.stored, member.header, partial(self.zip.confirm, member, begin))

    def inflates_too_far(self, storage: StorageRef) -> str | None:
        """Why a compressed storage must not be inflated; None if it may be."""
        if self._inflates_to <= _INFLATED_FREE + limits.INFLATED_RATIO * self._deflated:
            return None
        if storage.inline is not None or not self.member(storage).compressed:
            return None
        return (
            f"is compressed: the tensors inflate from {self._deflated:,} to {self._inflates_to:,} bytes, and the limit "
            f"is {limits.INFLATED_RATIO}-fold"
        )

    def inflate(self, storage: StorageRef) -> bytearray:
        """Bytes of a compressed storage."""
        member = self.member(storage)
        return self.zip.inflate(member, self._starts[member.name], limits.INFLATED_BYTES)


def _check_head(file: FileBytes) -> None:
    """Raise if the file is not a zip, and say what it is."""
    head = file.read(0, min(file.size, 16))
    if head[:4] in _ZIP_HEADS:
        return
    if any(start.startswith(head) for start in (*_ZIP_HEADS, _LEGACY_HEAD)):
        raise TruncatedFile(f"the file ends after {plural(file.size, 'byte')}, within its first mark", where=file.path)
    raise FileFormatError(
        f"not a torch checkpoint: it starts with {head[:8]!r}",
        where=file.path,
        exists="files of torch.save start with b'PK\\x03\\x04', older ones with b'\\x80\\x02\\x8a\\n'",
    )


def _find_folder(directory: ZipDirectory) -> str:
    """The folder that holds `data.pkl`, with its slash; usually the stem of the file name when it was saved."""
    members = directory.members
    found = [name for name in members if name == _PICKLE or (name.endswith("/" + _PICKLE) and name.count("/") == 1)]
    if len(found) == 1:
        return found[0].removesuffix(_PICKLE)
    where = directory.file.path
    if found:
        raise FileFormatError(
            f"the zip holds {len(found)} pickles: {shorten(', '.join(found))}; a checkpoint has one", where=where
        )
    names = [name for name in members if not name.endswith("/")]
    what, hint = _what_zip(names)
    shown = ", ".join(shorten(name, 40) for name in names[:4])
    more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
    raise FileFormatError(
        f"the zip is not a torch checkpoint: it has no {_PICKLE} in its top folder{what}",
        where=where,
        exists=f"it holds {shown}{more}" if names else "it is empty",
        hint=hint,
    )


def _what_zip(names: list[str]) -> tuple[str, str | None]:
    """What kind of zip has these members, and what to do with it."""
    known = set(names)
    if names and all(name.endswith(".npy") for name in names):
        return "; it is a numpy .npz archive", "read it with torchparams.of(dict(numpy.load(path)))"
    if "[Content_Types].xml" in known:
        return "; it is an office document", "pass the checkpoint itself"
    if "model.weights.h5" in known:
        return "; it is a Keras model", "load it with keras, and pass its weights as a mapping to torchparams.of"
    if "META-INF/MANIFEST.MF" in known:
        return "; it is a Java archive", "pass the checkpoint itself"
    if any(name.endswith(".pb") for name in names):
        return (
            "; it is a network of caffe2",
            "read it with caffe2 of torch before 2.4, and pass its blobs as a mapping to torchparams.of",
        )
    if any(name.endswith(("/archive_format", "/archive_version")) for name in names):
        return "; it is a program of torch.export", "load it with torch.export.load, and pass its state_dict"
    if any(name.rpartition("/")[2] == "model.json" for name in names):
        return (
            "; it is a TorchScript archive of torch before 1.4, in caffe2's layout",
            "load it with torch.jit.load, and pass the model or save it again",
        )
    if any("/.data/" in name for name in names) and any(name.endswith(".pkl") for name in names):
        return "; it is an archive of torch.package", "load it with torch.package, and pass the model"
    inside = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))]
    if inside:
        return "", f"unpack it, and open {inside[0]}"
    return "", None
