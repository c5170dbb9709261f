"""Read blocks of a tensor from a file or an array."""

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


_POPULATE = 22 if sys.platform == "linux" else None  # MADV_POPULATE_READ of Linux 5.14, which Python does not define


class Row(Protocol):
    """Properties of a tensor that a reader needs."""

    dtype: DType

    def summary(self) -> str:
        """Name of the tensor, for messages."""


class Reader:
    """Reads blocks for one thread; reuses its memory from block to block.

    Args:
        files: Opener of files.
        nbytes: Bytes per read.
    """

    def __init__(self, files: Files, nbytes: int) -> None:
        self._files = files
        self._nbytes = nbytes
        self._memory = memoryview(b"")
        self._file: Any = None
        self._path = ""
        self._held = (0, 0)  # byte range in the memory

    def span(self, row: Row, place: Location, start: int, stop: int, ahead: int) -> Block:
        """Elements of a tensor that is stored packed in a file.

        Args:
            row: The tensor.
            place: Byte range of its elements.
            start, stop: Range of elements.
            ahead: Offset in the file up to which later calls will read: the bytes up to there may be read along.

        Raises:
            TruncatedFile: The file ends inside the tensor.
            SourceError: The file cannot be read.
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
                exists=f"the tensor had the bytes {place.start} to {place.stop} when the file was listed",
            )
        return Block(dtype, start, stop, self._memory[first - begun : last - begun], packed=dtype.bits < 8)

    def bytes_of(self, path: str, first: int, last: int) -> memoryview:
        """Bytes of a file range, or fewer if the file ends; valid until the next call.

        Raises:
            SourceError: The file cannot be read.
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
        """Read a range of the file into memory, or fewer bytes if the file ends."""
        self._held = (0, 0)
        if is_url(self._path):
            self._memory = self._file.view(first, last)
            self._held = (first, first + len(self._memory))
            return
        memory = self._buffer(last - first)[: last - first]
        self._held = (first, first + read_into(self._file, [memory], first, self._path))

    def array(self, dtype: DType, array: Array, start: int, stop: int) -> Block:
        """Elements of an array of any layout: a view if contiguous, otherwise a copy of the range."""
        import numpy as np

        if array.flags.c_contiguous and array.dtype.isnative:
            return Block(dtype, start, stop, array.reshape(-1)[start:stop].view(np.uint8).data, packed=False)
        self._held = (0, 0)
        size = (stop - start) * array.itemsize
        data = self._buffer(size)[:size]
        if array.dtype.isnative and array.itemsize in (1, 2, 4, 8):
            # Copying as integers is faster than as dtypes of ml_dtypes.
            array = array.view(f"u{array.itemsize}")
        gather(array, np.frombuffer(data, array.dtype.newbyteorder("=")), start, stop)
        return Block(dtype, start, stop, data, packed=False)

    def _buffer(self, nbytes: int) -> memoryview:
        if self._memory.readonly or len(self._memory) < nbytes:
            self._memory = memoryview(bytearray(max(nbytes, self._nbytes)))
        return self._memory

    def close(self) -> None:
        """Close the file; the memory is kept."""
        if self._file is not None:
            self._file.close()
        self._file, self._path, self._held = None, "", (0, 0)


class MappingReader(Reader):
    """Reader without copies: maps a range of a file until the next range, or until an array needs the memory.

    Touching a page that the disk cannot deliver, or beyond the end of a truncated file, kills the process (SIGBUS). So
    Linux is first asked to load all pages of a range, and returns an error if it cannot. A file that is truncated later
    still causes SIGBUS.
    """

    def _read(self, first: int, last: int) -> None:
        if is_url(self._path):  # already in memory
            super()._read(first, last)
            return
        self._memory, self._held = memoryview(b""), (0, 0)  # unmaps the previous range
        last = min(last, os.fstat(self._file.fileno()).st_size)
        if first >= last:
            self._held = (first, first)
            return
        begin = first - first % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(self._file.fileno(), last - begin, access=mmap.ACCESS_READ, offset=begin)
            _populate(mapped)
        except (OSError, ValueError) as error:
            if os.fstat(self._file.fileno()).st_size < last:  # truncated just now
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
    """Load all pages of a mapping; raises an error if touching them would kill the process."""
    if _POPULATE is None:
        return
    try:
        mapped.madvise(_POPULATE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # older versions of Linux do not support it
            raise


def gather(array: Array, out: Array, start: int, stop: int) -> None:
    """Copy elements `[start, stop)` of `array`, in C order, to the one-dimensional `out`.

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
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
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
    """Array that several threads read, created at first use.

    Args:
        get: Function that creates it; called once. Its exception is raised at every use.
    """

    def __init__(self, get: Callable[[], Array]) -> None:
        self._get = get
        self._array: Array | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def get(self) -> Array:
        """Get the array."""
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
