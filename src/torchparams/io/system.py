"""The calls that change what is on the disk, all of them: each is a moment at which a run may be killed or refused.

Tests replace them one by one, to be told of every such moment.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any

_NOT_HERE = (
    *(errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY, errno.EIO),
)
_PIECE = 1 << 20
_most = 1 << 30  # copied by one call to the kernel


NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""A link that somebody has put where a temporary file goes leads to a file of somebody else's."""


def create(path: str) -> int:
    """A file that may be written to, made if there is none; it is not emptied, and not a link."""
    flags = os.O_RDWR | os.O_CREAT | NO_LINK | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.open(path, flags, 0o666)


def change_mode(fd: int, mode: int) -> None:
    """Give a file its permissions."""
    os.fchmod(fd, mode)


def change_owner(fd: int, user: int, group: int) -> None:
    """Give a file to a user and a group; -1 leaves either."""
    os.fchown(fd, user, group)


def set_attribute(fd: int, name: str, value: bytes) -> None:
    """Give a file an extended attribute, if it does not have it already."""
    if sys.platform == "linux":
        with suppress(OSError):
            if os.getxattr(fd, name) == value:
                return
        os.setxattr(fd, name, value)


def resize(fd: int, size: int) -> None:
    """Give a file its size."""
    os.ftruncate(fd, size)


def reserve(fd: int, size: int) -> None:
    """Have the file system reserve the bytes of a file, where it can at once: then they lie together."""
    fallocate = _fallocate()
    if fallocate is None or not size:
        return
    import ctypes

    ctypes.set_errno(0)
    if fallocate(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(fd: int, data: Any, offset: int) -> None:
    """Write all of `data`."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    at = 0
    while at < len(view):
        done = os.pwrite(fd, view[at:], offset + at)
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        at += done


def copy(source: int, start: int, fd: int, offset: int, count: int) -> int:
    """Copy up to `count` bytes from one file to another: within the kernel, where the two file systems can.

    Returns:
        How many were copied; 0 where the source ends.
    """
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, fd, min(count, _most), start, offset)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
    data = os.pread(source, min(count, _PIECE), start)
    write(fd, data, offset)
    return len(data)


def begin_writeback(fd: int, offset: int, count: int) -> None:
    """Have the disk begin to write these bytes, so that `sync` has less to wait for."""
    call = _sync_file_range()
    if call is not None:
        import ctypes

        call(fd, ctypes.c_longlong(offset), ctypes.c_longlong(count), 2)


def sync(fd: int) -> None:
    """Wait until a file is on the disk."""
    os.fsync(fd)


def sync_directory(path: str) -> None:
    """Wait until the names in a directory are on the disk; not every file system can, and those need it not."""
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
    """Give a file the name of another, which it replaces at once."""
    os.replace(old, new)


def link(old: str, new: str) -> None:
    """Give a file a second name."""
    os.link(old, new)


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def make_directory(path: str) -> None:
    """Make a directory, if it is not there."""
    os.makedirs(path, exist_ok=True)


def remove_directory(path: str) -> None:
    """Remove an empty directory."""
    os.rmdir(path)


def lock(fd: int) -> bool | None:
    """Whether this process has a file for itself now: True, False if another has it, None where nobody can."""
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
    # Python's posix_fallocate writes to every block where the file system has no such call; this one says so.
    return _of_libc("fallocate64") or _of_libc("fallocate")


def _sync_file_range() -> Any:
    return _of_libc("sync_file_range")
