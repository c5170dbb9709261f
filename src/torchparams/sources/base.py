"""What a source is, which file formats there are, and how the right one is found.

A **source** lists named parameters and reads their values. To add a file format, write one module
beside this one with a `Source` in it and add a row to `FORMATS`; its tests subclass
`torchparams.testing.SourceTests`.
"""

from __future__ import annotations

import importlib
import os
import re
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.encodings.companions import coded
from torchparams.errors import (
    FileFormatError,
    RemoteError,
    SourceError,
    TruncatedFile,
    UnknownName,
    UnsupportedSource,
)
from torchparams.expressions.base import Stored
from torchparams.io import paths
from torchparams.io.files import Files, read_into, size_of
from torchparams.io.folders import is_directory
from torchparams.order import naturally
from torchparams.records import Lone, Records

if TYPE_CHECKING:
    import numpy as np
    import torch

    from torchparams.encodings.base import Structure
    from torchparams.encodings.companions import Coded
    from torchparams.expressions.base import Expression
    from torchparams.info import Location, ParameterInfo
    from torchparams.left_out import LeftOut
    from torchparams.sources.torchfile.verdict import Verdict

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class Source(ABC):
    """Named parameters, wherever they live.

    A source never reads a value to list, and never reads one tensor to give another. Its methods
    may be called from several threads at once.

    Attributes:
        label: What tables and messages call it: a path as the user wrote it, or a class name.
        format: The kind of source: `module`, `mapping`, or a file format's name.
        live: Whether the next listing may differ from this one.
    """

    label: str
    format: str
    live: bool = False
    _spellings: dict[str, str] | None = None
    _ordered: Mapping[str, ParameterInfo] | None = None

    @property
    def borrowed(self) -> bool:
        """Whether its values lie in memory that belongs to others, who may write to it."""
        return self.live

    @abstractmethod
    def infos(self) -> Mapping[str, ParameterInfo]:
        """Canonical name → record, in the source's own order.

        A source that is not live gives the same mapping every time. The mapping may build its
        records as they are asked for; its length and names cost nothing.
        """

    def ordered(self) -> Mapping[str, ParameterInfo]:
        """The records in the order of tables: of files in natural order, else in the source's own."""
        if self.live or not self.files:
            return self.infos()
        if self._ordered is None:
            self._ordered = naturally(self.infos())
        return self._ordered

    def keys(self) -> Mapping[str, Any]:
        """A mapping whose keys are the canonical names, in order; cheaper than `infos` where that is not free."""
        return self.infos()

    def count(self) -> int:
        """How many entries it lists."""
        return len(self.keys())

    def walk(self, *, recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, str, Any]]:
        """Name, canonical name and value of every parameter, with the meaning of `nn.Module.named_parameters`.

        The two names differ for aliases, which are given only without `remove_duplicate`.
        """
        for name, info in self.ordered().items():
            for given in (name, *(() if remove_duplicate else info.aliases)):
                if recurse or "." not in given:
                    yield given, name, self.value(name)

    def records(self) -> Records:
        """One reading of the source, for something that asks several things of it; cheaper than `infos`."""
        return Records(self.infos().values())

    def alone(self, name: str) -> Lone | None:
        """The one parameter that `name` leads to, where it can be found without a look at the others; else None."""
        return None

    def snapshot(self, records: Records) -> Source:
        """A source of what `records`, a reading of this one, hold: it never changes."""
        return _opener("torchparams.sources.snapshot:SnapshotSource")(self, records)

    def coded(self, known: Records | None = None) -> Mapping[str, Coded]:
        """The tensors whose elements are no values by themselves, by canonical name; reads no values.

        Each verb that computes with values asks for them: codes without their scales would pass for numbers.

        Args:
            known: A reading of all tensors, where the caller has one; a selection may lack the scales.
        """
        return coded(self.records() if known is None else known)

    @abstractmethod
    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """The values of the tensor with the canonical name `name`, in its own shape.

        A view of the bytes where they lie whenever that is possible (then it is read-only or
        private: writing to it never changes a file), else an array of its own. Types that numpy
        lacks come as ml_dtypes' types, sub-byte types unpacked to an element a byte.

        Raises:
            NotReadable: There are no values to read: a meta tensor, an opaque type.
            LimitExceeded: They are larger than a limit allows.
        """

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The values as an array to keep: that of `numpy`, or a copy where its memory may be freed before it is.

        Raises:
            NotReadable: See `numpy`.
            LimitExceeded: See `numpy`.
        """
        return self.numpy(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The values as a torch tensor, without a copy where possible."""
        from torchparams.sources.totorch import from_numpy

        info = self.infos()[name]
        return from_numpy(self.numpy(name), info)

    def value(self, name: str) -> Any:
        """What `params[name]` gives: the tensor itself where there is one, else one that is read."""
        return self.tensor(name)

    def span(self, name: str) -> Location | None:
        """The byte range that holds exactly this tensor's elements, or None.

        In it they lie in C order, contiguous, little-endian, uncompressed: such a range can be
        scanned in blocks, compared and copied from file to file without knowing the tensor.
        """
        return None

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """The expression that the row with the canonical name `name` is.

        Args:
            name: The name.
            info: Its record, where the caller has it.

        Raises:
            UnknownName: The source has no such row.
            NotReadable: It is lazy: it has neither shape nor values. Or it is sharded in a way that is not known.
        """
        if self.borrowed:
            info = self.info(self.resolve(name)) if info is None else info
            if info.sharding is not None:
                sharded: Callable[..., Any] = _opener("torchparams.sources.live.sharded:sharded_row")
                row: Expression = sharded(self, info)
                return row
        return Stored(self, name, info)

    def check_size(self, name: str) -> None:
        """Refuse a tensor that has far more elements than there are bytes behind them, before any of it is read.

        Raises:
            LimitExceeded: It is one: a view that shows a few bytes over and over, or what a few bytes inflate to.
        """
        return

    def shows_storage(self, name: str) -> bool:
        """Whether its elements are those of its record's storage as they lie there: no conjugates, no negatives."""
        value: Any = self.value(name) if self.borrowed else None
        return not (hasattr(value, "is_conj") and (value.is_conj() or value.is_neg()))

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Canonical name and value of every entry, or of `names`; each value is read when its turn comes."""
        for name in self.keys() if names is None else names:
            yield name, self.value(name)

    def info(self, name: str) -> ParameterInfo:
        """The record of the canonical name `name`; cheaper than `infos` where that makes them all."""
        return self.infos()[name]

    def takes(self, name: str) -> bool:
        """Whether `value`, `tensor` and `numpy` take `name` as it is; they take at least every canonical name."""
        return name in self.infos()

    def find(self, name: str) -> str | None:
        """The canonical name for any spelling of it: canonical, raw, or an alias; None where there is no such one."""
        infos = self.infos()
        if name in infos:
            return name
        if self.live:
            return next((i.name for i in infos.values() if name == i.raw_name or name in i.aliases), None)
        if self._spellings is None:
            spellings: dict[str, str] = {}
            for info in infos.values():
                for other in (info.raw_name, *info.aliases):
                    spellings.setdefault(other, info.name)
            self._spellings = spellings
        return self._spellings.get(name)

    def resolve(self, name: str) -> str:
        """What `find` gives, or an error that names the nearest.

        Raises:
            UnknownName: The source has no such parameter.
        """
        found = self.find(name)
        if found is None:
            aliases = (alias for _, alias in self.records().aliases)
            raise UnknownName.among(name, self.keys(), self.label, aliases=aliases)
        return found

    @property
    def stored(self) -> Source:
        """The source of the tensors as they are stored: itself, unless it decodes quantised parameters."""
        return self

    @property
    def structures(self) -> Sequence[Structure]:
        """The parameters of classes that keep their values in other tensors, which it lists by these tensors."""
        return ()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the source says of itself beside its tensors: safetensors' metadata, a checkpoint's other entries."""
        return NO_METADATA

    @property
    def mappings(self) -> tuple[str, ...]:
        """The mappings within a checkpoint that hold tensors: what may follow `#` in a target. At most two levels."""
        return ()

    @property
    def verdict(self) -> Verdict | None:
        """What unpickling the files would do beside making tensors; None where nothing is a pickle."""
        return None

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State that belongs to the source and that its table does not list, with the reason."""
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files it is read from, none for a source in memory."""
        return ()

    def fingerprint(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and modification time (ns) of every file: equal while nobody has written to them."""
        return tuple((path, *size_and_time(path)) for path in self.files)

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were listed: what is read by `span` alone would be anything.

        Raises:
            SourceError: One was.
        """
        return  # of what is in memory, each listing is new

    def why_empty(self) -> list[str]:
        """Sentences that say why it lists nothing, where that is known."""
        return []

    def close(self) -> None:
        """Let go of open files. Arrays that were given out stay valid."""
        return  # nothing is open


@dataclass(frozen=True, slots=True)
class Format:
    """A file format: how it is recognised and who reads it.

    Attributes:
        name: What messages call it.
        suffixes: How its files usually end; only for messages, never for recognition.
        sniff: Whether a file with this head (its first 512 bytes) and this size is one.
        opener: `module:callable` of `(path: str, inner: str | None) -> Source`, imported when it is needed;
            `inner` is the text after `#` in the target.
    """

    name: str
    suffixes: tuple[str, ...]
    sniff: Callable[[bytes, int], bool]
    opener: str

    def open(self, path: str, inner: str | None) -> Source:
        """The source that reads `path`."""
        return _opener(self.opener)(path, inner)


def _opener(home: str) -> Callable[..., Source]:
    """What makes a kind of source, imported when the first such thing comes."""
    module, _, attribute = home.partition(":")
    found: Callable[..., Source] = getattr(importlib.import_module(module), attribute)
    return found


def _is_legacy(head: bytes, size: int) -> bool:
    # A legacy file starts with the pickle of torch's magic number: PROTO n, LONG1 of 10 bytes.
    return head[:1] == b"\x80" and b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head[:32]


def _is_tar(head: bytes, size: int) -> bool:
    return head[257:262] == b"ustar" or head[:100].rstrip(b"\0") in (b"sys_info", b"tensors", b"storages")


def _is_pickle(head: bytes, size: int) -> bool:
    if head[:1] == b"\x80":
        return head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    # Protocols 0 and 1 have no mark. They begin with a container, or with a global on a line for its module and one for
    # its name.
    return head[:1] in (b"(", b"]", b"}", b"c", b"i") and re.match(_OLD_PICKLE, head) is not None


_OLD_PICKLE = rb"\(?(?:[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|[dl]p\d+\n)|[\]}][qr(]"


def _is_safetensors(head: bytes, size: int) -> bool:
    # Eight bytes of header length, then JSON, which may start with white space. Any bytes can be a length, those of
    # another format too; as a length, they are beyond the file. Where nothing else is meant, a length beyond the file
    # is still this format's: its reader says what is wrong with it.
    if head[8:].lstrip(b" \t\r\n")[:1] != b"{":
        return False
    return int.from_bytes(head[:8], "little") <= size - 8 or not head.startswith((b"PK", b"\x80", b"{", b"<"))


FORMATS: tuple[Format, ...] = (
    Format(
        "safetensors",
        (".safetensors",),
        _is_safetensors,
        "torchparams.sources.safetensors:open_safetensors",
    ),
    Format(
        "torch zip",
        (".pt", ".pth", ".bin", ".ckpt"),
        lambda head, size: head[:4] in (b"PK\x03\x04", b"PK\x05\x06"),
        "torchparams.sources.torchfile.torchzip:open_torch_zip",
    ),
    Format(
        "torch legacy",
        (".pt", ".pth", ".bin"),
        _is_legacy,
        "torchparams.sources.torchfile.legacy:open_legacy",
    ),
    Format(
        "torch tar",
        (".pt", ".tar"),
        _is_tar,
        "torchparams.sources.torchfile.legacy:refuse_tar",
    ),
    Format(
        "pickle",
        (".pkl", ".pt"),
        _is_pickle,
        "torchparams.sources.torchfile.legacy:open_plain_pickle",
    ),
    Format(
        "sharded index",
        (".index.json",),
        lambda head, size: head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{",
        "torchparams.sources.sharded:open_index",
    ),
)


def open_source(x: object, *, buffers: bool = False, raw: bool = False) -> Source:
    """The source for anything that has parameters.

    Args:
        x: A live `nn.Module`, a mapping of names to tensors or arrays, a plan, a `Source`, or a path:
            a file, a directory of shards, or either with `#inner` for a mapping inside it.
        buffers: List a live model's buffers too.
        raw: List the tensors of quantised parameters as they are stored.

    Raises:
        UnsupportedSource: Nothing here lists the parameters of such a thing.
        FileFormatError: The file is of no known format, or breaks the rules of its own.
    """
    source = _source_of(x, buffers)
    if raw:
        return source.stored
    if source is x or source.format == "module":
        return source
    return decoded(source)


def decoded(source: Source) -> Source:
    """The source with its quantised parameters decoded; the source itself where none is known."""
    if not source.coded():
        return source
    found: Source = _opener("torchparams.sources.decoded:DecodedSource")(source)
    return found


def _source_of(x: object, buffers: bool) -> Source:
    if isinstance(x, Source):
        return x
    if isinstance(x, str | os.PathLike):
        return open_path(os.fspath(x))
    made = getattr(x, "__torchparams_source__", None)
    if made is not None and not isinstance(x, type):  # a plan, or whatever else says what its source is
        found: Source = made()
        return found
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.nn.Module):
        return _opener("torchparams.sources.live.module:ModuleSource")(x, buffers=buffers)
    if isinstance(x, Mapping):
        return _opener("torchparams.sources.mapping:MappingSource")(x)
    raise UnsupportedSource(
        f"a {type(x).__module__}.{type(x).__qualname__} has no parameters to list",
        exists="a source is an nn.Module, a mapping of tensors, or the path of a checkpoint",
        hint=_unsupported_hint(x),
    )


def _unsupported_hint(x: object) -> str | None:
    if isinstance(x, type) and hasattr(x, "state_dict"):
        return f"that is a class: make a model of it, {x.__name__}(…)"
    if callable(x) and getattr(x, "__name__", "") in ("parameters", "named_parameters"):
        return "pass the model itself"
    if hasattr(x, "state_dict"):
        return "pass its state_dict()"
    if isinstance(x, list | tuple) or hasattr(x, "__next__"):
        return "a list of tensors has no names: pass the model, or dict(model.named_parameters())"
    return None


def open_path(target: str) -> Source:
    """The source that reads the file or directory `target`, which may end in `#inner`."""
    path, inner = split_target(paths.public(target))
    if not path:
        raise SourceError(f"{target!r} names no file", hint="it is the path of a checkpoint, or path#inner")
    described = paths.name_of(path) == ".metadata"  # it describes the distributed checkpoint in its directory
    if described:
        path = paths.folder_of(path) or "."
    if paths.is_url(path):
        return _open_url(path, inner, described or is_directory(path))
    if os.path.isdir(path):
        return _opener("torchparams.sources.sharded:open_directory")(path, inner)
    return open_file(path, inner)


def _open_url(url: str, inner: str | None, directory: bool) -> Source:
    """The source that reads what a URL names, which is looked at anew: a file, else a directory."""
    from torchparams.io.remote.file import forget
    from torchparams.io.remote.listing import entries_if_listed

    forget(url)
    if url.startswith("hf://"):
        from torchparams.io.remote.hub import cached_directory

        if directory and (folder := cached_directory(url)) is not None:
            return open_path(folder if inner is None else f"{folder}#{inner}")
    if not directory:
        try:
            return open_file(url, inner)
        except RemoteError as error:
            if error.status != 404 or not entries_if_listed(url):
                raise
    return _opener("torchparams.sources.sharded:open_directory")(url, inner)


def open_file(path: str, inner: str | None = None, *, formats: tuple[Format, ...] = FORMATS) -> Source:
    """The source that reads the file `path`, which is of one of `formats`."""
    if path.startswith("hf://"):
        from torchparams.io.remote.hub import cached

        path = cached(path) or path
    try:
        return format_of(path, formats).open(path, inner)
    except TruncatedFile as error:
        error.hint = error.hint or "download or copy the file again"
        raise


def format_of(path: str, formats: tuple[Format, ...] = FORMATS) -> Format:
    """The format of the file `path`, by its first bytes; of a damaged file, the one that its name claims.

    Raises:
        SourceError: There is no such file.
        FileFormatError: It is of none of `formats`; the message says what it is, where that is known.
    """
    try:
        # Opening a named pipe would wait for somebody to write to it.
        if not paths.is_url(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise SourceError("not a regular file", where=path)
        head, size = _head(path)
    except RemoteError:
        raise
    except FileNotFoundError:
        raise SourceError("no such file or directory", where=path, hint=_neighbours(path)) from None
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        raise SourceError(getattr(error, "strerror", None) or str(error), where=path) from None
    if size == 0:
        raise FileFormatError("the file is empty", where=path, hint="download or copy the file again")
    if not path.endswith(".distcp"):  # the parts of a distributed checkpoint may begin like a checkpoint
        for fmt in formats:
            if fmt.sniff(head, size):
                return fmt
    from torchparams.sources._recognise import foreign_file

    refused = foreign_file(path, head, size)
    if refused is not None:
        raise refused
    # Too damaged to be recognised: the format that its name claims says what is wrong.
    for fmt in formats:
        if paths.name_of(path).endswith(fmt.suffixes):
            return fmt
    raise FileFormatError(
        f"not a checkpoint that is known here: it starts with {head[:8]!r}",
        where=path,
        exists="known are " + ", ".join(fmt.name for fmt in formats if fmt.name != "torch tar"),
    )


def _head(path: str) -> tuple[bytes, int]:
    """The first 512 bytes of a file, and its size."""
    file = Files().open(path)
    try:
        memory = memoryview(bytearray(512))
        return bytes(memory[: read_into(file, [memory], 0, path)]), size_of(file)
    finally:
        file.close()


def size_and_time(path: str) -> tuple[int, int]:
    """Size and modification time (ns) of a file; of a remote one, its size and a number made of its version."""
    if paths.is_url(path):
        from torchparams.io.remote.file import remote

        return remote(path).size, remote(path).version
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def reopened(source: Source) -> tuple[Any, ...]:
    """What `__reduce__` gives for a source of files: a copy, also one in another process, opens them itself."""
    label, mark, inner = source.label.partition("#") if paths.is_url(source.label) else (source.label, "", "")
    return open_path, (paths.full(label) + mark + inner,)


def split_target(target: str) -> tuple[str, str | None]:
    """A target's path and the text after `#`; a file whose own name holds `#` is found first."""
    if paths.is_url(target):
        return paths.split_inner(target)
    if "#" not in target or os.path.exists(target):
        return target, None
    path, _, inner = target.rpartition("#")
    while "#" in path and not os.path.exists(path):
        path, _, more = path.rpartition("#")
        inner = f"{more}#{inner}"
    return path, inner


def _neighbours(path: str) -> str | None:
    from torchparams.errors import nearest

    folder, name = os.path.split(path)
    try:
        there = sorted(os.listdir(folder or "."))
    except OSError:
        return f"the directory {folder} does not exist either"
    near = nearest(name, there)
    if not near:
        return None
    return "did you mean " + " or ".join(os.path.join(folder, n) for n in near) + "?"
