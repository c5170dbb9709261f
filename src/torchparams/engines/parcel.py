"""Work on its way to another process: what is pickled holds no open source, and paths are absolute.

A row of a file is a byte range. So a worker needs no source to read it: it gets an `Away` in its place, which knows the
files and the size and time that each had when the run began. Only a tensor without a range (a compressed member, say)
makes it open the source.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import TYPE_CHECKING, Any

from torchparams.errors import SourceError
from torchparams.info import Location
from torchparams.io import paths
from torchparams.io.files import size_and_time
from torchparams.sources.base import Source
from torchparams.sources.opening import open_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

    from torchparams.expressions.base import Expression, Readable
    from torchparams.info import ParameterInfo


def can_travel(row: Expression) -> bool:
    """Whether another process can read a row: all of it lies in files."""
    leaves = list(row.leaves())
    return bool(leaves) and all(
        not leaf.source.live and not leaf.source.borrowed and leaf.source.files for leaf in leaves
    )


def packed(what: Any, rows: Iterable[Expression]) -> bytes:
    """Anything that holds rows of files, as bytes for `unpacked`.

    Args:
        what: What is to be sent.
        rows: The rows in it: of their files, sizes and times are sent too.

    Raises:
        SourceError: A file cannot be looked at.
        Exception: Something in it cannot be pickled.
    """
    read: dict[int, set[str]] = {}
    opened: set[int] = set()
    sources: dict[int, Readable] = {}
    for row in rows:
        for leaf in row.leaves():
            key = id(leaf.source)
            sources[key] = leaf.source
            if leaf.place is None:
                opened.add(key)
                read.setdefault(key, set()).update(leaf.source.files)
            else:
                read.setdefault(key, set()).add(leaf.place.file)
    body = _pickled(what, sources)
    specs = {}
    for key, source in sources.items():
        seen = {_full(path): size_and_time(path) for path in sorted(read.get(key, ()))}
        specs[key] = (source.label, source.format, seen, _pickled(source, {}) if key in opened else b"")
    return pickle.dumps((specs, body), pickle.HIGHEST_PROTOCOL)


def unpacked(data: bytes) -> Any:
    """What `packed` was given, in the process that is to work on it."""
    specs, body = pickle.loads(data)
    reader = _Unpickler(io.BytesIO(body))
    reader.sources = {key: Away(*spec) for key, spec in specs.items()}
    return reader.load()


class Away(Source):
    """A source of files that another process has opened.

    Args:
        label, format: Those of the source.
        seen: Path of each file that is read → its size and modification time.
        opener: The source as a pickle, where its files must be opened.
    """

    def __init__(self, label: str, format: str, seen: Mapping[str, tuple[int, int]], opener: bytes) -> None:
        self.label, self.format = label, format
        self._seen = {paths.public(path): about for path, about in seen.items()}
        self._opener = opener
        self._source: Source | None = None

    def _opened(self) -> Source:
        if self._source is None:
            self._source = pickle.loads(self._opener)
        return self._source

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos of the source; opens it."""
        return self._opened().infos()

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """See `Source.numpy`."""
        return self._opened().numpy(name)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """See `Source.array`."""
        return self._opened().array(name)

    def close(self) -> None:
        """Let go of what was opened."""
        if self._source is not None:
            self._source.close()

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read."""
        return tuple(self._seen)

    def check_unchanged(self) -> None:
        """Refuse files that are not those which the sender listed.

        Raises:
            SourceError: A file is not there, or has another size or time.
        """
        for path, before in self._seen.items():
            try:
                now = size_and_time(path)
            except OSError as error:
                raise SourceError(
                    error.strerror or str(error), where=path, hint="keep the file where every node can read it"
                ) from None
            if now != before:
                raise SourceError(
                    "the file changed while it was read, or this node has another copy of it",
                    where=path,
                    hint="keep one copy on a disk that all nodes share, and run again",
                )


def _full(path: str) -> str:
    return paths.full(path) if paths.is_url(path) else os.path.join(os.getcwd(), path)


def _located(path: str, start: int, stop: int) -> Location:
    return Location(paths.public(path), start, stop)


def _pickled(what: Any, sources: Mapping[int, Readable]) -> bytes:
    import ray.cloudpickle as cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # Ray has no types here
        def persistent_id(self, value: Any) -> int | None:
            return id(value) if id(value) in sources else None

        def reducer_override(self, value: Any) -> Any:
            if type(value) is Location:
                return _located, (_full(value.file), value.start, value.stop)
            if isinstance(value, Source):
                made = value.__reduce__()
                if made[0] is open_path and not paths.is_url(made[1][0]):
                    return open_path, (os.path.join(os.getcwd(), made[1][0]),)
                return made
            return super().reducer_override(value)

    buffer = io.BytesIO()
    Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(what)
    return buffer.getvalue()


class _Unpickler(pickle.Unpickler):
    sources: Mapping[int, Source]

    def persistent_load(self, key: int) -> Source:
        return self.sources[key]
