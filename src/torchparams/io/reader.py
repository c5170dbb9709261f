"""Blocks of a tensor's elements, from a file or from an array."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

from torchparams.errors import SourceError, TruncatedFile
from torchparams.io.blocks import Block
from torchparams.io.files import read_into, size_of
from torchparams.io.paths import is_url

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from torchparams.dtypes import DType
    from torchparams.info import Location
    from torchparams.io.files import Files

    Array = np.ndarray[Any, Any]


_POPULATE = 22 if sys.platform == "linux" else None  # MADV_POPULATE_READ, since Linux 5.14: Python has no name for it


class Row(Protocol):
    """What a reader needs to know of a tensor."""

    dtype: DType

    def summary(self) -> str:
        """Its name, for messages."""


class Reader:
    """Gives blocks to one thread; its memory is used again from block to block.

    Args:
        files: Opens files.
        nbytes: Bytes that are read at once.
    """

    def __init__(self, files: Files, nbytes: int) -> None:
        self._files = files
        self._nbytes = nbytes
        self._memory = memoryview(b"")
        self._file: Any = None
        self._path = ""
        self._held = (0, 0)  # the range of the file that the memory holds

    def span(self, row: Row, place: Location, start: int, stop: int, ahead: int) -> Block:
        """Elements of a tensor that lie packed in a file.

        Args:
            row: The tensor.
            place: The byte range of its elements.
            start, stop: The first element, and the one after the last.
            ahead: Offset in the file up to which more will be asked for, closely packed: it may be read along.

        Raises:
            TruncatedFile: The file ends before the tensor does.
            SourceError: The system cannot read it.
        """
        dtype = row.dtype
        first, last = place.start + start * dtype.bits // 8, place.start + dtype.nbytes(stop)
        self._open(place.file)
        if not (self._held[0] <= first and last <= self._held[1]):
            # Of a remote file, what follows is on its way already.
            self._read(first, last if is_url(place.file) else max(last, min(ahead, first + self._nbytes)))
        begun, ended = self._held
        if ended < last:
            size = size_of(self._file)
            raise TruncatedFile(
                f"the file ends at byte {size}, within the tensor {row.summary()!r}",
                where=place.file,
                exists=f"when it was listed, the tensor took the bytes {place.start} to {place.stop}",
            )
        return Block(dtype, start, stop, self._memory[first - begun : last - begun], packed=dtype.bits < 8)

    def bytes_of(self, path: str, first: int, last: int) -> memoryview:
        """The bytes of a range of a file, or as many of them as there are; valid until the next call.

        Raises:
            SourceError: The system cannot read it.
        """
        self._open(path)
        if not (self._held[0] <= first and last <= self._held[1]):
            self._read(first, last)
        begun, ended = self._held
        return self._memory[first - begun : min(last, ended) - begun]

    def _open(self, path: str) -> None:
        if self._path != path:
            self.close()
            self._file, self._path = self._files.open(path), path

    def _read(self, first: int, last: int) -> None:
        """Read a range of the file, or as much of it as there is."""
        self._held = (0, 0)
        if is_url(self._path):
            self._memory = self._file.view(first, last)
            self._held = (first, first + len(self._memory))
            return
        memory = self._buffer(last - first)[: last - first]
        self._held = (first, first + read_into(self._file, [memory], first, self._path))

    def array(self, dtype: DType, array: Array, start: int, stop: int) -> Block:
        """Elements of an array of any layout: a view where they lie contiguous, else a copy of just these."""
        import numpy as np

        if array.flags.c_contiguous and array.dtype.isnative:
            return Block(dtype, start, stop, array.reshape(-1)[start:stop].view(np.uint8).data, packed=False)
        self._held = (0, 0)
        size = (stop - start) * array.itemsize
        data = self._buffer(size)[:size]
        if array.dtype.isnative and array.itemsize in (1, 2, 4, 8):
            # As integers, of which the layout alone matters: they copy faster than the types of ml_dtypes.
            array = array.view(f"u{array.itemsize}")
        gather(array, np.frombuffer(data, array.dtype.newbyteorder("=")), start, stop)
        return Block(dtype, start, stop, data, packed=False)

    def _buffer(self, nbytes: int) -> memoryview:
        if self._memory.readonly or len(self._memory) < nbytes:
            self._memory = memoryview(bytearray(max(nbytes, self._nbytes)))
        return self._memory

    def close(self) -> None:
        """Close the file; the memory stays."""
        if self._file is not None:
            self._file.close()
        self._file, self._path, self._held = None, "", (0, 0)


class MappingReader(Reader):
    """The same without a copy: a range of a file is mapped, until the next one is or an array needs the memory.

    To touch a page that the disk does not give, or behind the end of a file that was cut, ends the process (SIGBUS). So
    Linux is asked to put all pages of a range in their place first, which is an error where it cannot. A file that is
    cut after that takes them away again.
    """

    def _read(self, first: int, last: int) -> None:
        if is_url(self._path):  # which is in memory already
            super()._read(first, last)
            return
        self._memory, self._held = memoryview(b""), (0, 0)  # this unmaps what was mapped
        last = min(last, os.fstat(self._file.fileno()).st_size)
        if first >= last:
            self._held = (first, first)
            return
        begin = first - first % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(self._file.fileno(), last - begin, access=mmap.ACCESS_READ, offset=begin)
            _populate(mapped)
        except (OSError, ValueError) as error:
            if os.fstat(self._file.fileno()).st_size < last:  # cut just now
                self._read(first, last)
                return
            why = error.strerror if isinstance(error, OSError) else error
            raise SourceError(f"the bytes {begin} to {last} cannot be read: {why}", where=self._path) from None
        self._memory, self._held = memoryview(mapped), (begin, last)

    def close(self) -> None:
        """Close the file, and unmap it."""
        super().close()
        self._memory = memoryview(b"")


def _populate(mapped: mmap.mmap) -> None:
    """Put all pages of a mapping in their place, or raise an error where it would end the process to touch them."""
    if _POPULATE is None:
        return
    try:
        mapped.madvise(_POPULATE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # that is an older Linux, which does not know of it
            raise


def gather(array: Array, out: Array, start: int, stop: int) -> None:
    """Copy the elements `[start, stop)` of `array`, in C order, to the one-dimensional `out`.

    >>> import numpy as np
    >>> out = np.empty(3, np.int64)
    >>> gather(np.arange(6).reshape(2, 3).T, out, 1, 4)
    >>> out.tolist()
    [3, 1, 4]
    """
    if start >= stop:
        return
    if array.ndim <= 1:
        out[:] = array.reshape(-1)[start:stop] if array.ndim == 0 else array[start:stop]
        return
    row = array.size // array.shape[0]
    first, last = -(-start // row), stop // row  # the rows that are wanted whole
    if first > last:  # all within one row
        gather(array[last], out, start - last * row, stop - last * row)
        return
    head, body = first * row - start, (last - first) * row
    if head:
        gather(array[first - 1], out[:head], row - head, row)
    if body:
        out[head : head + body].reshape(last - first, *array.shape[1:])[...] = array[first:last]
    if head + body < len(out):
        gather(array[last], out[head + body :], 0, stop - last * row)


class SharedArray:
    """An array that several threads read, made at the first use.

    Args:
        get: Makes it; called once. What it raises is raised at every use.
    """

    def __init__(self, get: Callable[[], Array]) -> None:
        self._get = get
        self._array: Array | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def get(self) -> Array:
        """The array."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._array is None:
                try:
                    self._array = self._get()
                except Exception as error:
                    self._error = error
                    raise
            return self._array
