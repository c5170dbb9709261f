"""How a target gets to the disk: at every moment it is the old one, whole, or the new one, whole.

**A file** is written under a temporary name beside it, synchronised, and renamed.

**A directory that does not exist** is written under a temporary name beside it, and renamed.

**A directory that exists** holds other files too, and other programs have it open, so it stays where it is. What makes
a set of shards the checkpoint of a directory is its index, and that is one file: replaced at once, it is the moment at
which the new set takes the place of the old.

1. New shards are written under temporary names, which no reader looks at.
2. An index of the *old* checkpoint is put in place, so that no other file counts. Where the new shards will have the
   names of the old, the old ones are given second names (hard links, `model.previous-00001-of-00003.safetensors`)
   and this index names those: the same checkpoint, at every moment.
3. New shards get their names.
4. The new index replaces the old. **This is the moment.**
5. What the new index does not name is removed; and the index, where one file alone needs none.

A journal in the directory says what is on the way. It is locked as long as its writer lives: a second writer is told
so, and the next one after a writer that was killed first finishes step 5, or removes what step 3 left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

from torchparams.edit import _system
from torchparams.edit._safetensors_out import INDEX, STEM, index_of
from torchparams.errors import PlanError, TorchParamsError, WriteError
from torchparams.report import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PARTIAL = ".torchparams-partial"
"""How temporary names end; they begin with a dot."""

JOURNAL = ".torchparams-writing"
"""The journal of a directory that is written to."""

_FAMILY = re.compile(rf"{STEM}(\.previous)?(-\d{{5}}-of-\d{{5}})?\.safetensors")
_CHECKPOINT = re.compile(r".*(\.safetensors|\.pt|\.pth|\.bin|\.ckpt|\.index(\.[^.]+)?\.json)")
_TRIES = 20


def partial(path: str) -> str:
    """The temporary name of a target.

    >>> partial("out/model.safetensors")
    'out/.model.safetensors.torchparams-partial'
    """
    folder, name = os.path.split(path)
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
    }.get(error.errno or 0)
    made = WriteError(
        f"it could not be written: {reason[:1].lower()}{reason[1:]}",
        where=path,
        exists="the target is as it was, and nothing is left behind",
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
    """

    def __init__(self, path: str, folder: str) -> None:
        self.path = path
        self.folder = folder
        self._open: dict[str, int] = {}
        self._written: list[str] = []
        self._lock: int | None = None
        self._committed = False

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        try:
            if not self._committed:
                self.discard()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def create(self, name: str, size: int) -> int:
        """The file that will be called `name`, of this size, to write to."""
        path = self._temporary(name)
        fd = self._open[name] = self._descriptor(path)
        if name not in self._written:
            self._written.append(name)
        _system.resize(fd, 0)
        _system.reserve(fd, size)
        _system.resize(fd, size)
        return fd

    def finish(self, name: str) -> None:
        """Wait until a file is on the disk, and close it."""
        fd = self._open[name]
        self._keep_mode(name, fd)
        _system.sync(fd)
        del self._open[name]
        if fd != self._lock:
            os.close(fd)

    def commit(self, index: bytes | None) -> None:
        """Put the new in the place of the old."""
        raise NotImplementedError

    def discard(self) -> None:
        """Remove what was written."""
        for fd in self._open.values():
            if fd != self._lock:
                os.close(fd)
        self._open.clear()
        for name in self._written:
            _system.remove(self._temporary(name))

    def _temporary(self, name: str) -> str:
        return partial(os.path.join(self.folder, name))

    def _descriptor(self, path: str) -> int:
        return _system.create(path)

    def _keep_mode(self, name: str, fd: int) -> None:
        """A file that takes another's place has its permissions."""
        with suppress(OSError):
            mode = stat.S_IMODE(os.stat(os.path.join(self.folder, name)).st_mode)
            if hasattr(os, "fchmod"):
                os.fchmod(fd, mode)


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

    def _temporary(self, name: str) -> str:
        return self._partial

    def _descriptor(self, path: str) -> int:
        assert self._lock is not None  # taken when the context was entered
        return self._lock

    def commit(self, index: bytes | None) -> None:
        """Rename it."""
        _system.rename(self._partial, self.path)
        self._committed = True
        _system.sync_directory(self.folder or ".")

    def discard(self) -> None:
        """Remove the temporary file, also if nothing was written to it."""
        super().discard()
        _system.remove(self._partial)


