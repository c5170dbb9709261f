"""What the sources of training checkpoints have in common: rows that are assembled from parts in several files."""

from __future__ import annotations

from abc import abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, UnknownName, nearest, shorten
from torchparams.expressions.base import Stored
from torchparams.info import Location, ParameterInfo
from torchparams.io.packing import contiguous
from torchparams.render.tree import listed
from torchparams.sources.base import NO_METADATA, Source, reopened
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
    """A table of tensors that lie in parts in several files.

    Args:
        label: The name in tables and messages, which opens it again.
        infos: The records.
        files: The files.
        imported: The globals that its pickles name.
        mappings: What may follow `#` in a target.

    Attributes:
        zips: Whether its parts are zips of torch.
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
        """The expression of a row; asked for once."""

    def _entries(self) -> Mapping[str, Any]:
        """What is beside the tensors; asked for once."""
        return NO_METADATA

    def infos(self) -> Mapping[str, ParameterInfo]:
        """The records."""
        return self._infos

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """The expression of a row. For the first time, the headers of its parts are read."""
        found = self._rows.get(name)
        if found is None:
            name = self.resolve(name)
            found = self._rows[name] = self._build(name)
        return found

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """The values of a row, assembled."""
        from torchparams.expressions.work import evaluate

        return evaluate(self.row(name))

    def span(self, name: str) -> Location | None:
        """The byte range of a row that is one range of a file."""
        return self.row(name).place

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What is beside the tensors."""
        if self._beside is None:
            self._beside = MappingProxyType(dict(self._entries()))
        return self._beside

    @property
    def mappings(self) -> tuple[str, ...]:
        """The mappings that hold tensors."""
        return self._mappings

    @property
    def verdict(self) -> Verdict | None:
        """What unpickling the files would do beside making tensors."""
        return judge(self._imported)

    @property
    def files(self) -> tuple[str, ...]:
        """The files."""
        return self._files

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were listed."""
        for file in self._opened:
            file.check_unchanged()

    def close(self) -> None:
        """Let go of mapped files."""
        for file in self._opened:
            file.close()

    # A copy opens the files itself.
    def __reduce__(self) -> tuple[Any, ...]:
        return reopened(self)


def parted_info(name: str, shape: tuple[int, ...], dtype: DType, numel: int, kind: str = "tensor") -> ParameterInfo:
    """The record of a row: where its parts lie is known when they are read."""
    return ParameterInfo(name, shape, dtype, numel, dtype.nbytes(numel), "file", kind, raw_name=name)


def part_at(source: Source, tensor: TensorRef, name: str, path: str) -> Stored | None:
    """The elements of a tensor as a byte range of a file; None where they are none.

    Args:
        source: The source that the part belongs to.
        tensor: The tensor, as a pickle describes it, with a region for its storage.
        name: The name of the part, for messages.
        path: The file.

    Raises:
        FileFormatError: It is not a tensor that can be read, or reaches beyond its storage.
    """
    storage = tensor.storage
    shape = tensor.shape
    if tensor.problem is not None or shape is None or storage is None:
        raise FileFormatError(f"{shorten(repr(name))} is {tensor.problem or 'no plain tensor'}", where=path)
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
    """The names that lie below `inner`, each with the name that it has there.

    Args:
        label: The checkpoint.
        inner: What follows `#` in the target, or None for all.
        names: The names of its tensors.
        beside: The names of its other entries, for the message.

    Raises:
        UnknownName: There are none.
    """
    if not inner:
        return {name: name for name in names}
    start = f"{inner}."
    found = {name: name[len(start) :] for name in names if name.startswith(start)}
    if not found:
        heads = dict.fromkeys(name.partition(".")[0] for name in (*names, *beside))
        near = nearest(inner, list(heads)[:2000])
        raise UnknownName(
            f"no tensor of it lies below {inner!r}",
            where=label,
            exists=f"its names begin with {listed([shorten(head, 40) for head in heads], 8)}",
            hint=f"did you mean '#{near[0]}'?" if near else None,
        )
    return found
