"""Read byte ranges of files, map them, and view them as arrays.

Used by the readers of all file formats.
"""

from __future__ import annotations

import gc
import mmap
import os
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import LimitExceeded, NotReadable, SourceError, TruncatedFile, shorten
from torchparams.io.packing import unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    import numpy as np

    from torchparams.dtypes import DType

    Array = np.ndarray[Any, Any]

OWN_MAPPING = 1 << 20
"""Size in bytes from which writable memory is a private mapping of the file instead of a copy."""

_MOST_DIMENSIONS = 64  # limit of NumPy


class FileBytes:
    """Bytes of a file, by range.

    The file is inspected at creation, and reopened for each read. If it changed in between, reading raises an error,
    because earlier results may be wrong. Threads may share an instance.

    Args:
        path: Path of the file, as given by the user.

    Attributes:
        size: Size in bytes.
        base: Offset of its first byte in the file on disk; 0 unless it is a part of one.

    Raises:
        SourceError: The file does not exist, cannot be read, or is not a regular file.
    """

    base = 0

    def __init__(self, path: str) -> None:
        self.path = path
        with _open(path) as file:
            about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise SourceError("not a regular file", where=path)
        self.size = about.st_size
        self._written = about.st_mtime_ns
        self._map: memoryview | None = None

    @property
    def whole(self) -> FileBytes:
        """The file on disk; for a whole file, itself."""
        return self

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes `[start, stop)`, which must be inside the file."""
        with self._reopen() as file:
            file.seek(start)
            data: bytes = file.read(stop - start)
        if len(data) != stop - start:
            raise self._shrunk(start + len(data))
        return data

    def read_each(self, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Read each range `(start, stop)`; opens the file once."""
        with self._reopen() as file:
            for start, stop in ranges:
                if hasattr(os, "pread"):
                    data = os.pread(file.fileno(), stop - start, start)
                else:
                    file.seek(start)
                    data = file.read(stop - start)
                if len(data) != stop - start:
                    raise self._shrunk(start + len(data))
                yield data

    def view(self, start: int, stop: int) -> memoryview:
        """Memory-mapped bytes `[start, stop)`, read-only: nothing is read until it is touched."""
        if start == stop:
            return memoryview(b"")
        view = self._map
        if view is None:
            # Two threads may both get here; the extra mapping lives as long as its user.
            with self._reopen() as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._map = view
        # Touching a mapped page beyond the end of a truncated file kills the process.
        now = view.obj.size()  # type: ignore[attr-defined]  # the obj of a memoryview of a mmap is that mmap
        if now < self.size:
            raise self._shrunk(now)
        return view[start:stop]

    def own(self, start: int, stop: int, alignment: int = 1) -> Any:
        """Bytes `[start, stop)` in private writable memory; the file never changes.

        Args:
            start, stop: Range of bytes.
            alignment: The address of the first byte is a multiple of this.
        """
        if stop - start >= OWN_MAPPING and start % (alignment or 1) == 0:
            page = start - start % mmap.ALLOCATIONGRANULARITY
            with self._reopen() as file:
                try:
                    private = mmap.mmap(file.fileno(), stop - page, access=mmap.ACCESS_COPY, offset=page)
                    return memoryview(private)[start - page :]
                except OSError:
                    pass  # the number of mappings per process is limited
        return bytearray(self.view(start, stop))

    def guard(self, start: int, stop: int, header: int, check: Callable[[bytes], None]) -> None:
        """Check header bytes before the bytes after them are used.

        For remote files, both are read together; for local files, the header is read immediately.

        Args:
            start, stop: Range of the bytes after the header.
            header: Offset of the header, which ends at `start`.
            check: Function of the bytes `[header, start)` that raises if they are inconsistent.
        """
        check(self.read(header, start))

    def check_unchanged(self) -> None:
        """Raise if the file was changed or replaced since creation."""
        self._reopen().close()

    def close(self) -> None:
        """Release the mapping; it ends with the last array that is a view of it."""
        self._map = None

    def _reopen(self) -> Any:
        file = _open(self.path)
        about = os.fstat(file.fileno())
        if (about.st_size, about.st_mtime_ns) != (self.size, self._written):
            file.close()
            if about.st_size < self.size:
                raise self._shrunk(about.st_size)
            raise SourceError("the file changed after it was listed", where=self.path, hint="open the file again")
        return file

    def _shrunk(self, size: int) -> TruncatedFile:
        return TruncatedFile(f"the file has {size} bytes; it had {self.size} when it was listed", where=self.path)