class Directory(Target):
    """A target that is a directory with a file or with shards and their index.

    Args:
        path: The directory.
    """

    def __init__(self, path: str) -> None:
        self._final = path.rstrip("/" + os.sep) or path
        self._fresh = not os.path.isdir(path)
        super().__init__(path, partial(self._final) if self._fresh else path)

    def __enter__(self) -> Self:
        if self._fresh:
            clean(os.path.dirname(self._final))
            _system.make_directory(self.folder)
        self._lock, _ = take(os.path.join(self.folder, JOURNAL), self.path)
        recover(self.folder)
        return self

    def commit(self, index: bytes | None) -> None:
        """See the top of this module."""
        names = list(self._written)
        finals = [os.path.join(self.folder, name) for name in names]
        old = _old_files(self.folder)
        replaces_itself = index is None and old == names and not os.path.exists(os.path.join(self.folder, INDEX))
        if self._fresh or not old or replaces_itself:
            self._write_journal(index or b"", names if index else [], [])
            for name, final in zip(names, finals, strict=True):
                _system.rename(self._temporary(name), final)
            if index is not None:
                self._replace_index(index)
        else:
            kept = _keep_old(self.folder, names, self._replace_index, self._note)
            old = sorted({*old, *kept})
            text = index or index_of({"": names[0]}, 0, {})
            if index is None:
                text = _index_of_one(self._temporary(names[0]), names[0])
            self._write_journal(text, names, [name for name in old if name not in names], drop_index=index is None)
            for name, final in zip(names, finals, strict=True):
                _system.rename(self._temporary(name), final)
            _system.sync_directory(self.folder)
            self._replace_index(text)
        self._committed = True
        _system.sync_directory(self.folder)
        recover(self.folder)
        self._leave()
        if self._fresh:
            _system.rename(self.folder, self._final)
            _system.sync_directory(os.path.dirname(self._final) or ".")

    def discard(self) -> None:
        """Remove what was written, and the directory where it was made for this."""
        super().discard()
        recover(self.folder)
        self._leave()
        if self._fresh:
            with suppress(OSError):
                _system.remove_directory(self.folder)

    def _leave(self) -> None:
        _system.remove(os.path.join(self.folder, JOURNAL))

    def _note(self, kept: list[str]) -> None:
        self._write_journal(b"", [], [], links=kept)

    def _write_journal(
        self, index: bytes, new: list[str], old: list[str], *, links: Sequence[str] = (), drop_index: bool = False
    ) -> None:
        digest = hashlib.sha256(index).hexdigest() if index else ""
        entry = {"index": digest, "new": new, "old": old, "links": list(links), "drop_index": drop_index}
        text = json.dumps(entry).encode()
        assert self._lock is not None  # taken when the context was entered
        _system.resize(self._lock, 0)
        _system.write(self._lock, text, 0)
        _system.sync(self._lock)

    def _replace_index(self, index: bytes) -> None:
        final = os.path.join(self.folder, INDEX)
        replace_file(final, index)


def replace_file(path: str, contents: bytes) -> None:
    """Put a small file in the place of another, at once."""
    temporary = partial(path)
    fd = _system.create(temporary)
    try:
        _system.resize(fd, 0)
        _system.write(fd, contents, 0)
        _system.sync(fd)
    finally:
        os.close(fd)
    _system.rename(temporary, path)
    _system.sync_directory(os.path.dirname(path) or ".")


def take(path: str, target: str) -> tuple[int, str]:
    """A file that no other process has, opened; and its path, which differs where the file system has no locks.

    Raises:
        WriteError: Another process has it.
    """
    for attempt in range(_TRIES):
        fd = _system.create(path)
        held = _system.lock(fd)
        if held is None:
            os.close(fd)
            path = f"{path}.{os.getpid()}"
            return _system.create(path), path
        if held and _is_at(fd, path):
            return fd, path
        os.close(fd)
        if not held and attempt > _TRIES // 2:
            break
        time.sleep(0.005)  # whoever cleans up has it for a moment
    raise WriteError("another process is writing it", where=target, hint="wait until it is done")


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
            fd = os.open(os.path.join(path, JOURNAL) if is_directory else path, os.O_RDWR | os.O_CREAT * is_directory)
            try:
                if _system.lock(fd):
                    for inside in os.listdir(path) if is_directory else ():
                        if inside in (JOURNAL, INDEX) or inside.endswith(PARTIAL) or _FAMILY.fullmatch(inside):
                            _system.remove(os.path.join(path, inside))
                    (_system.remove_directory if is_directory else _system.remove)(path)
            finally:
                os.close(fd)


