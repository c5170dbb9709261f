"""Source of tensors that are views of storages in a file: checking, listing and reading them.

This part is common to all torch formats. `torchzip.py` and `legacy.py` find the storages.
"""

from __future__ import annotations

from functools import cached_property
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import FileFormatError, LimitExceeded, NotReadable, shorten
from torchparams.expressions.base import Stored
from torchparams.info import Location, ParameterInfo, Storage, file_tensor
from torchparams.io.filebytes import FileBytes, as_array
from torchparams.io.packing import contiguous
from torchparams.sources.base import Source
from torchparams.sources.opening import reopened
from torchparams.sources.torchfile._describe import describe
from torchparams.sources.torchfile._pickle_values import Blob, Malformed
from torchparams.sources.torchfile._refs import Region, StorageRef, TensorRef, numel_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch

    from torchparams.encodings.base import Structure
    from torchparams.expressions.base import Expression
    from torchparams.left_out import LeftOut
    from torchparams.sources.torchfile._names import Given, Named
    from torchparams.sources.torchfile._pickle_values import Global, Services
    from torchparams.sources.torchfile._tree import Contents
    from torchparams.sources.torchfile.verdict import Verdict


def refuse_tensorless(what: str, root: Any, listing: Contents, machine: Services, path: str) -> None:
    """Raise if a pickle has no tensors, unless it is an empty mapping: the state of a model without parameters.

    Args:
        what: Name of the format in the message.
        root: Contents of the pickle.
        listing: Its tensors.
        machine: The interpreter that ran the pickle.
        path: The file.

    Raises:
        FileFormatError: The pickle has no tensors.
    """
    if listing.names or (root == {} and what != "pickle"):
        return
    from torchparams.sources.torchfile.verdict import judge

    alarm = judge(machine.imported).alarm
    raise FileFormatError(
        f"the {what} contains no tensors and no numeric arrays: it is {describe(root)}",
        where=path,
        hint=None if alarm is None else f"it {alarm}",
    )


