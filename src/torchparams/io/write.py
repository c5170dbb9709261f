"""Write targets so that they are complete at every moment: the old one, or the new one.

**A file** is written under a temporary name beside the target, synchronised, and renamed. Directories are written by
`torchparams.edit.write.directory`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

from torchparams.errors import PlanError, TorchParamsError, WriteError
from torchparams.io import attributes
from torchparams.io import system as _system
from torchparams.render.tree import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTIAL = ".torchparams-partial"
"""Suffix of temporary names, which start with a dot."""

JOURNAL = ".torchparams-writing"
"""Name of the journal of a directory during a write."""

STEM = "model"
"""Stem of file names in a directory: `model.safetensors`, `model-00001-of-00003.safetensors`."""

INDEX = f"{STEM}.safetensors.index.json"

NAME_BYTES = 255
"""Maximum length of a file name on most file systems, in bytes."""

FAMILY = re.compile(rf"{STEM}(\.previous)?(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors")
"""Current and previous names of files in a directory."""

_ROOM = 12  # bytes in a temporary name for a dot and a process id

TRIES = 20
"""Number of attempts to get a lock that another process may hold briefly."""


def partial(path: str) -> str:
    """Temporary name of a target.

    >>> partial("out/model.safetensors")
    'out/.model.safetensors.torchparams-partial'
    """
    folder, name = os.path.split(path)
    encoded = os.fsencode(name)
    if len(encoded) > NAME_BYTES - len(PARTIAL) - _ROOM:
        from hashlib import sha256

        name = sha256(encoded).hexdigest()
    return os.path.join(folder, f".{name}{PARTIAL}")


@contextmanager
def telling(path: str) -> Iterator[None]:
    """Context that turns an `OSError` into a `WriteError` with a hint.

    Raises:
        WriteError: Instead of an `OSError`.
    """
    try:
        yield
    except TorchParamsError:
        raise
    except OSError as error:
        raise write_error(error, path) from error


def write_error(error: OSError, path: str) -> WriteError:
    """Error for an `OSError` during the write of `path`."""
    reason = error.strerror or str(error)
    hint = {
        errno.ENOSPC: "free some space, or write elsewhere",
        errno.EDQUOT: "free some space, or write elsewhere",
        errno.EFBIG: "split it (max_shard_size), or raise the limit (ulimit -f)",
        errno.EACCES: "choose a directory with write permission",
        errno.EPERM: "choose a directory with write permission",
        errno.EROFS: "choose a directory with write permission",
        errno.ENOENT: "create the directory first",
        errno.ENAMETOOLONG: "choose a shorter name",
    }.get(error.errno or 0)
    made = WriteError(
        f"writing failed: {reason[:1].lower()}{reason[1:]}",
        where=path,
        exists="the target is unchanged, and temporary files were removed",
        hint=hint,
    )
    made.errno = error.errno
    return made


def free_bytes(folder: str) -> int:
    """Free bytes of the file system of a directory."""
    return shutil.disk_usage(folder or ".").free


class Target:
    """Files that are written and put in place together.

    Use it as a context: what is not committed at its end is discarded.

    Args:
        path: Path of the target, as given by the user.
        folder: Directory for the files.

    Attributes:
        not_kept: Attributes of replaced files that could not be kept, in words.
    """

    def __init__(self, path: str, folder: str) -> None:
        self.path = path
        self.folder = folder
        self._open: dict[str, int] = {}
        self._written: list[str] = []
        self._lock: int | None = None
        self._committed = False
        self.not_kept: list[str] = []

    def __enter__(self) -> Self:
        raise NotImplementedError

    @property
    def notes(self) -> tuple[str, ...]:
        """Note on attributes that could not be kept, if any."""
        return (f"not kept from the replaced file: {', '.join(self.not_kept)}",) if self.not_kept else ()

    def __exit__(self, *_: object) -> None:
        self._close_where_no_locks_are()
        try:
            if not self._committed:
                self.discard()
            else:
                with suppress(OSError):  # the new target is in place; the next run cleans up
                    self.settle()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _close_where_no_locks_are(self) -> None:
        """Close the file that other processes would see as locked; Windows does not rename or remove open files."""
        if self._lock is not None and _system.lock(self._lock) is None:
            for name in [name for name, fd in self._open.items() if fd == self._lock]:
                del self._open[name]
            os.close(self._lock)
            self._lock = None

    def create(self, name: str, size: int) -> int:
        """Create the temporary file for `name`, with this size."""
        path = self.temporary(name)
        fd = self._open[name] = self._descriptor(path)
        self.claim(name)
        with suppress(OSError):
            attributes.guard(fd, os.path.join(self.folder, name))
        _system.resize(fd, 0)
        _system.reserve(fd, size)
        _system.resize(fd, size)
        return fd

    def claim(self, name: str) -> None:
        """Count a file in that another process writes, at its temporary name: it is committed or discarded here."""
        if name not in self._written:
            self._written.append(name)

    def finish(self, name: str) -> None:
        """Wait until a file is on the disk, and close it."""
        fd = self._open[name]
        lost = attributes.keep(fd, os.path.join(self.folder, name))
        self.not_kept += [each for each in lost if each not in self.not_kept]
        _system.sync(fd)
        del self._open[name]
        if fd != self._lock:
            os.close(fd)

    def commit(self, index: bytes | None) -> None:
        """Replace the old target by the new one."""
        raise NotImplementedError

    def settle(self) -> None:
        """Remove leftovers of the old target."""

    def discard(self) -> None:
        """Remove the temporary files."""
        for fd in self._open.values():
            if fd != self._lock:
                os.close(fd)
        self._open.clear()
        for name in self._written:
            with suppress(OSError):
                _system.remove(self.temporary(name))

    def _confirm(self, folder: str) -> None:
        """Wait until the new names are on the disk."""
        self._committed = True
        try:
            _system.sync_directory(folder or ".")
        except OSError as error:
            raise WriteError(
                f"the disk did not confirm the write: {error.strerror or error}",
                where=self.path,
                exists="the new target is in place, but a power failure may revert it",
            ) from error

    def temporary(self, name: str) -> str:
        """Temporary path of a file."""
        return partial(os.path.join(self.folder, name))

    def _descriptor(self, path: str) -> int:
        return _system.create(path)


class OneFile(Target):
    """Target that is a single file.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, os.path.dirname(path))
        self._partial = partial(path)

    def __enter__(self) -> Self:
        clean(self.folder)
        # The temporary file is its own lock.
        self._lock, self._partial = take(self._partial, self.path)
        return self

    def temporary(self, name: str) -> str:
        """Temporary path of the file."""
        return self._partial

    def _descriptor(self, path: str) -> int:
        assert self._lock is not None  # taken when the context was entered
        return self._lock

    def commit(self, index: bytes | None) -> None:
        """Rename the temporary file to the target."""
        self._close_where_no_locks_are()
        _system.rename(self._partial, self.path)
        self._confirm(self.folder)

    def discard(self) -> None:
        """Remove the temporary file, even if nothing was written to it."""
        super().discard()
        with suppress(OSError):
            _system.remove(self._partial)


