"""All system calls that change files: the moments at which a run may be killed, or fail.

Tests replace these functions one by one, to act at each moment.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from contextlib import suppress
from typing import Any

_NOT_HERE = (
    *(errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY, errno.EIO),
)
_PIECE = 1 << 20
_most = 1 << 30  # bytes per copy call to the kernel
_position = threading.Lock()  # where the system only reads and writes at the position of a file: Windows


NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""Do not follow a link that somebody placed under a temporary name: it may lead to any file."""


def create(path: str) -> int:
    """Open a file for writing, creating it if missing; does not truncate it, and does not follow links."""
    flags = os.O_RDWR | os.O_CREAT | NO_LINK | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.open(path, flags, 0o666)


def change_mode(fd: int, mode: int) -> None:
    """Set the permissions of a file."""
    os.fchmod(fd, mode)


def change_owner(fd: int, user: int, group: int) -> None:
    """Set the owner and group of a file; -1 keeps either."""
    os.fchown(fd, user, group)


def set_attribute(fd: int, name: str, value: bytes) -> None:
    """Set an extended attribute, unless it already has the value."""
    if sys.platform == "linux":
        with suppress(OSError):
            if os.getxattr(fd, name) == value:
                return
        os.setxattr(fd, name, value)


def resize(fd: int, size: int) -> None:
    """Set the size of a file."""
    os.ftruncate(fd, size)


def reserve(fd: int, size: int) -> None:
    """Ask the file system to reserve the bytes of a file, so that they are contiguous."""
    fallocate = _fallocate()
    if fallocate is None or not size:
        return
    import ctypes

    ctypes.set_errno(0)
    if fallocate(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read(fd: int, count: int, offset: int) -> bytes:
    """Read up to `count` bytes."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)


def write(fd: int, data: Any, offset: int) -> None:
    """Write all of `data`."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    at = 0
    while at < len(view):
        if hasattr(os, "pwrite"):
            done = os.pwrite(fd, view[at:], offset + at)
        else:
            with _position:
                os.lseek(fd, offset + at, os.SEEK_SET)
                done = os.write(fd, view[at:])
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        at += done


def copy(source: int, start: int, fd: int, offset: int, count: int) -> int:
    """Copy up to `count` bytes between files, inside the kernel if the file systems support it.

    Returns:
        Number of bytes copied; 0 at the end of the source.
    """
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, fd, min(count, _most), start, offset)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    data = read(source, min(count, _PIECE), start)
    write(fd, data, offset)
    return len(data)


def begin_writeback(fd: int, offset: int, count: int) -> None:
    """Ask the disk to start writing these bytes, so that `sync` has less to wait for."""
    call = _sync_file_range()
    if call is not None:
        import ctypes

        call(fd, ctypes.c_longlong(offset), ctypes.c_longlong(count), 2)


def sync(fd: int) -> None:
    """Wait until a file is on the disk."""
    os.fsync(fd)


def sync_directory(path: str) -> None:
    """Wait until the names in a directory are on the disk. Some file systems do not support it, and do not need it."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES):
            raise
    finally:
        os.close(fd)


def rename(old: str, new: str) -> None:
    """Rename a file, atomically replacing the target."""
    os.replace(old, new)


def link(old: str, new: str) -> None:
    """Create a hard link."""
    os.link(old, new)


def remove(path: str) -> None:
    """Remove a file, if it exists."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def make_directory(path: str) -> None:
    """Create a directory, if missing."""
    os.makedirs(path, exist_ok=True)


def remove_directory(path: str) -> None:
    """Remove an empty directory."""
    os.rmdir(path)


def lock(fd: int) -> bool | None:
    """Lock a file: True if locked, False if another process has the lock, None if locks are not supported."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


_functions: dict[str, Any] = {}


def _of_libc(name: str) -> Any:
    if name not in _functions:
        found = None
        if sys.platform == "linux":
            import ctypes

            found = getattr(ctypes.CDLL(None, use_errno=True), name, None)
        _functions[name] = found
    return _functions[name]


def _fallocate() -> Any:
    # Python's posix_fallocate falls back to writing every block; this call fails instead.
    return _of_libc("fallocate64") or _of_libc("fallocate")


def _sync_file_range() -> Any:
    return _of_libc("sync_file_range")
