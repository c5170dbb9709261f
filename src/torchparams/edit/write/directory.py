"""Write a checkpoint directory so that it holds a complete checkpoint at every moment, old or new.

**A new directory** is written under a temporary name beside the target, then renamed.

**An existing directory** may hold other files, and other programs may have it open, so it cannot be renamed. A sharded
checkpoint is defined by its index, which is a single file: replacing the index atomically switches from the old set of
shards to the new one.

1. Write the new shards under temporary names, which no reader opens.
2. Put an index of the *old* checkpoint in place, so that no other file counts. If new shards will reuse names of old
   ones, the old files get second names (hard links, `model.previous-00001-of-00003.safetensors`), and this index refers
   to those. The checkpoint is the same at every moment.
3. Rename the new shards to their final names.
4. Replace the old index by the new one. **This is the switch.**
5. Remove files that the new index does not name, and the index itself if a single file needs none.

A journal in the directory records the state of the write. It stays locked while its writer is alive: a second writer
gets an error. After a writer was killed, the next one first finishes step 5, or reverts steps 3 and 2.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from torchparams.edit.write.safetensors_out import index_of
from torchparams.errors import PlanError, TorchParamsError, WriteError
from torchparams.io import system as _system
from torchparams.io.write import (
    FAMILY,
    INDEX,
    JOURNAL,
    PARTIAL,
    STEM,
    TRIES,
    Target,
    clean,
    clear,
    partial,
    replace_file,
    take,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_PREVIOUS = f"{STEM}.previous"
_CHECKPOINT = re.compile(r".*(\.safetensors|\.pt|\.pth|\.bin|\.ckpt|\.index(\.[^.]+)?\.json)")


class Directory(Target):
    """A target directory with a single file, or with shards and their index.

    Args:
        path: Path of the directory.
    """

    def __init__(self, path: str) -> None:
        self._final = path.rstrip("/" + os.sep) or path
        self._fresh = not os.path.isdir(path)
        super().__init__(path, partial(self._final) if self._fresh else path)
        self._journal = ""

    def __enter__(self) -> Self:
        try:
            self._lock, self._journal = self._take()
            self._recover()
        except BaseException:
            if self._lock is not None:
                self.__exit__()
            elif self._fresh:
                with suppress(OSError):  # another process uses it, or created it
                    _system.remove_directory(self.folder)
            raise
        return self

    def _take(self) -> tuple[int, str]:
        if self._fresh:
            clean(os.path.dirname(self._final))
        for _ in range(TRIES):
            if self._fresh:
                _system.make_directory(self.folder)
            try:
                return take(os.path.join(self.folder, JOURNAL), self.path)
            except FileNotFoundError:  # the clean-up of another process took it for a leftover
                if not self._fresh:
                    raise
        raise WriteError("another process is writing to it", where=self.path, hint="wait until it finishes")

    def _recover(self) -> None:
        recover(self.folder, self._journal)

    def commit(self, index: bytes | None) -> None:
        """Switch to the new checkpoint: steps 2 to 4 of the module's docstring."""
        names = list(self._written)
        finals = [os.path.join(self.folder, name) for name in names]
        old = _old_files(self.folder)
        replaces_itself = index is None and old == names and not os.path.exists(os.path.join(self.folder, INDEX))
        if self._fresh or not old or replaces_itself:
            self._write_journal(index or b"", names if index else [], [])
            for name, final in zip(names, finals, strict=True):
                _system.rename(self.temporary(name), final)
            if index is not None:
                self._replace_index(index)
        else:
            kept = _keep_old(self.folder, names, self._replace_index, self._note)
            old = sorted({*old, *kept})
            text = _index_of_one(self.temporary(names[0]), names[0]) if index is None else index
            self._write_journal(text, names, [name for name in old if name not in names], drop_index=index is None)
            for name, final in zip(names, finals, strict=True):
                _system.rename(self.temporary(name), final)
            _system.sync_directory(self.folder)
            self._replace_index(text)
        if self._fresh:
            _system.sync_directory(self.folder)
            self._close_where_no_locks_are()
            _system.rename(self.folder, self._final)
            self._confirm(os.path.dirname(self._final))
        else:
            self._confirm(self.folder)

    def settle(self) -> None:
        """Remove files that the new index does not name, then the journal."""
        if self._fresh:
            _system.remove(os.path.join(self._final, os.path.basename(self._journal)))
            return
        self._recover()
        _system.remove(self._journal)

    def discard(self) -> None:
        """Remove the written files, and the directory if this run created it."""
        super().discard()
        with suppress(OSError):
            if self._fresh:
                clear(self.folder)
                return
            self._recover()
            _system.remove(self._journal)

    def _note(self, kept: list[str]) -> None:
        self._write_journal(b"", [], [], links=kept)

    def _write_journal(
        self, index: bytes, new: list[str], old: list[str], *, links: Sequence[str] = (), drop_index: bool = False
    ) -> None:
        entry = {"index": _digest(index), "new": new, "old": old, "links": list(links), "drop_index": drop_index}
        assert self._lock is not None  # taken when the context was entered
        # Append a line; the previous one holds until this one is complete. The file may end in a partial line of a
        # killed run.
        _system.write(self._lock, b"\n" + json.dumps(entry).encode() + b"\n", os.fstat(self._lock).st_size)
        _system.sync(self._lock)

    def _replace_index(self, index: bytes) -> None:
        final = os.path.join(self.folder, INDEX)
        replace_file(final, index)


