"""A directory as a target: at every moment it holds the old checkpoint, whole, or the new one, whole.

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
so, and the next one after a writer that was killed first finishes step 5, or takes steps 3 and 2 back.
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
    """A target that is a directory with a file or with shards and their index.

    Args:
        path: The directory.
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
                with suppress(OSError):  # it is somebody else's, or was made for this
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
            except FileNotFoundError:  # whoever cleans up took it for one that is left over
                if not self._fresh:
                    raise
        raise WriteError("another process is writing it", where=self.path, hint="wait until it is done")

    def _recover(self) -> None:
        recover(self.folder, self._journal)

    def commit(self, index: bytes | None) -> None:
        """See the top of this module."""
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
            _system.rename(self.folder, self._final)
            self._confirm(os.path.dirname(self._final))
        else:
            self._confirm(self.folder)

    def settle(self) -> None:
        """Remove what the new index does not name, and the journal."""
        if self._fresh:
            _system.remove(os.path.join(self._final, os.path.basename(self._journal)))
            return
        self._recover()
        _system.remove(self._journal)

    def discard(self) -> None:
        """Remove what was written, and the directory where it was made for this."""
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
        # A line more: until it is whole, the one before holds. What is there may end within one, of a killed run.
        _system.write(self._lock, b"\n" + json.dumps(entry).encode() + b"\n", os.fstat(self._lock).st_size)
        _system.sync(self._lock)

    def _replace_index(self, index: bytes) -> None:
        final = os.path.join(self.folder, INDEX)
        replace_file(final, index)


def recover(folder: str, journal: str) -> None:
    """Finish or undo what the journal of a directory says; whoever calls has its lock."""
    with open(journal, "rb") as file:
        text = file.read()
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(PARTIAL) and FAMILY.fullmatch(name[1 : -len(PARTIAL)]):
            _system.remove(os.path.join(folder, name))
    _system.remove(partial(os.path.join(folder, INDEX)))
    entry = _last_entry(text)
    if entry is None:
        return  # its writer was killed before it had said anything, and so before it did
    index_path = os.path.join(folder, INDEX)
    index, named = b"", set[str]()
    with suppress(FileNotFoundError), open(index_path, "rb") as file:
        index = file.read()
    with suppress(ValueError, KeyError, TypeError, AttributeError):  # an old one may be anything
        named = set(json.loads(index)["weight_map"].values())
    committed = bool(entry["index"]) and _digest(index) == entry["index"]
    if entry["drop_index"] and not index and not any(os.path.exists(os.path.join(folder, old)) for old in entry["old"]):
        committed = True  # step 5 removes the index last: its writer was killed just before it removed the journal
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
    """What a journal says of an index; nothing of none."""
    from hashlib import sha256

    return sha256(index).hexdigest() if index else ""


def _last_entry(journal: bytes) -> dict[str, Any] | None:
    """The last line of a journal that is whole."""
    for line in reversed(journal.split(b"\n")[:-1]):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.keys() >= {"index", "new", "old", "links", "drop_index"}:
            return entry
    return None


def _restore_names(folder: str) -> None:
    """Give an old checkpoint its own names back, by step 2 the other way round."""
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
    """Refuse a directory with a checkpoint that may not be replaced.

    Raises:
        PlanError: It has one, and `overwrite` is not given; or one under another name.
    """
    there = sorted(name for name in os.listdir(path) if not name.startswith(".") and _CHECKPOINT.fullmatch(name))
    others = [name for name in there if not FAMILY.fullmatch(name) and name != INDEX]
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
    return sorted(name for name in os.listdir(folder) if FAMILY.fullmatch(name))


def _keep_old(folder: str, names: Sequence[str], replace_index: Any, note: Any) -> list[str]:
    """Step 2: an index of the checkpoint that is there, by names that no new file will have.

    Returns:
        Second names that were made.
    """
    from torchparams.sources.base import open_source

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
        return []  # what cannot be opened is not kept
    files = sorted(set(places.values()))
    second = {name: name.replace(STEM, _PREVIOUS, 1) for name in files if name in set(names)}
    metadata.pop("total_size", None)
    if not os.path.exists(os.path.join(folder, INDEX)):  # before any file of another name is there
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
