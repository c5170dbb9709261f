"""The `.metadata` file of a distributed checkpoint, checked against the other files."""

from __future__ import annotations

import os
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams import limits
from torchparams.errors import FileFormatError, LimitExceeded, SourceError, shorten
from torchparams.expressions.tiling import Box, fault
from torchparams.io.folders import entries
from torchparams.io.opened import bytes_of_file
from torchparams.io.paths import is_url, join
from torchparams.render.tree import plural
from torchparams.sources.torchfile.nodes import (
    DTYPES,
    SIZE_LIMIT,
    Global,
    OddKey,
    Pickled,
    Reduced,
    describe,
    fields_of,
    is_size,
    sizes_of,
    unpickled,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.dtypes import DType
    from torchparams.io.filebytes import FileBytes

METADATA = ".metadata"
"""The file that describes a checkpoint."""

_DEPTH = 64  # of a state dict

_DENSE_BYTES = 16 << 20  # up to this size, every two bytes of `.metadata` may be an operation of its pickle

Places = list[tuple[tuple[int, ...] | None, "Item"]]
"""Offsets of each chunk of a tensor, and its location."""


class Item(NamedTuple):
    """Location of a chunk, or of an entry that is not a tensor.

    Attributes:
        file: Name of the file in the directory.
        start, stop: Byte range in the file.
        transforms: Transformations applied to the bytes when they were written.
    """

    file: str
    start: int
    stop: int
    transforms: tuple[str, ...]


class Tensor(NamedTuple):
    """A tensor, as `.metadata` describes it.

    Attributes:
        shape, dtype: Shape and dtype of the whole tensor.
        boxes: Its chunks.
        items: Location of each chunk.
    """

    shape: tuple[int, ...]
    dtype: DType
    boxes: list[Box]
    items: list[Item]


class Described:
    """Contents of `.metadata`, checked against the files.

    Attributes:
        tensors: Tensors by name.
        entries: Locations of entries that are not tensors, by name.
        paths: Path of each tensor and entry in the state dict, by name; an index of a list is a number. Empty if the
            planner recorded none.
        data: The files, by name in the directory.
        file: The `.metadata` file.
        imported: Globals that it names.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = join(folder, METADATA)
        self.file = bytes_of_file(self.path)
        root, self.imported = self._unpickled()
        fields = self._fields(root, "Metadata")
        self.data: dict[str, FileBytes] = {}
        places = self._places(fields.get("storage_data"))
        self.tensors: dict[str, Tensor] = {}
        self.entries: dict[str, Item] = {}
        for name, value in self._dict(fields.get("state_dict_metadata"), "its state_dict_metadata").items():
            if type(name) is not str:
                raise self._error(f"a name of its state_dict_metadata is {describe(name)}")
            of_name = places.pop(name, [])
            if _is_entry(value):
                self._entry(name, of_name)
            else:
                self.tensors[name] = self._tensor(name, value, of_name)
        if places:
            name = next(iter(places))
            raise self._error(f"it has the location of {shorten(repr(name))}, but does not describe it")
        self._check_apart()
        self.paths = self._paths(fields.get("planner_data"))

    def _unpickled(self) -> Pickled:
        size = self.file.size
        if size > limits.PICKLE_BYTES:
            raise LimitExceeded(
                f"it has {size:,} bytes; the limit is {limits.PICKLE_BYTES:,}",
                where=self.path,
                hint="if you trust the file, raise torchparams.limits.PICKLE_BYTES",
            )
        # An operation of this pickle takes two bytes. A small file may be that dense, and the entries of a large file
        # have chunks.
        total = 0
        if not is_url(self.folder):
            with os.scandir(self.folder) as there:
                total = sum(each.stat().st_size for each in there if each.is_file())
        return unpickled(self.file.read(0, size), self.path, total + 16 * min(size, _DENSE_BYTES))

    def _error(self, what: str) -> FileFormatError:
        return FileFormatError(what, where=self.path)

    def _fields(self, node: Any, kind: str, name: str = "") -> Mapping[Any, Any]:
        """The attributes of an object of class `kind`; `name` is for the message."""
        found = fields_of(node, kind)
        if found is None:
            of = f" of {shorten(repr(name))}" if name else ""
            raise self._error(f"it holds {describe(node)}{of} instead of a {kind}")
        return found

    def _dict(self, value: Any, what: str) -> dict[Any, Any]:
        if type(value) is not dict:
            raise self._error(f"{what} is {describe(value)}, not a dict")
        return value

    # --- locations of the parts --------------------------------------------------------------

    def _places(self, storage_data: Any) -> dict[str, Places]:
        """Offsets and location of each chunk, by name."""
        found: dict[str, Places] = {}
        for key, value in self._dict(storage_data, "its storage_data").items():
            index = key.value if type(key) is OddKey else key
            fields = self._fields(index, "MetadataIndex")
            name, given = fields.get("fqn"), fields.get("offset")
            if type(name) is not str:
                raise self._error(f"a key of its storage_data names {describe(name)}")
            offsets = None if given is None else sizes_of(given)
            if given is not None and offsets is None:
                raise self._error(f"a chunk of {shorten(repr(name))} has the offsets {describe(given)}")
            found.setdefault(name, []).append((offsets, self._item(name, value)))
        return found

    def _item(self, name: str, value: Any) -> Item:
        fields = self._fields(value, "_StorageInfo", name)
        file: Any = fields.get("relative_path")
        start: Any = fields.get("offset")
        length: Any = fields.get("length")
        if type(file) is not str or not is_size(start) or not is_size(length):
            raise self._error(
                f"{shorten(repr(name))} lies at {describe(start)} and {describe(length)} more of {describe(file)}"
            )
        if file not in self.data:
            self.data[file] = self._opened(name, file)
        size = self.data[file].size
        if start + length > size:
            raise self._error(
                f"{shorten(repr(name))} lies in bytes {start} to {start + length} of {shorten(file)}, "
                f"which has {size:,}"
            )
        transforms = fields.get("transform_descriptors")
        if not transforms:
            return Item(file, start, start + length, ())
        if type(transforms) not in (list, tuple) or not all(type(each) is str for each in transforms):
            raise self._error(f"{shorten(repr(name))} was written through {describe(transforms)}")
        return Item(file, start, start + length, tuple(shorten(each, 40) for each in transforms[:4]))

    def _opened(self, name: str, file: str) -> FileBytes:
        # Only the text is checked, as for an index. Links are followed.
        parts = file.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in file or "\0" in file or file[1:2] == ":":
            raise self._error(
                f"it puts {shorten(repr(name))} into {shorten(repr(file))}, which is not a file below its own directory"
            )
        try:
            return bytes_of_file(join(self.folder, file))
        except SourceError as error:
            there = sum(each.endswith(".distcp") for each in entries(self.folder))
            raise FileFormatError(
                f"{shorten(file)}, which holds {shorten(repr(name))}, cannot be opened: {error.what}",
                where=self.folder,
                exists=f"{plural(there, '.distcp file is', '.distcp files are')} there",
                hint="the rank that writes it may not have finished; wait for it, or copy the whole directory",
            ) from None

    def _check_apart(self) -> None:
        """Raise if parts share bytes: no writer does this, and a small file would seem large."""
        items = [(item, name) for name, each in self.tensors.items() for item in each.items]
        items += [(item, name) for name, item in self.entries.items()]
        items.sort(key=lambda pair: pair[0][:3])
        for (first, one), (second, other) in pairwise(items):
            if first.file == second.file and second.start < first.stop:
                raise self._error(
                    f"{shorten(repr(one))} in bytes {first.start} to {first.stop} of {shorten(first.file)} overlaps "
                    f"{shorten(repr(other))} at byte {second.start}"
                )

    # --- contents ----------------------------------------------------------------------------

    def _entry(self, name: str, places: Places) -> None:
        if len(places) != 1:
            raise self._error(f"the entry {shorten(repr(name))} has {len(places)} locations, not one")
        self.entries[name] = places[0][1]

    def _tensor(self, name: str, value: Any, places: Places) -> Tensor:
        called = shorten(repr(name))
        fields = self._fields(value, "TensorStorageMetadata", name)
        dtype = self._dtype(fields.get("properties"), called)
        shape = sizes_of(fields.get("size"))
        if shape is None or prod(shape) > SIZE_LIMIT:
            raise self._error(f"{called} has the shape {describe(fields.get('size'))}")
        chunks = fields.get("chunks")
        if type(chunks) is not list:
            raise self._error(f"the chunks of {called} are {describe(chunks)}")
        boxes = [self._box(chunk, name) for chunk in chunks]
        boxes.sort()
        wrong = fault(shape, boxes)
        if wrong is not None:
            raise self._error(f"{called} {wrong}")
        # The offset None stands for the only chunk.
        placed = sorted(((offsets or (0,) * len(shape), item) for offsets, item in places), key=lambda pair: pair[0])
        if [offsets for offsets, _ in placed] != [box.offsets for box in boxes]:
            lost = next((box for box in boxes if all(offsets != box.offsets for offsets, _ in placed)), None)
            raise self._error(
                f"it does not have the location of {called}{lost}"
                if lost is not None
                else f"it has {plural(len(placed), 'location')} for the {plural(len(boxes), 'chunk')} of {called}"
            )
        items = [item for _, item in placed]
        for box, item in zip(boxes, items, strict=True):
            needed = dtype.nbytes(prod(box.sizes))
            if item.stop - item.start < needed and not item.transforms:
                raise self._error(
                    f"{called}{box} takes {needed:,} bytes as {dtype}, but has {item.stop - item.start:,} in "
                    f"{shorten(item.file)}"
                )
        return Tensor(shape, dtype, boxes, items)

    def _dtype(self, properties: Any, called: str) -> DType:
        # The state is a tuple that begins with the dtype.
        state = properties.state if type(properties) is Reduced else None
        kind = state[0] if type(state) is tuple and state else None
        found = DTYPES.get(kind.name) if type(kind) is Global and kind.module == "torch" else None
        if found is None:
            raise self._error(f"{called} has the dtype {describe(kind)}, which is unknown")
        return found

    def _box(self, chunk: Any, name: str) -> Box:
        fields = self._fields(chunk, "ChunkStorageMetadata", name)
        offsets, sizes = sizes_of(fields.get("offsets")), sizes_of(fields.get("sizes"))
        if offsets is None or sizes is None:
            said = " and sizes ".join(describe(fields.get(key)) for key in ("offsets", "sizes"))
            raise self._error(f"a chunk of {shorten(repr(name))} has the offsets {said}")
        return Box(offsets, sizes)

    def _paths(self, planner_data: Any) -> dict[str, tuple[str | int, ...]]:
        """Path of each tensor and entry in the state dict; empty if the planner recorded something else."""
        if type(planner_data) is not dict:
            return {}
        return {
            name: path
            for name, path in planner_data.items()
            if (name in self.tensors or name in self.entries) and _is_path(path)
        }


def _is_path(value: Any) -> bool:
    """Whether a value is the path of something in a state dict."""
    return type(value) is tuple and 0 < len(value) <= _DEPTH and all(type(key) is str or is_size(key) for key in value)


def _is_entry(node: Any) -> bool:
    """Whether a node stands for an entry that is not a tensor; it has no attributes."""
    return type(node) is Reduced and type(node.func) is Global and node.func.name == "BytesStorageMetadata"