def recover(folder: str) -> None:
    """Finish or undo what the journal of a directory says; whoever calls has its lock."""
    with open(os.path.join(folder, JOURNAL), "rb") as file:
        text = file.read()
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(PARTIAL) and _FAMILY.fullmatch(name[1 : -len(PARTIAL)]):
            _system.remove(os.path.join(folder, name))
    _system.remove(partial(os.path.join(folder, INDEX)))
    try:
        entry: dict[str, Any] = json.loads(text)
    except ValueError:
        return  # its writer was killed before it had said anything, and so before it did
    index_path = os.path.join(folder, INDEX)
    try:
        with open(index_path, "rb") as file:
            index = file.read()
        named = set(json.loads(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        index, named = b"", set()
    committed = bool(entry["index"]) and hashlib.sha256(index).hexdigest() == entry["index"]
    surplus = entry["old"] if committed else [*entry["new"], *entry["links"]]
    for name in surplus:
        if name not in named and _FAMILY.fullmatch(name):
            _system.remove(os.path.join(folder, name))
    if committed and entry["drop_index"]:
        _system.remove(index_path)


def check_directory(path: str, overwrite: bool) -> None:
    """Refuse a directory with a checkpoint that may not be replaced.

    Raises:
        PlanError: It has one, and `overwrite` is not given; or one under another name.
    """
    there = sorted(name for name in os.listdir(path) if not name.startswith(".") and _CHECKPOINT.fullmatch(name))
    others = [name for name in there if not _FAMILY.fullmatch(name) and name != INDEX]
    if others:
        raise PlanError(
            f"the directory holds another checkpoint already: {', '.join(others[:3])}",
            where=path,
            hint="write to another directory",
        )
    if there and not overwrite:
        raise PlanError(
            f"the directory holds a checkpoint already: {', '.join(there[:3])}{', …' if len(there) > 3 else ''}",
            where=path,
            hint="to replace it once the new one is complete, pass overwrite=True (--force)",
        )


def _old_files(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if _FAMILY.fullmatch(name))


def _keep_old(folder: str, names: Sequence[str], replace_index: Any, note: Any) -> list[str]:
    """Step 2: an index of the checkpoint that is there, by names that no new file will have.

    Returns:
        Second names that were made.
    """
    from torchparams.sources.base import open_source

    try:
        source = open_source(folder)
        places = {
            name: os.path.basename(info.location.file)
            for info in source.infos().values()
            if info.location is not None
            for name in (info.name, *info.aliases)
        }
        total = sum(info.nbytes for info in source.infos().values())
        metadata = dict(source.metadata) if os.path.exists(os.path.join(folder, INDEX)) else {}
        source.close()
    except TorchParamsError:
        return []  # what cannot be opened is not kept
    files = sorted(set(places.values()))
    second = {name: name.replace(STEM, f"{STEM}.previous", 1) for name in files if name in set(names)}
    metadata.pop("total_size", None)
    if not os.path.exists(os.path.join(folder, INDEX)):  # before any file of another name is there
        replace_index(index_of(places, total, metadata))
    if not second:
        return []
    note(list(second.values()))
    for name, other in second.items():
        _system.remove(os.path.join(folder, other))
        _system.link(os.path.join(folder, name), os.path.join(folder, other))
    _system.sync_directory(folder)
    replace_index(index_of({name: second.get(file, file) for name, file in places.items()}, total, metadata))
    return list(second.values())


def _index_of_one(path: str, name: str) -> bytes:
    from torchparams.sources._safetensors import SafetensorsSource

    infos = SafetensorsSource(path).infos().values()
    return index_of({info.name: name for info in infos}, sum(info.nbytes for info in infos), {})


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