def replace_file(path: str, contents: bytes) -> None:
    """Replace a small file atomically. The caller ensures that the new name reaches the disk."""
    temporary = partial(path)
    fd = _system.create(temporary)
    try:
        _system.resize(fd, 0)
        _system.write(fd, contents, 0)
        attributes.keep(fd, path)
        _system.sync(fd)
    finally:
        os.close(fd)
    _system.rename(temporary, path)


def take(path: str, target: str) -> tuple[int, str]:
    """Open and lock a file. Returns its path, which differs if the file system has no locks.

    Raises:
        WriteError: Another process has the lock.
    """
    for attempt in range(TRIES):
        fd = _system.create(path)
        held = _system.lock(fd)
        if held is None:
            os.close(fd)
            _system.remove(path)
            path = f"{path}.{os.getpid()}"
            return _system.create(path), path
        if held and _is_at(fd, path):
            return fd, path
        os.close(fd)
        if not held and attempt > TRIES // 2:
            break
        time.sleep(0.005)  # a process that cleans up holds it briefly
    raise WriteError("another process is writing to it", where=target, hint="wait until it finishes")


def _is_at(fd: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def clean(folder: str) -> None:
    """Remove leftovers of killed runs from a directory."""
    folder = folder or "."
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(PARTIAL)]
    except OSError:
        return  # writing there will raise an error
    for name in names:
        path = os.path.join(folder, name)
        is_directory = os.path.isdir(path)
        with suppress(OSError):
            fd = os.open(
                os.path.join(path, JOURNAL) if is_directory else path,
                os.O_RDWR | _system.NO_LINK | getattr(os, "O_BINARY", 0) | os.O_CREAT * is_directory,
            )
            try:
                if _system.lock(fd):
                    (clear if is_directory else _system.remove)(path)
            finally:
                os.close(fd)


def clear(folder: str) -> None:
    """Remove a temporary directory with the files of this library."""
    for name in os.listdir(folder):
        if name.startswith(JOURNAL) or name.endswith(PARTIAL) or name == INDEX or FAMILY.fullmatch(name):
            _system.remove(os.path.join(folder, name))
    _system.remove_directory(folder)


def write_file(path: str, contents: bytes) -> tuple[str, ...]:
    """Write a small file atomically.

    Returns:
        Notes on attributes of the replaced file that could not be kept, if any.

    Raises:
        WriteError: Writing failed.
    """
    with telling(path), OneFile(path) as target:
        name = os.path.basename(path)
        fd = target.create(name, len(contents))
        _system.write(fd, contents, 0)
        target.finish(name)
        target.commit(None)
    return target.notes


def check_target(path: str) -> None:
    """Raise if a file at this path cannot be replaced.

    Raises:
        WriteError: The name is too long, or is a link to a device or stream.
    """
    folder, name = os.path.split(path)
    length, most = len(os.fsencode(name)), NAME_BYTES
    if hasattr(os, "pathconf"):
        with suppress(OSError, ValueError):
            most = os.pathconf(folder or ".", "PC_NAME_MAX")
    if length > most:
        raise WriteError(
            f"the file name has {length} bytes; the limit of the file system is {most}",
            where=path,
            hint="choose a shorter name",
        )
    if os.path.islink(path) and os.path.realpath(folder or ".") == "/dev":  # /dev/stdout, whatever it links to
        raise WriteError("not a regular file", where=path, hint="choose a file")


def free_or_raise(folder: str, needed: int, path: str) -> None:
    """Raise if the disk has too little space.

    Raises:
        PlanError: The disk has less free space than needed.
    """
    try:
        free = free_bytes(folder)
    except OSError:
        return  # writing there will raise an error
    if needed > free:
        raise PlanError(
            f"it needs {human_bytes(needed)}; the disk has {human_bytes(free)} free",
            where=path,
            hint="free some space, or write elsewhere",
        )
