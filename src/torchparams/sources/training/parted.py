"""Base of the sources of training checkpoints: rows assembled from parts in several files."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, UnknownName, nearest, shorten
from torchparams.expressions.base import Stored
from torchparams.info import Location, ParameterInfo
from torchparams.io.packing import contiguous
from torchparams.render.tree import listed
from torchparams.sources.base import NO_METADATA, Source
from torchparams.sources.opening import reopened
from torchparams.sources.torchfile.verdict import judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression
    from torchparams.io.filebytes import FileBytes
    from torchparams.sources.torchfile.nodes import Global, TensorRef
    from torchparams.sources.torchfile.verdict import Verdict


class PartedSource(Source):
    """Tensors whose parts are in several files.

    Args:
        label: Name in tables and messages; opening it gives the same source.
        infos: Infos of the tensors.
        files: The files.
        imported: Globals that the pickles name.
        mappings: Names that may follow `#` in a target.

    Attributes:
        zips: Whether its parts are torch zips.
    """

    zips = True

    def __init__(
        self,
        label: str,
        infos: Iterable[ParameterInfo],
        files: Sequence[FileBytes],
        *,
        imported: Iterable[Global] = (),
        mappings: Sequence[str] = (),
    ) -> None:
        self.label = label
        self._infos = MappingProxyType({info.name: info for info in infos})
        self._opened = tuple(files)
        self._files = tuple(dict.fromkeys(file.path for file in files))
        self._imported = tuple(imported)
        self._mappings = tuple(mappings)
        self._rows: dict[str, Expression] = {}
        self._beside: Mapping[str, Any] | None = None

    @abstractmethod
    def _build(self, name: str) -> Expression:
        """Make the expression of a row; called once."""

    def _entries(self) -> Mapping[str, Any]:
        """Entries besides the tensors; called once."""
        return NO_METADATA

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos of the tensors."""
        return self._infos

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """Expression of a row; the first call reads the headers of its parts."""
        found = self._rows.get(name)
        if found is None:
            name = self.resolve(name)
            found = self._rows[name] = self._build(name)
        return found

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Values of a row, assembled."""
        from torchparams.expressions.work import evaluate

        return evaluate(self.row(name))

    def span(self, name: str) -> Location | None:
        """Byte range of a row that is one range of a file."""
        return self.row(name).place

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Entries besides the tensors."""
        if self._beside is None:
            self._beside = MappingProxyType(dict(self._entries()))
        return self._beside

    @property
    def mappings(self) -> tuple[str, ...]:
        """Mappings that hold tensors."""
        return self._mappings

    @property
    def verdict(self) -> Verdict | None:
        """What unpickling the files would do besides building tensors."""
        return judge(self._imported)

    @property
    def files(self) -> tuple[str, ...]:
        """The files."""
        return self._files

    def check_unchanged(self) -> None:
        """Raise if a file was changed after it was listed."""
        for file in self._opened:
            file.check_unchanged()

    def close(self) -> None:
        """Close mapped files."""
        for file in self._opened:
            file.close()

    # A copy opens the files itself.
    def __reduce__(self) -> tuple[Any, ...]:
        return reopened(self)


def parted_info(name: str, shape: tuple[int, ...], dtype: DType, numel: int, kind: str = "tensor") -> ParameterInfo:
    """The info of a row; the location of its parts is known only when they are read."""
    return ParameterInfo(name, shape, dtype, numel, dtype.nbytes(numel), "file", kind, raw_name=name)


def part_at(source: Source, tensor: TensorRef, name: str, path: str) -> Stored | None:
    """The elements of a tensor as a byte range of a file; None if they are not one range.

    Args:
        source: Source that the part belongs to.
        tensor: The tensor as described in a pickle, whose storage has a region.
        name: Name of the part, for messages.
        path: The file.

    Raises:
        FileFormatError: The tensor cannot be read, or reaches beyond its storage.
    """
    storage = tensor.storage
    shape = tensor.shape
    if tensor.problem is not None or shape is None or storage is None:
        raise FileFormatError(f"{shorten(repr(name))} is {tensor.problem or 'not a plain tensor'}", where=path)
    region = storage.region
    bits = tensor.bits
    numel = 1
    for size in shape:
        numel *= size
    if storage.inline is not None or region is None or region.start is None or region.problem is not None:
        return None
    if tensor.conj or tensor.neg or (region.big_endian and tensor.dtype.itemsize > 1):
        return None
    if numel and any(
        size > 1 and step != wanted for size, step, wanted in zip(shape, tensor.stride, contiguous(shape), strict=True)
    ):
        return None
    first = storage.start * storage.dtype.bits + tensor.offset * bits
    if numel and (first + numel * bits > region.nbytes * 8 or (tensor.offset + numel) * bits > storage.nbytes * 8):
        raise FileFormatError(
            f"{shorten(repr(name))} is a view of elements {tensor.offset:,} to {tensor.offset + numel - 1:,} "
            f"of a storage of {storage.nbytes * 8 // bits:,}",
            where=path,
        )
    begin = region.start + first // 8
    place = Location(path, begin, begin + (numel * bits + 7) // 8)
    info = parted_info(name, shape, tensor.dtype, numel)
    return Stored.at(place, source, info)


def within(label: str, inner: str | None, names: Sequence[str], beside: Iterable[str]) -> dict[str, str]:
    """Names below `inner`, with their names relative to it.

    Args:
        label: The checkpoint.
        inner: Text after `#` in the target, or None for all.
        names: Names of the tensors.
        beside: Names of the other entries, for the message.

    Raises:
        UnknownName: There are no such names.
    """
    if not inner:
        return {name: name for name in names}
    start = f"{inner}."
    found = {name: name[len(start) :] for name in names if name.startswith(start)}
    if not found:
        heads = dict.fromkeys(name.partition(".")[0] for name in (*names, *beside))
        near = nearest(inner, list(heads)[:2000])
        raise UnknownName(
            f"no tensor is below {inner!r}",
            where=label,
            exists=f"its names begin with {listed([shorten(head, 40) for head in heads], 8)}",
            hint=f"did you mean '#{near[0]}'?" if near else None,
        )
    return found
