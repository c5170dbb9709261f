"""What `torch.save` writes, as a source: a zip with a pickle, and the bytes of each storage as a member of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.errors import FileFormatError, LimitExceeded, shorten
from torchparams.info import Location
from torchparams.io.filebytes import paused_gc
from torchparams.io.opened import bytes_of_file
from torchparams.sources.torchfile._tree import Chosen, Listing
from torchparams.sources.torchfile._views import PickledSource, refuse_tensorless
from torchparams.sources.torchfile.archive import Archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torchparams.sources.base import Source
    from torchparams.sources.torchfile._refs import StorageRef, TensorRef


class StoredCrc(NamedTuple):
    """The CRC-32 that a zip stores of one of its members.

    Attributes:
        member: The member's name.
        crc: The stored value; 0 means that nobody computed it, or that it is 0.
        location: The bytes of the member as they lie in the file.
        compressed: Whether the CRC is that of what they inflate to.
    """

    member: str
    crc: int
    location: Location
    compressed: bool


def open_torch_zip(path: str, inner: str | None = None, *, tensorless: bool = False) -> TorchZipSource:
    """The source that reads what `torch.save` or `torch.jit.save` wrote.

    Args:
        path: The file, whatever its name.
        inner: What to list of it: the dotted path of a mapping or object in it, or None for everything.
        tensorless: Take a file that holds no tensors too.

    Raises:
        SourceError: The file cannot be read.
        FileFormatError: It is no zip, no checkpoint, or breaks a rule of either.
        LimitExceeded: It is larger or more deeply nested than `torchparams.limits` allows.
        UnknownName: There is no `inner` in it.
    """
    with paused_gc():
        return TorchZipSource(Archive(bytes_of_file(path)), inner, tensorless=tensorless)


class ArchiveSource(PickledSource):
    """Tensors in a zip of torch.

    Args:
        archive: The zip.
        inner: The dotted path of what is listed, or None for everything.
        listing: What is listed.
    """

    format = "torch zip"

    def __init__(self, archive: Archive, inner: str | None, listing: Listing | Chosen) -> None:
        self._archive = archive
        super().__init__(archive.file.whole, inner, listing, archive.machine.imported)

    def check_size(self, name: str) -> None:
        """Refuse a tensor that has far more elements than there are bytes behind them.

        Raises:
            LimitExceeded: It is a view that shows a few bytes over and over, or what a few bytes inflate to.
        """
        super().check_size(name)
        storage = self._names[name].tensor.storage
        why = None if storage is None else self._archive.inflates_too_far(storage)
        if why is not None:
            raise LimitExceeded(
                f"{name!r} {why}",
                where=self.label,
                hint="if you trust the file, raise torchparams.limits.INFLATED_RATIO",
            )

    def _inflate(self, storage: StorageRef) -> bytearray:
        return self._archive.inflate(storage)


class ChosenSource(ArchiveSource):
    """Tensors in a zip of torch, under names of the caller's.

    Args:
        archive: The zip.
        tensors: Name → tensor of the zip.
        again: A function that makes the source once more, and its arguments: a copy in another process calls it.
    """

    def __init__(
        self, archive: Archive, tensors: Mapping[str, TensorRef], again: tuple[Callable[..., Source], tuple[Any, ...]]
    ) -> None:
        super().__init__(archive, None, Chosen(tensors))
        self._again = again

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again


class TorchZipSource(ArchiveSource):
    """A checkpoint in torch's zip format.

    Args:
        archive: The zip.
        inner: The dotted path of what to list, or None for everything.
        tensorless: Take one that holds no tensors too.
    """

    def __init__(self, archive: Archive, inner: str | None, *, tensorless: bool = False) -> None:
        path = archive.file.path
        listing = Listing(archive.root, inner, path, archive.script)
        if archive.is_script:
            listing.metadata["(torchscript)"] = (
                "an archive of torch.jit.save: listed are the parameters and buffers of its modules; "
                "constants of its code are not, and its code is not run"
            )
        if not tensorless:
            refuse_tensorless("checkpoint", archive.root, listing, archive.machine, path)
        super().__init__(archive, inner, listing)

    # --- for verifying ---------------------------------------------------------------------------

    def check_headers(self) -> None:
        """Hold the local header of every member against the directory.

        Raises:
            FileFormatError: They contradict each other.
            NotReadable: A member is encrypted, or compressed by something other than DEFLATE.
        """
        members = self._archive.zip.members.values()
        self._archive.zip.starts(members)
        for member in members:
            self._archive.zip.refuse(member)

    def stored_crcs(self) -> list[StoredCrc]:
        """The CRC-32 that the file stores of each of its members, in the order of its directory.

        Raises:
            FileFormatError: A member contradicts the directory.
        """
        members = [member for member in self._archive.zip.members.values() if not member.name.endswith("/")]
        starts = self._archive.zip.starts(members)
        path = self._archive.zip.file.path
        return [
            StoredCrc(
                member.name,
                member.crc,
                Location(path, starts[member.name], starts[member.name] + member.stored),
                member.compressed,
            )
            for member in members
        ]

    def member_chunks(self, name: str) -> Iterator[bytes]:
        """The contents of the member `name`, piece by piece, inflated: what its CRC-32 is that of.

        Raises:
            FileFormatError: It is not there, or its compressed contents are damaged.
        """
        member = self._archive.zip.members.get(name)
        if member is None:
            raise FileFormatError(f"the zip holds no {shorten(repr(name))}", where=self._archive.zip.file.path)
        yield from self._archive.zip.chunks(member, self._archive.zip.starts([member])[name])
