"""How a target gets to the disk: at every moment it is the old one, whole, or the new one, whole.

**A file** is written under a temporary name beside it, synchronised, and renamed. A directory: see `_directory.py`.
"""

from __future__ import annotations

import errno
import os
import re
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
"""How temporary names end; they begin with a dot."""

JOURNAL = ".torchparams-writing"
"""The journal of a directory that is written to."""

STEM = "model"
"""What files in a directory are named by: `model.safetensors`, `model-00001-of-00003.safetensors`."""

INDEX = f"{STEM}.safetensors.index.json"

NAME_BYTES = 255
"""Longest name of a file on most file systems, in bytes."""

FAMILY = re.compile(rf"{STEM}(\.previous)?(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors")
"""Names that files of a directory have, or had before the last ones took their names."""

_ROOM = 12  # bytes of a temporary name for a dot and for the number of a process

TRIES = 20
"""How often a lock is asked for that somebody may have for a moment only."""


def partial(path: str) -> str:
    """The temporary name of a target.

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
    """Turns what the system says into an error that says what to do.

    Raises:
        WriteError: In place of an `OSError`.
    """
    try:
        yield
    except TorchParamsError:
        raise
    except OSError as error:
        raise write_error(error, path) from error


def write_error(error: OSError, path: str) -> WriteError:
    """The error for what the system said while `path` was written."""
    reason = error.strerror or str(error)
    hint = {
        errno.ENOSPC: "free some, or write elsewhere",
        errno.EDQUOT: "free some, or write elsewhere",
        errno.EFBIG: "split it (max_shard_size), or raise the limit (ulimit -f)",
        errno.EACCES: "write to a directory that you may write to",
        errno.EPERM: "write to a directory that you may write to",
        errno.EROFS: "write to a directory that you may write to",
        errno.ENOENT: "make the directory first",
        errno.ENAMETOOLONG: "choose a shorter name",
    }.get(error.errno or 0)
    made = WriteError(
        f"it could not be written: {reason[:1].lower()}{reason[1:]}",
        where=path,
        exists="the target is unchanged, and temporary files were removed",
        hint=hint,
    )
    made.errno = error.errno
    return made


def free_bytes(folder: str) -> int:
    """Bytes that may still be written to the file system of a directory."""
    about = os.statvfs(folder or ".")
    return about.f_bavail * about.f_frsize


class Target:
    """Files that are written, and take their places together.

    Used as a context: what was not committed at its end is discarded.

    Args:
        path: The target as the user wrote it.
        folder: The directory that the files are written to.

    Attributes:
        not_kept: What the new files could not take over from those that they replace, in words.
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
        """A sentence on what could not be kept, if there is such."""
        return (f"not kept of what was replaced: {', '.join(self.not_kept)}",) if self.not_kept else ()

    def __exit__(self, *_: object) -> None:
        try:
            if not self._committed:
                self.discard()
            else:
                with suppress(OSError):  # the new one is in place; what is left over is for the next run
                    self.settle()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def create(self, name: str, size: int) -> int:
        """The file that will be called `name`, of this size, to write to."""
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
        """Put the new in the place of the old."""
        raise NotImplementedError

    def settle(self) -> None:
        """Remove what the new does not need."""

    def discard(self) -> None:
        """Remove what was written."""
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
                f"the disk did not confirm it: {error.strerror or error}",
                where=self.path,
                exists="the new one is in place, and may not be after a loss of power",
            ) from error

    def temporary(self, name: str) -> str:
        """Where a file is until it takes its place."""
        return partial(os.path.join(self.folder, name))

    def _descriptor(self, path: str) -> int:
        return _system.create(path)


class OneFile(Target):
    """A target that is one file.

    Args:
        path: The file.
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
        """Where the file is until it takes its place."""
        return self._partial

    def _descriptor(self, path: str) -> int:
        assert self._lock is not None  # taken when the context was entered
        return self._lock

    def commit(self, index: bytes | None) -> None:
        """Rename it."""
        _system.rename(self._partial, self.path)
        self._confirm(self.folder)

    def discard(self) -> None:
        """Remove the temporary file, also if nothing was written to it."""
        super().discard()
        with suppress(OSError):
            _system.remove(self._partial)


def replace_file(path: str, contents: bytes) -> None:
    """Put a small file in the place of another, at once; that its name is on the disk is for the caller to see to."""
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
    """A file that no other process has, opened; and its path, which differs where the file system has no locks.

    Raises:
        WriteError: Another process has it.
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
        time.sleep(0.005)  # whoever cleans up has it for a moment
    raise WriteError("another process is writing to it", where=target, hint="wait until it finishes")


def _is_at(fd: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def clean(folder: str) -> None:
    """Remove what runs that were killed have left in a directory."""
    folder = folder or "."
    try:
        names = [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(PARTIAL)]
    except OSError:
        return  # writing there will say why
    for name in names:
        path = os.path.join(folder, name)
        is_directory = os.path.isdir(path)
        with suppress(OSError):
            fd = os.open(
                os.path.join(path, JOURNAL) if is_directory else path,
                os.O_RDWR | _system.NO_LINK | os.O_CREAT * is_directory,
            )
            try:
                if _system.lock(fd):
                    (clear if is_directory else _system.remove)(path)
            finally:
                os.close(fd)


def clear(folder: str) -> None:
    """Remove a temporary directory, with what this library puts into one."""
    for name in os.listdir(folder):
        if name.startswith(JOURNAL) or name.endswith(PARTIAL) or name == INDEX or FAMILY.fullmatch(name):
            _system.remove(os.path.join(folder, name))
    _system.remove_directory(folder)


def write_file(path: str, contents: bytes) -> tuple[str, ...]:
    """Write a small file: it takes the place of what is there as a whole, or not at all.

    Returns:
        A sentence on what the new file could not take over from the one that it replaces, if there is such.

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
    """Refuse a path at which no file can take the place of what is there.

    Raises:
        WriteError: Its name is too long, or a link to a device or a stream has it.
    """
    folder, name = os.path.split(path)
    length, most = len(os.fsencode(name)), NAME_BYTES
    if hasattr(os, "pathconf"):
        with suppress(OSError, ValueError):
            most = os.pathconf(folder or ".", "PC_NAME_MAX")
    if length > most:
        raise WriteError(
            f"the name of the file has {length} bytes; the file system allows {most}",
            where=path,
            hint="choose a shorter name",
        )
    if os.path.islink(path) and os.path.realpath(folder or ".") == "/dev":  # /dev/stdout, whatever it leads to
        raise WriteError("not a regular file", where=path, hint="name a file")


def free_or_raise(folder: str, needed: int, path: str) -> None:
    """Refuse to begin what will not fit.

    Raises:
        PlanError: The disk has less room than is needed.
    """
    try:
        free = free_bytes(folder)
    except OSError:
        return  # writing there will say why
    if needed > free:
        raise PlanError(
            f"it takes {human_bytes(needed)}, and the disk has {human_bytes(free)} free",
            where=path,
            hint="free some, or write elsewhere",
        )
