"""The bytes of a file: read, mapped, and seen as arrays.

Shared by the readers of every file format.
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
"""From this size on, in bytes, writable memory is a private mapping of the file; below it, a copy is cheaper."""

_MOST_DIMENSIONS = 64  # numpy's own limit


class FileBytes:
    """A file's bytes, by range.

    It is looked at when this is made and opened anew when its bytes are wanted; a file that was written to or
    replaced in between is refused, as what was learnt of it no longer holds. Threads may share one.

    Args:
        path: The file, as the user wrote it.

    Attributes:
        size: Bytes in the file.
        base: Where its first byte lies in the file on disk: 0, unless it is a part of one.

    Raises:
        SourceError: There is no such file, it may not be read, or it is not a regular file.
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
        """The file on disk: this, unless it is a part of one."""
        return self

    def read(self, start: int, stop: int) -> bytes:
        """The bytes `[start, stop)`, read; they must lie within the file."""
        with self._reopen() as file:
            file.seek(start)
            data: bytes = file.read(stop - start)
        if len(data) != stop - start:
            raise self._shrunk(start + len(data))
        return data

    def read_each(self, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of each range `(start, stop)`, from a file that is opened once."""
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
        """The bytes `[start, stop)` where they lie, read-only: nothing is read until it is touched."""
        if start == stop:
            return memoryview(b"")
        view = self._map
        if view is None:
            # Two threads may both get here; then one mapping more exists for as long as its user needs it.
            with self._reopen() as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._map = view
        # Touching a mapped page that is behind the end of a file that was cut ends the process.
        now = view.obj.size()  # type: ignore[attr-defined]  # the obj of a memoryview of a mmap is that mmap
        if now < self.size:
            raise self._shrunk(now)
        return view[start:stop]

    def own(self, start: int, stop: int, alignment: int = 1) -> Any:
        """The bytes `[start, stop)` in memory that may be written to and is nobody else's: the file never changes.

        Args:
            start, stop: The range.
            alignment: The address of the first byte is a multiple of this.
        """
        if stop - start >= OWN_MAPPING and start % (alignment or 1) == 0:
            page = start - start % mmap.ALLOCATIONGRANULARITY
            with self._reopen() as file:
                try:
                    private = mmap.mmap(file.fileno(), stop - page, access=mmap.ACCESS_COPY, offset=page)
                    return memoryview(private)[start - page :]
                except OSError:
                    pass  # a process may have only so many mappings
        return bytearray(self.view(start, stop))

    def guard(self, start: int, stop: int, header: int, check: Callable[[bytes], None]) -> None:
        """Have bytes that say something of others checked before the others are used.

        For remote files, of which they are read together; of a file that is here, they are read at once.

        Args:
            start, stop: The others.
            header: Where the bytes begin that stand right before them.
            check: Called with the bytes `[header, start)`; raises an error if they do not fit.
        """
        check(self.read(header, start))

    def check_unchanged(self) -> None:
        """Refuse the file if it was written to or replaced since this was made."""
        self._reopen().close()

    def close(self) -> None:
        """Forget the mapping; it ends with the last array that is a view of it."""
        self._map = None

    def _reopen(self) -> Any:
        file = _open(self.path)
        about = os.fstat(file.fileno())
        if (about.st_size, about.st_mtime_ns) != (self.size, self._written):
            file.close()
            if about.st_size < self.size:
                raise self._shrunk(about.st_size)
            raise SourceError(
                "the file was written to since it was listed", where=self.path, hint="open it anew to see what it holds"
            )
        return file

    def _shrunk(self, size: int) -> TruncatedFile:
        return TruncatedFile(
            f"the file was cut to {size} bytes since it was listed, when it had {self.size}", where=self.path
        )


class FilePart(FileBytes):
    """A part of a file that is a file of its own: its bytes count from 0.

    Args:
        whole: The file.
        start, stop: The part; it must lie within the file.
    """

    def __init__(self, whole: FileBytes, start: int, stop: int) -> None:
        self.path, self.base, self.size = whole.path, start, stop - start
        self._whole = whole

    @property
    def whole(self) -> FileBytes:
        """The file that it is a part of."""
        return self._whole

    def read(self, start: int, stop: int) -> bytes:
        """The bytes `[start, stop)` of the part."""
        return self._whole.read(self.base + start, self.base + stop)

    def read_each(self, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of each range `(start, stop)` of the part."""
        return self._whole.read_each((self.base + start, self.base + stop) for start, stop in ranges)

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes `[start, stop)` of the part where they lie."""
        return self._whole.view(self.base + start, self.base + stop)

    def own(self, start: int, stop: int, alignment: int = 1) -> Any:
        """The bytes `[start, stop)` of the part in memory that is nobody else's."""
        return self._whole.own(self.base + start, self.base + stop, alignment)

    def guard(self, start: int, stop: int, header: int, check: Callable[[bytes], None]) -> None:
        """Have bytes of the part checked before others are used."""
        self._whole.guard(self.base + start, self.base + stop, self.base + header, check)

    def check_unchanged(self) -> None:
        """Refuse the whole file if it was written to or replaced."""
        self._whole.check_unchanged()

    def close(self) -> None:
        """Forget the mapping of the whole file."""
        self._whole.close()


def _open(path: str) -> Any:
    # O_NONBLOCK: opening a named pipe that nobody writes to would wait for ever.
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
    """The elements that lie in a buffer, as an array: a view where the machine's byte order and numpy allow it.

    Args:
        buffer: Bytes; the array is read-only if they are.
        dtype: The element type.
        shape: The array's shape.
        offset: Where the first element starts, in bytes. It need not be aligned.
        stride: Distances between neighbours along each dimension, in elements; None for C order. Zero is legal.
            Elements of less than a byte come in C order only.
        byteorder: `little` or `big`: how elements of several bytes are stored.
        where: The file and the tensor, for messages.

    Raises:
        NotReadable: Neither numpy nor ml_dtypes has such a type or such an array.

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
        # ml_dtypes know no byte order but the machine's: swap plain integers, and the two halves of a complex apart.
        width = dtype.itemsize // (2 if dtype.kind == "complex" else 1)
        parts = dtype.itemsize // width
        steps = None if strides is None else [*strides, width]
        plain = np.ndarray((*shape, parts), f"u{width}", buffer, offset, steps)
        return plain.byteswap().view(kind)[..., 0]
    except ValueError as error:
        # numpy refuses more than 64 dimensions, and sizes whose product overflows even where one of them is 0.
        about = f"{len(shape)} dimensions" if len(shape) > _MOST_DIMENSIONS else f"the shape {list(shape)}"
        raise NotReadable(f"numpy has no arrays of {about}: {error}", where=where) from None


def check_name_lengths(names: Collection[str], path: str) -> None:
    """Refuse names that no writer of tensors makes: tables and messages repeat them.

    Raises:
        LimitExceeded: One is longer than `limits.NAME_LENGTH`.
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
    """Without the cyclic collector: it would walk, again and again, what a parser makes by the ten thousand."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
