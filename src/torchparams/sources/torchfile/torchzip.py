"""Source of zip files written by `torch.save`: a pickle, and a member for each storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.errors import FileFormatError, LimitExceeded, shorten
from torchparams.info import Location
from torchparams.io.filebytes import paused_gc
from torchparams.io.opened import bytes_of_file
from torchparams.sources.torchfile._names import Given
from torchparams.sources.torchfile._tree import Contents
from torchparams.sources.torchfile._views import PickledSource, refuse_tensorless
from torchparams.sources.torchfile.archive import Archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torchparams.sources.base import Source
    from torchparams.sources.torchfile._refs import StorageRef, TensorRef


class StoredCrc(NamedTuple):
    """The stored CRC-32 of a zip member.

    Attributes:
        member: Name of the member.
        crc: Stored value; 0 may also mean that it was not computed.
        location: Bytes of the member in the file.
        compressed: Whether the CRC is that of the inflated bytes.
    """

    member: str
    crc: int
    location: Location
    compressed: bool


def open_torch_zip(path: str, inner: str | None = None, *, tensorless: bool = False) -> TorchZipSource:
    """Open a file written by `torch.save` or `torch.jit.save`.

    Args:
        path: The file; its name does not matter.
        inner: Dotted path of the mapping or object to list, or None for everything.
        tensorless: Accept a file without tensors.

    Raises:
        SourceError: The file cannot be read.
        FileFormatError: The file is not a zip, not a checkpoint, or invalid.
        LimitExceeded: The file exceeds a limit in `torchparams.limits`.
        UnknownName: `inner` does not exist.
    """
    with paused_gc():
        return TorchZipSource(Archive(bytes_of_file(path)), inner, tensorless=tensorless)


class ArchiveSource(PickledSource):
    """Tensors in a zip written by torch.

    Args:
        archive: The zip.
        inner: Dotted path of the listed part, or None for everything.
        listing: The listed tensors.
    """

    format = "torch zip"

    def __init__(self, archive: Archive, inner: str | None, listing: Contents | Given) -> None:
        self._archive = archive
        super().__init__(archive.file.whole, inner, listing, archive.machine.imported)

    def check_size(self, name: str) -> None:
        """Raise if a tensor has far more elements than bytes behind them.

        Raises:
            LimitExceeded: The tensor is an expanded view of a few bytes, or a few bytes inflate to it.
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
    """Tensors in a zip written by torch, under names that the caller chose.

    Args:
        archive: The zip.
        tensors: Name → tensor of the zip.
        again: A function that creates the source again, and its arguments; used by copies in other processes.
    """

    def __init__(
        self, archive: Archive, tensors: Mapping[str, TensorRef], again: tuple[Callable[..., Source], tuple[Any, ...]]
    ) -> None:
        super().__init__(archive, None, Given(tensors))
        self._again = again

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again


class TorchZipSource(ArchiveSource):
    """A checkpoint in torch's zip format.

    Args:
        archive: The zip.
        inner: Dotted path of the part to list, or None for everything.
        tensorless: Accept a file without tensors.
    """

    def __init__(self, archive: Archive, inner: str | None, *, tensorless: bool = False) -> None:
        path = archive.file.path
        listing = Contents(archive.root, inner, path, archive.script)
        if archive.is_script:
            listing.metadata["(torchscript)"] = (
                "an archive of torch.jit.save: it lists the parameters and buffers of the modules, "
                "but not the constants of the code, which is not run"
            )
        if not tensorless:
            refuse_tensorless("checkpoint", archive.root, listing, archive.machine, path)
        super().__init__(archive, inner, listing)

    # --- for `verify` ----------------------------------------------------------------------------

    def check_headers(self) -> None:
        """Check the local header of every member against the directory.

        Raises:
            FileFormatError: They contradict each other.
            NotReadable: A member is encrypted, or compressed with a method other than DEFLATE.
        """
        members = self._archive.zip.members.values()
        self._archive.zip.starts(members)
        for member in members:
            self._archive.zip.refuse(member)

    def stored_crcs(self) -> list[StoredCrc]:
        """The stored CRC-32 of each member, in the order of the directory.

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
        """Yield the inflated contents of the member `name` in pieces: the data of its CRC-32.

        Raises:
            FileFormatError: The member is missing, or its compressed contents are damaged.
        """
        member = self._archive.zip.members.get(name)
        if member is None:
            raise FileFormatError(f"the zip has no member {shorten(repr(name))}", where=self._archive.zip.file.path)
        yield from self._archive.zip.chunks(member, self._archive.zip.starts([member])[name])
