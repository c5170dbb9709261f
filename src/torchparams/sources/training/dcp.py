"""Source of `torch.distributed.checkpoint` (DCP) directories, as written by torchtitan, FSDP2 and Megatron.

`.metadata` is a pickle with the tensors, their shapes and chunks, and the location of each chunk. A chunk is a small
torch zip inside a `.distcp` file; so is an entry that is not a tensor. Listing reads only `.metadata`. It is checked
against the files: each chunk must be inside its file, no two chunks share bytes, and together they tile their tensor.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, NotReadable, shorten
from torchparams.expressions.assembled import Assembled, Chunk
from torchparams.io.filebytes import FilePart, check_name_lengths, paused_gc
from torchparams.io.opened import bytes_of_file
from torchparams.render.tree import listed, plural
from torchparams.sources.torchfile.archive import Archive
from torchparams.sources.torchfile.nodes import TensorRef, describe, plain_copy
from torchparams.sources.torchfile.torchzip import ChosenSource
from torchparams.sources.training._dcp_metadata import Described
from torchparams.sources.training.parted import PartedSource, part_at, parted_info, within

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torchparams.expressions.base import Expression
    from torchparams.expressions.tiling import Box
    from torchparams.io.filebytes import FileBytes
    from torchparams.sources.training._dcp_metadata import Item, Tensor

ENTRIES_READ = 1000
"""Maximum number of entries besides the tensors whose values are read; for others, the size is shown."""

_ENTRY_BYTES = 1 << 20  # a longer entry is described by its size
_ENTRY_DEPTH, _ENTRY_NODES = 8, 10_000


def open_dcp(path: str, inner: str | None = None, label: str | None = None) -> DcpSource:
    """Open the DCP directory `path`.

    Args:
        path: The directory.
        inner: Include only tensors below this name, and remove it from their names: `model`, `optimizer`.
        label: Name in tables and messages; by default, the path and `inner`.

    Raises:
        SourceError: A file cannot be read.
        FileFormatError: `.metadata` is invalid, or disagrees with the files.
        LimitExceeded: `.metadata` is larger than `limits.PICKLE_BYTES`, or runs too many operations.
        UnknownName: No tensor is below `inner`.
    """
    with paused_gc():
        return DcpSource(path, inner, label)


class DcpSource(PartedSource):
    """A distributed checkpoint.

    Args:
        path: The directory.
        inner, label: See `open_dcp`.
    """

    format = "distributed checkpoint"

    def __init__(self, path: str, inner: str | None, label: str | None = None) -> None:
        described = Described(path)
        names = within(path, inner, list(described.tensors), described.entries)
        self._tensors = {short: described.tensors[name] for name, short in names.items()}
        prefix = f"{inner}." if inner else ""
        self._items = {
            name.removeprefix(prefix): item for name, item in described.entries.items() if name.startswith(prefix)
        }
        self._data = described.data
        self._paths = {} if inner else described.paths  # of the whole state dict
        super().__init__(
            label or (f"{path}#{inner}" if inner else path),
            (parted_info(name, each.shape, each.dtype, prod(each.shape)) for name, each in self._tensors.items()),
            (described.file, *described.data.values()),
            imported=described.imported,
            mappings=_mappings(
                {name: described.paths[name] for name in described.tensors if name in described.paths}, prefix
            ),
        )
        check_name_lengths(self._infos.keys(), path)

    def _build(self, name: str) -> Expression:
        tensor = self._tensors[name]
        chunks = [
            Chunk(box.offsets, self._chunk(name, tensor, box, item))
            for box, item in zip(tensor.boxes, tensor.items, strict=True)
        ]
        return chunks[0].x if len(chunks) == 1 else Assembled(tensor.shape, tensor.dtype, chunks)

    def _chunk(self, name: str, tensor: Tensor, box: Box, item: Item) -> Expression:
        called = name if len(tensor.boxes) == 1 else f"{name}{box}"
        _refuse_transforms(item, f"{self.label}: {shorten(called)}")
        file = self._data[item.file]
        archive = Archive(FilePart(file, item.start, item.stop))
        found = archive.root
        if type(found) is not TensorRef:
            raise FileFormatError(
                f"bytes {item.start} to {item.stop} should be a chunk of {shorten(repr(name))}, but hold "
                f"{describe(found)}",
                where=file.path,
            )
        if found.dtype != tensor.dtype or found.shape != box.sizes:
            raise FileFormatError(
                f"{shorten(repr(called))} is {found.dtype} {list(found.shape or ())} in its file, but {tensor.dtype} "
                f"{list(box.sizes)} in .metadata",
                where=file.path,
            )
        part = part_at(self, found, called, file.path)
        return _chunk(file, item, archive).row("chunk") if part is None else part

    def nested(self, leaf: Callable[[str], Any], inner: str | None = None) -> dict[str, Any]:
        """The state dict as it was saved, of dicts and lists, by the paths that the planner recorded.

        Args:
            leaf: Callable that makes the value of a tensor from its name.
            inner: Include only what lies below this path, its keys joined by dots.

        Raises:
            NotReadable: An entry is not made of numbers, texts and containers.
        """
        found: dict[str, Any] = {}
        outer = tuple(inner.split(".")) if inner else ()
        for name, path in self._paths.items():
            if len(path) > len(outer) and tuple(map(str, path[: len(outer)])) == outer:
                value = leaf(name) if name in self._tensors else self._plain(name)
                _put(found, path[len(outer) :], value, self.label)
        return {key: _with_lists(item) for key, item in found.items()}

    def _plain(self, name: str) -> Any:
        """Value of an entry.

        Raises:
            NotReadable: See `nested`.
        """
        item = self._items[name]
        where = f"{self.label}: {shorten(name)}"
        _refuse_transforms(item, where)
        return _plain(Archive(FilePart(self._data[item.file], item.start, item.stop)).root, where)

    def _entries(self) -> Mapping[str, Any]:
        budget = [10 * _ENTRY_NODES]
        shown: dict[str, Any] = {}
        for number, (name, item) in enumerate(self._items.items()):
            size = item.stop - item.start
            if item.transforms:
                shown[name] = f"{plural(size, 'byte')}, written through {', '.join(item.transforms)}"
            elif number >= ENTRIES_READ or size > _ENTRY_BYTES or budget[0] < 0:
                shown[name] = plural(size, "byte")
            else:
                shown[name] = self._entry(item, budget)
        return shown

    def _entry(self, item: Item, budget: list[int]) -> Any:
        """Value of an entry that is not a tensor, or a description of it."""
        part = FilePart(self._data[item.file], item.start, item.stop)
        if part.read(0, min(4, part.size)) != b"PK\3\4":
            return plural(part.size, "byte")
        archive = Archive(part)
        self._imported += tuple(archive.machine.imported)
        allowed = min(_ENTRY_NODES, budget[0])
        left = [allowed]
        copied = plain_copy(archive.root, _ENTRY_DEPTH, left)
        budget[0] -= allowed - max(left[0], 0)
        return copied if left[0] >= 0 else describe(archive.root)


def _chunk(file: FileBytes, item: Item, archive: Archive | None = None) -> ChosenSource:
    """A source with one chunk that is compressed or not in C order."""
    archive = archive or Archive(FilePart(file, item.start, item.stop))
    return ChosenSource(archive, {"chunk": archive.root}, (_chunk_again, (file.path, item)))


def _chunk_again(path: str, item: Item) -> ChosenSource:
    return _chunk(bytes_of_file(path), item)


def _put(root: dict[Any, Any], path: Sequence[str | int], value: Any, where: str) -> None:
    """Put a value into nested dicts; a list is a dict by index until all of it is known."""
    here: Any = root
    for key in path[:-1]:
        here = here.setdefault(key, {})
        if type(here) is not dict:
            break
    if type(here) is not dict or path[-1] in here:
        raise FileFormatError(f"two paths of .metadata collide at {shorten('.'.join(map(str, path)))}", where=where)
    here[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """A value in which dicts by index are lists."""
    if type(value) is not dict:
        return value
    items = {key: _with_lists(item) for key, item in value.items()}
    return [items[i] for i in range(len(items))] if items and items.keys() == set(range(len(items))) else items


def _plain(node: Any, where: str) -> Any:
    """A value made of numbers, texts and containers."""
    kind = type(node)
    if kind is dict:
        return {key: _plain(item, where) for key, item in node.items()}
    if kind in (list, tuple):
        return kind(_plain(item, where) for item in node)
    if kind in (str, bool, int, float, type(None)):
        return node
    raise NotReadable(f"it holds {describe(node)}", where=where)


def _refuse_transforms(item: Item, where: str) -> None:
    if item.transforms:
        raise NotReadable(
            f"its bytes were written through {listed(item.transforms)}, which is not supported",
            where=where,
            hint="save the checkpoint without extensions, or read it with torch.distributed.checkpoint",
        )


def _mappings(paths: Mapping[str, tuple[str | int, ...]], prefix: str) -> list[str]:
    """Mappings of the two outermost levels below a prefix, from the paths that the planner recorded."""
    found: dict[str, None] = {}
    for name, path in paths.items():
        if not name.startswith(prefix):
            continue
        depth = prefix.count(".")
        for length in (depth + 1, depth + 2):
            if len(path) > length:
                found[".".join(map(str, path[depth:length]))] = None
    return list(found)