class FilePart(FileBytes):
    """Part of a file, used as a file of its own: its offsets start at 0.

    Args:
        whole: The file.
        start, stop: Byte range of the part, inside the file.
    """

    def __init__(self, whole: FileBytes, start: int, stop: int) -> None:
        self.path, self.base, self.size = whole.path, start, stop - start
        self._whole = whole

    @property
    def whole(self) -> FileBytes:
        """The file that contains the part."""
        return self._whole

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes `[start, stop)` of the part."""
        return self._whole.read(self.base + start, self.base + stop)

    def read_each(self, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Read each range `(start, stop)` of the part."""
        return self._whole.read_each((self.base + start, self.base + stop) for start, stop in ranges)

    def view(self, start: int, stop: int) -> memoryview:
        """Memory-mapped bytes `[start, stop)` of the part."""
        return self._whole.view(self.base + start, self.base + stop)

    def own(self, start: int, stop: int, alignment: int = 1) -> Any:
        """Bytes `[start, stop)` of the part in private writable memory."""
        return self._whole.own(self.base + start, self.base + stop, alignment)

    def guard(self, start: int, stop: int, header: int, check: Callable[[bytes], None]) -> None:
        """Check header bytes of the part before the bytes after them are used."""
        self._whole.guard(self.base + start, self.base + stop, self.base + header, check)

    def check_unchanged(self) -> None:
        """Raise if the whole file was changed or replaced."""
        self._whole.check_unchanged()

    def close(self) -> None:
        """Release the mapping of the whole file."""
        self._whole.close()


def _open(path: str) -> Any:
    # O_NONBLOCK: opening a named pipe without a writer would block forever.
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)), "rb")
    except OSError as error:
        raise SourceError(error.strerror or str(error), where=path) from None


def as_array(
    buffer: Any,
    dtype: DType,
    shape: tuple[int, ...],
    *,
    offset: int = 0,
    stride: Sequence[int] | None = None,
    byteorder: str = "little",
    where: str | None = None,
) -> Array:
    """View elements in a buffer as an array; copies only if the byte order requires it.

    Args:
        buffer: Bytes; the array is read-only if they are.
        dtype: Dtype of the elements.
        shape: Shape of the array.
        offset: Byte offset of the first element, which may be unaligned.
        stride: Strides in elements, which may be zero; None for C order. Sub-byte elements support only C order.
        byteorder: `little` or `big`, for multi-byte elements.
        where: File and tensor, for messages.

    Raises:
        NotReadable: NumPy and ml_dtypes do not support the dtype or the array.

    >>> from torchparams.dtypes import DType
    >>> as_array(bytes([0, 1, 0, 2, 0, 3]), DType.of("I16"), (2,), offset=2, byteorder="big")
    array([2, 3], dtype=int16)
    """
    import numpy as np

    try:
        kind = dtype.numpy
    except NotReadable as error:
        error.where = where
        raise
    try:
        if 0 in shape:
            return np.empty(shape, kind)
        if dtype.bits < 8:
            return unpack(np.frombuffer(buffer, np.uint8, offset=offset), dtype, shape)
        strides = None if stride is None else [step * dtype.itemsize for step in stride]
        if byteorder == sys.byteorder or dtype.itemsize == 1:
            return np.ndarray(shape, kind, buffer, offset, strides)
        # ml_dtypes only supports native byte order: swap as integers, separately for the parts of complex numbers.
        width = dtype.itemsize // (2 if dtype.kind == "complex" else 1)
        parts = dtype.itemsize // width
        steps = None if strides is None else [*strides, width]
        plain = np.ndarray((*shape, parts), f"u{width}", buffer, offset, steps)
        return plain.byteswap().view(kind)[..., 0]
    except ValueError as error:
        # NumPy rejects more than 64 dimensions, and sizes whose product overflows, even if one of them is 0.
        about = f"{len(shape)} dimensions" if len(shape) > _MOST_DIMENSIONS else f"the shape {list(shape)}"
        raise NotReadable(f"numpy does not support arrays with {about}: {error}", where=where) from None


def check_name_lengths(names: Collection[str], path: str) -> None:
    """Reject names that are too long, because tables and messages repeat them.

    Raises:
        LimitExceeded: A name is longer than `limits.NAME_LENGTH`.
    """
    most = limits.NAME_LENGTH
    if max(map(len, names), default=0) > most:
        length, name = next((len(name), name) for name in names if len(name) > most)
        raise LimitExceeded(
            f"the name '{shorten(name)}' has {length:,} characters; the limit is {most:,}",
            where=path,
            hint="if you trust the file, raise torchparams.limits.NAME_LENGTH",
        )


@contextmanager
def paused_gc() -> Iterator[None]:
    """Pause the cyclic garbage collector, which would repeatedly scan the many objects that a parser creates."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