def recover(folder: str, journal: str) -> None:
    """Finish or revert the write that a journal describes. The caller holds its lock."""
    with open(journal, "rb") as file:
        text = file.read()
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(PARTIAL) and FAMILY.fullmatch(name[1 : -len(PARTIAL)]):
            _system.remove(os.path.join(folder, name))
    _system.remove(partial(os.path.join(folder, INDEX)))
    entry = _last_entry(text)
    if entry is None:
        return  # its writer was killed before it changed anything
    index_path = os.path.join(folder, INDEX)
    index, named = b"", set[str]()
    with suppress(FileNotFoundError), open(index_path, "rb") as file:
        index = file.read()
    with suppress(ValueError, KeyError, TypeError, AttributeError):  # an old index may be malformed
        named = set(json.loads(index)["weight_map"].values())
    committed = bool(entry["index"]) and _digest(index) == entry["index"]
    if entry["drop_index"] and not index and not any(os.path.exists(os.path.join(folder, old)) for old in entry["old"]):
        committed = True  # step 5 removes the index last: the writer was killed before it removed the journal
    surplus = entry["old"] if committed else [*entry["new"], *entry["links"]]
    for name in surplus:
        if name not in named and FAMILY.fullmatch(name):
            _system.remove(os.path.join(folder, name))
    if committed and entry["drop_index"]:
        _system.remove(index_path)
    if not committed:
        with suppress(OSError, ValueError, KeyError, AttributeError):
            _restore_names(folder)


def _digest(index: bytes) -> str:
    """Digest of an index for the journal; empty without an index."""
    from hashlib import sha256

    return sha256(index).hexdigest() if index else ""


def _last_entry(journal: bytes) -> dict[str, Any] | None:
    """Last complete line of a journal."""
    for line in reversed(journal.split(b"\n")[:-1]):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.keys() >= {"index", "new", "old", "links", "drop_index"}:
            return entry
    return None


def _restore_names(folder: str) -> None:
    """Restore the names of an old checkpoint: revert step 2."""
    path = os.path.join(folder, INDEX)
    with open(path, "rb") as file:
        index = json.loads(file.read())
    places: dict[str, str] = index["weight_map"]
    own = {name: name.replace(_PREVIOUS, STEM, 1) for name in set(places.values()) if name.startswith(_PREVIOUS)}
    if not own:
        return
    for second, first in own.items():
        _system.remove(os.path.join(folder, first))
        _system.link(os.path.join(folder, second), os.path.join(folder, first))
    _system.sync_directory(folder)
    index["weight_map"] = {name: own.get(file, file) for name, file in places.items()}
    replace_file(path, json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n")
    _system.sync_directory(folder)
    for second in own:
        _system.remove(os.path.join(folder, second))


def check_directory(path: str, overwrite: bool) -> None:
    """Raise if the directory holds a checkpoint that may not be replaced.

    Raises:
        PlanError: It holds a checkpoint, and `overwrite` is false; or a checkpoint under other names.
    """
    there = sorted(name for name in os.listdir(path) if not name.startswith(".") and _CHECKPOINT.fullmatch(name))
    others = [name for name in there if not FAMILY.fullmatch(name) and name != INDEX]
    if others:
        raise PlanError(
            f"the directory already holds a checkpoint under other names: {', '.join(others[:3])}",
            where=path,
            hint="write to another directory",
        )
    if there and not overwrite:
        raise PlanError(
            f"the directory already holds a checkpoint: {', '.join(there[:3])}{', …' if len(there) > 3 else ''}",
            where=path,
            hint="to replace it once the new one is complete, pass overwrite=True (--force)",
        )


def _old_files(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if FAMILY.fullmatch(name))


def _keep_old(folder: str, names: Sequence[str], replace_index: Any, note: Any) -> list[str]:
    """Step 2: index the old checkpoint under names that no new file will use.

    Returns:
        Second names that were created.
    """
    from torchparams.sources.opening import open_source

    try:
        source = open_source(folder, raw=True)
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
        return []  # an unreadable checkpoint is not kept
    files = sorted(set(places.values()))
    second = {name: name.replace(STEM, _PREVIOUS, 1) for name in files if name in set(names)}
    metadata.pop("total_size", None)
    if not os.path.exists(os.path.join(folder, INDEX)):  # before any file under a new name exists
        replace_index(index_of(places, total, metadata))
        _system.sync_directory(folder)
    if not second:
        return []
    note(list(second.values()))
    for name, other in second.items():
        _system.remove(os.path.join(folder, other))
        _system.link(os.path.join(folder, name), os.path.join(folder, other))
    _system.sync_directory(folder)
    replace_index(index_of({name: second.get(file, file) for name, file in places.items()}, total, metadata))
    _system.sync_directory(folder)
    return list(second.values())


def _index_of_one(path: str, name: str) -> bytes:
    from torchparams.sources.safetensors import SafetensorsSource

    infos = SafetensorsSource(path).infos().values()
    return index_of({info.name: name for info in infos}, sum(info.nbytes for info in infos), {})