class PickledSource(Source):
    """A file whose pickle describes tensors as views of storages that were located in the file.

    Args:
        file: The file.
        inner: Text after `#` in the target, or None.
        listing: Contents of the pickle.
        imported: Globals that the pickle names.
    """

    def __init__(
        self, file: FileBytes, inner: str | None, listing: Contents | Given, imported: Sequence[Global]
    ) -> None:
        self.label = f"{file.path}#{inner}" if inner else file.path
        self._file = file
        self._names = listing.names
        self._entries = {name: entry for name, entry in listing.names.items() if name == entry.name}
        self._metadata = MappingProxyType(listing.metadata)
        self._left_out = tuple(listing.left_out)
        self._mappings = tuple(listing.mappings)
        self._structures = tuple(listing.structures)
        self._imported = imported
        self._inline_keys: dict[int, str] = {}
        self._expected: dict[str, Location] = {}  # of a remote zip, whose local headers are read with the values
        self._inflated: Any = None
        self._lock = Lock()
        self._described = {name: self._describe(entry) for name, entry in self._entries.items()}
        self._infos = MappingProxyType(self._described)
        file.close()  # mapped again, and checked for changes, when values are read

    def _inflate(self, storage: StorageRef) -> bytearray:
        """Bytes of a compressed storage."""
        raise NotImplementedError  # only a format with compression has any

    @cached_property
    def _stored(self) -> dict[str, int]:
        """Number of elements stored in each memory."""
        found: dict[str, int] = {}
        for info in self._infos.values():
            if info.storage is not None and info.storage.key not in found:
                found[info.storage.key] = info.storage.nbytes * 8 // info.dtype.bits
        return found

    @cached_property
    def _beyond(self) -> tuple[dict[tuple[str, bool], int], dict[bool, int], int]:
        """Number of elements that the views of one memory show beyond the stored ones, their sums, and the stored
        number.

        Views that alone exceed their memory are counted separately (True) from views that exceed it together (False).
        """
        shown: dict[tuple[str, bool], int] = {}
        for info in self._infos.values():
            if info.storage is not None:
                group = info.storage.key, info.numel > self._stored[info.storage.key]
                shown[group] = shown.get(group, 0) + info.numel
        beyond = {group: count for group, count in shown.items() if count > self._stored[group[0]]}
        totals = {own: sum(n for group, n in beyond.items() if group[1] is own) for own in (False, True)}
        return beyond, totals, sum(self._stored.values())

    def check_size(self, name: str) -> None:
        """Raise if a tensor has far more elements than bytes behind them.

        Raises:
            LimitExceeded: The views of this memory exceed it, and the file exceeds the limit on such elements.
        """
        info = self._infos[self._names[name].name]
        if info.storage is None:
            return
        beyond, totals, stored = self._beyond
        own = info.numel > self._stored[info.storage.key]
        count = beyond.get((info.storage.key, own), 0)
        if count and totals[own] > limits.EXPANDED_ELEMENTS + 8 * stored:
            behind = f"{info.storage.nbytes:,} bytes"
            raise LimitExceeded(
                f"{info.name!r} has {info.numel:,} elements, which are a view of {behind}"
                if own
                else f"{info.name!r} is one of several views of {behind} that have {count:,} elements together",
                where=self.label,
                hint="if you trust the file, raise torchparams.limits.EXPANDED_ELEMENTS",
            )

    # --- listing ---------------------------------------------------------------------------------

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos by name, in the order of the file."""
        return self._infos

    def takes(self, name: str) -> bool:
        """Whether `name` is the name of a tensor, including aliases."""
        return name in self._names

    def find(self, name: str) -> str | None:
        """Canonical name for a name or alias; None if there is no such tensor."""
        entry = self._names.get(name)
        return None if entry is None else entry.name

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Contents of the file besides tensors: plain values, and descriptions of objects."""
        return self._metadata

    @property
    def structures(self) -> Sequence[Structure]:
        """Tensors of torchao classes, which are listed by the tensors that they keep."""
        return self._structures

    @property
    def mappings(self) -> tuple[str, ...]:
        """Mappings that hold tensors, from the two outermost levels."""
        return self._mappings

    @cached_property
    def verdict(self) -> Verdict:
        """What unpickling the file would do besides building tensors."""
        from torchparams.sources.torchfile.verdict import judge

        return judge(self._imported)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Entries that hold the state of a layer but are not tensors: extra state, packed weights."""
        return self._left_out

    @property
    def files(self) -> tuple[str, ...]:
        """The file."""
        return (self._file.path,)

    def check_unchanged(self) -> None:
        """Raise if the file was changed after it was listed."""
        self._file.check_unchanged()

    # A copy opens the files itself.
    def __reduce__(self) -> tuple[Any, ...]:
        return reopened(self)

    def close(self) -> None:
        """Close the mapped file; it is mapped again when values are read."""
        self._file.close()

    def _describe(self, entry: Named) -> ParameterInfo:
        """Info of one tensor; its view is checked against its storage."""
        tensor, storage = entry.tensor, entry.tensor.storage
        name, shape, dtype = entry.name, tensor.shape, tensor.dtype
        start = stop = memory = None
        numel = 0
        try:
            if shape is not None:
                numel = numel_of(shape)
                if storage is not None:
                    start, stop, memory = self._place(tensor, storage, shape)
        except Malformed as error:
            raise FileFormatError(str(error), where=self._where(name)) from None
        nbytes = (numel * tensor.bits + 7) // 8 if tensor.nbytes is None else tensor.nbytes
        path = self._file.path
        known = entry.kind != "tensor" or tensor.requires_grad
        hidden = storage is not None and storage.region is not None and storage.region.expected
        if hidden and start is not None and stop is not None:
            self._expected[name] = Location(path, start, stop)
        if (
            start is not None
            and stop is not None
            and not (hidden or known or entry.aliases or entry.module or tensor.layout)
        ):
            return file_tensor(name, shape or (), dtype, numel, nbytes, path, start, stop, memory)
        return ParameterInfo(
            name=name,
            shape=None if tensor.ragged else shape,
            dtype=dtype,
            numel=numel,
            nbytes=nbytes,
            device="meta" if tensor.meta else "file",
            kind=entry.kind,
            requires_grad=tensor.requires_grad if known else None,
            module=entry.module,
            raw_name=name,
            aliases=tuple(entry.aliases),
            storage=memory,
            location=None if hidden or start is None or stop is None else Location(path, start, stop),
            bases=(entry.module,) if entry.module else (),
            persistent=entry.persistent,
            layout=tensor.layout,
        )

    def _place(
        self, tensor: TensorRef, storage: StorageRef, shape: tuple[int, ...]
    ) -> tuple[int | None, int | None, Storage]:
        """Bytes of the file from the first to the last element of a view, and the memory that contains them."""
        extent = extent_of(shape, tensor.stride)
        bits = tensor.bits
        if extent and (tensor.offset + extent) * bits > storage.nbytes * 8:
            raise Malformed(
                f"it is a view of elements {tensor.offset:,} to {tensor.offset + extent - 1:,} of a storage of "
                f"{storage.nbytes * 8 // bits:,}"
            )
        inline = storage.inline
        if inline is None:
            region = _region(storage)
            start, total, key = region.start, region.nbytes, storage.key
        else:
            start = inline.start if isinstance(inline, Blob) and inline.data is None else None
            total = storage.nbytes
            key = self._inline_keys.setdefault(id(storage), f"pickle/{len(self._inline_keys)}")
        first = storage.start * storage.dtype.bits + tensor.offset * bits
        memory = Storage(key, first // bits, tensor.stride, total)
        if start is None:
            return None, None, memory
        begin = start + (first // 8 if extent else 0)
        return begin, begin + (extent * bits + 7) // 8, memory

    def _where(self, name: str) -> str:
        return f"{self.label}: {shorten(repr(name))}"

    # --- values ----------------------------------------------------------------------------------

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """A read-only view of the mapped file; a new array for conjugates and foreign byte orders.

        Raises:
            NotReadable: The tensor is quantised, sparse or meta, or numpy lacks its dtype.
            LimitExceeded: The tensor would have to be copied or inflated, and exceeds a limit.
        """
        tensor = self._readable(name)
        if tensor.dtype.numpy_name is None:
            raise NotReadable(f"numpy and ml_dtypes have no dtype for {tensor.dtype}", where=self._where(name))
        return self._array(name, tensor, own=False)

    def as_stored(self, name: str) -> np.ndarray[Any, Any]:
        """Values without conjugation and negation."""
        return self._array(name, self._readable(name).replaced(conj=False, neg=False), own=False)

    def tensor(self, name: str) -> torch.Tensor:
        """A writable tensor: a private mapping of its bytes, or a copy if it is small.

        dtypes that numpy lacks are supported. An expanded tensor stays expanded.

        Raises:
            NotReadable: The tensor is quantised, sparse or meta.
            LimitExceeded: The tensor would have to be copied or inflated, and exceeds a limit.
        """
        from torchparams.sources import totorch as _totorch

        tensor = self._readable(name)
        info = self._infos[self._names[name].name]
        if tensor.dtype.numpy_name is not None:
            return _totorch.from_numpy(self._array(name, tensor, own=True), info)
        shape, stride = tensor.shape or (), tensor.stride
        if self._big_endian(tensor):
            raise NotReadable(f"big-endian {tensor.dtype} is not supported", where=self._where(name))
        made = _totorch.from_bytes(self._memory(tensor, own=True), info, shape, stride)
        made = made.conj() if tensor.conj else made
        return made.neg() if tensor.neg else made

    def span(self, name: str) -> Location | None:
        """Byte range that holds exactly the elements of this tensor in C order, or None."""
        entry = self._names[name]
        tensor, info = entry.tensor, self._infos[entry.name]
        location = info.location or self._expected.get(entry.name)
        if tensor.problem is not None or tensor.conj or tensor.neg or location is None:
            return None
        self._refuse_damaged(tensor)
        self.check_size(name)
        shape = info.shape or ()
        pairs = zip(shape, tensor.stride, contiguous(shape), strict=True)
        if info.numel and any(size > 1 and step != wanted for size, step, wanted in pairs):
            return None
        return None if self._big_endian(tensor) else location

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """Expression of the row; a conjugate or negative is computed in blocks from the stored elements."""
        tensor = self._names[name].tensor
        if not (tensor.conj or tensor.neg) or tensor.problem is not None or tensor.dtype.numpy_name is None:
            return super().row(name, info)
        import numpy as np

        from torchparams.expressions.operations import Elementwise

        x: Expression = Stored(_AsStored(self), name, info)
        x = Elementwise(np.conjugate, x) if tensor.conj else x
        return Elementwise(np.negative, x) if tensor.neg else x

    def shows_storage(self, name: str) -> bool:
        """Whether the tensor is neither a conjugate nor a negative of the stored elements."""
        tensor = self._names[name].tensor
        return tensor.problem is None and not tensor.conj and not tensor.neg

    def _readable(self, name: str) -> TensorRef:
        tensor = self._names[name].tensor
        if tensor.problem is not None:
            raise NotReadable(f"it is {tensor.problem}", where=self._where(name))
        self._refuse_damaged(tensor)
        self.check_size(name)
        return tensor

    def _refuse_damaged(self, tensor: TensorRef) -> None:
        region = tensor.storage.region if tensor.storage is not None else None
        if region is not None and region.problem is not None:
            raise FileFormatError(region.problem, where=self._file.path)

    def _big_endian(self, tensor: TensorRef) -> bool:
        storage = tensor.storage
        if storage is None or tensor.dtype.itemsize == 1:
            return False
        return storage.big_endian if storage.inline is not None else _region(storage).big_endian

    def _array(self, name: str, tensor: TensorRef, *, own: bool) -> np.ndarray[Any, Any]:
        """Elements as the view shows them; `own` for memory that is not shared."""
        dtype, shape, where = tensor.dtype, tensor.shape or (), self._where(name)
        swap = self._big_endian(tensor)
        numel = self._infos[self._names[name].name].numel
        if numel * dtype.itemsize >= 1 << 63:
            raise LimitExceeded("it is an expanded tensor of more bytes than an array can have", where=where)
        memory = self._memory(tensor, own=own and not swap)
        expected = self._expected.get(self._names[name].name)
        if expected is not None:  # and it is there
            info = self._described[self._names[name].name]
            self._described[info.name] = info._replace(location=expected)
        if swap and numel:
            import numpy as np

            run = (len(memory) // dtype.itemsize,)
            memory = as_array(memory, dtype, run, byteorder="big", where=where).view(np.uint8)
        # The stride along a dimension of size 1 has no meaning and may be any number.
        steps = [step if size > 1 else 1 for size, step in zip(shape, tensor.stride, strict=True)]
        array = as_array(memory, dtype, shape, stride=steps, where=where)
        if tensor.conj or tensor.neg:
            import numpy as np

            array = np.array(array, order="C")
            _turn(tensor.conj, tensor.neg, array)
        if not own:
            array.flags.writeable = False
        return array

    def _memory(self, tensor: TensorRef, *, own: bool) -> Any:
        """Bytes from the first to the last element of a view."""
        storage = tensor.storage
        assert storage is not None  # a tensor without one has a problem, which was checked
        size = tensor.dtype.itemsize
        begin = storage.start * storage.dtype.itemsize + tensor.offset * size
        end = begin + extent_of(tensor.shape or (), tensor.stride) * size
        if begin == end:
            return b""
        inline = storage.inline
        if isinstance(inline, Blob) and inline.data is None:
            start: int | None = inline.start
        elif isinstance(inline, Blob):
            buffer = memoryview(inline.data or b"")[inline.start + begin : inline.start + end]
            return bytearray(buffer) if own else buffer.toreadonly()
        elif inline is not None:
            return bytearray(inline[begin:end]) if own else memoryview(inline)[begin:end]
        else:
            start = _region(storage).start
        if start is not None:
            if own:
                return self._file.own(start + begin, start + end, size)
            return self._file.view(start + begin, start + end)
        whole = self._whole(storage)
        return bytearray(whole[begin:end]) if own else whole[begin:end]

    def _whole(self, storage: StorageRef) -> Any:
        """All bytes of a compressed storage; its tensors share them while one of them is in use."""
        import weakref

        import numpy as np

        with self._lock:
            if self._inflated is None:
                self._inflated = weakref.WeakValueDictionary()
            whole = self._inflated.get(storage.key)
            if whole is None:
                whole = np.frombuffer(self._inflate(storage), np.uint8)
                whole.flags.writeable = False
                self._inflated[storage.key] = whole
            return whole


class _AsStored(Source):
    """The tensors of a file as stored, without conjugation and negation.

    Args:
        source: The file.
    """

    def __init__(self, source: PickledSource) -> None:
        self._source = source
        self.label, self.format = source.label, source.format

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos of the file."""
        return self._source.infos()

    def check_size(self, name: str) -> None:
        """See `PickledSource.check_size`."""
        self._source.check_size(name)

    def check_unchanged(self) -> None:
        """See `PickledSource.check_unchanged`."""
        self._source.check_unchanged()

    @property
    def files(self) -> tuple[str, ...]:
        """The file."""
        return self._source.files

    def close(self) -> None:
        """Close the mapped file."""
        self._source.close()

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """A read-only view of the mapped file."""
        return self._source.as_stored(name)


def _turn(conj: bool, neg: bool, array: np.ndarray[Any, Any]) -> None:
    import numpy as np

    if conj:
        np.conjugate(array, out=array)
    if neg:
        np.negative(array, out=array)


def _region(storage: StorageRef) -> Region:
    assert storage.region is not None  # all regions were found on opening
    return storage.region


def extent_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Number of elements from the first to the last element of a view; 0 if it is empty.

    Raises:
        Malformed: A stride is negative.
    """
    extent = 1
    for size, step in zip(shape, stride, strict=True):
        if step < 0:
            raise Malformed(f"it is a view with the negative stride {step}")
        if size == 0:
            extent = 0
        elif extent:
            extent += (size - 1) * step
    return extent
