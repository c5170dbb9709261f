"""The table of file formats, and functions that open a path or an object as a source.

To add a file format, write a module in this folder with a `Source` subclass and add a row to `FORMATS`.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchparams.errors import (
    FileFormatError,
    RemoteError,
    SourceError,
    TruncatedFile,
    UnsupportedSource,
)
from torchparams.io import paths
from torchparams.io.files import Files, read_into, size_of
from torchparams.io.folders import is_directory
from torchparams.sources.base import Source, imported


@dataclass(frozen=True, slots=True)
class Format:
    """A file format: how to recognise it, and what opens it.

    Attributes:
        name: Name in messages.
        suffixes: Usual file name suffixes; for messages only, not for recognition.
        sniff: Whether a file with these first 512 bytes and this size has the format.
        opener: `module:callable` that takes `(path: str, inner: str | None)` and returns a `Source`; imported when
            needed. `inner` is the text after `#` in the target.
    """

    name: str
    suffixes: tuple[str, ...]
    sniff: Callable[[bytes, int], bool]
    opener: str

    def open(self, path: str, inner: str | None) -> Source:
        """Open `path` as a source."""
        return imported(self.opener)(path, inner)


def _is_legacy(head: bytes, size: int) -> bool:
    # A legacy file starts with the pickle of torch's magic number: PROTO n, LONG1 of 10 bytes.
    return head[:1] == b"\x80" and b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head[:32]


def _is_tar(head: bytes, size: int) -> bool:
    return head[257:262] == b"ustar" or head[:100].rstrip(b"\0") in (b"sys_info", b"tensors", b"storages")


def _is_pickle(head: bytes, size: int) -> bool:
    if head[:1] == b"\x80":
        return head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    # Protocols 0 and 1 have no mark. They begin with a container, or with a global: one line for its module and one for
    # its name.
    return head[:1] in (b"(", b"]", b"}", b"c", b"i") and re.match(_OLD_PICKLE, head) is not None


_OLD_PICKLE = rb"\(?(?:[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|[dl]p\d+\n)|[\]}][qr(]"


def _is_safetensors(head: bytes, size: int) -> bool:
    # A header starts with eight bytes of length, then JSON, which may start with white space. Any bytes can be a
    # length, so a file of another format may match; its length is then larger than the file. If no other format
    # matches, such a file is still opened as safetensors, and the reader explains what is wrong.
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
    """Open anything that has parameters as a source.

    Args:
        x: Live `nn.Module`, mapping of names to tensors or arrays, plan, `Source`, or path. A path is a file, a
            directory of shards, or either with `#inner` for a mapping inside it.
        buffers: List a live model's buffers too.
        raw: List the stored tensors of quantised parameters.

    Raises:
        UnsupportedSource: `x` has no parameters.
        FileFormatError: The format of the file is unknown, or the file is invalid.
    """
    source = _source_of(x, buffers)
    if raw:
        return source.stored
    if source is x or source.format == "module":
        return source
    return decoded(source)


def decoded(source: Source) -> Source:
    """The source with its quantised parameters decoded; the same source if it has none."""
    if not source.coded():
        return source
    found: Source = imported("torchparams.sources.decoded:DecodedSource")(source)
    return found


def _source_of(x: object, buffers: bool) -> Source:
    if isinstance(x, Source):
        return x
    if isinstance(x, str | os.PathLike):
        return open_path(os.fspath(x))
    made = getattr(x, "__torchparams_source__", None)
    if made is not None and not isinstance(x, type):  # a plan, or another object that provides a source
        found: Source = made()
        return found
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.nn.Module):
        return imported("torchparams.sources.live.module:ModuleSource")(x, buffers=buffers)
    if isinstance(x, Mapping):
        return imported("torchparams.sources.mapping:MappingSource")(x)
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
    """Open the file or directory `target`, which may end in `#inner`."""
    path, inner = split_target(paths.public(target))
    if not path:
        raise SourceError(f"{target!r} names no file", hint="pass the path of a checkpoint, or path#inner")
    described = paths.name_of(path) == ".metadata"  # it describes the distributed checkpoint in its directory
    if described:
        path = paths.folder_of(path) or "."
    if paths.is_url(path):
        return _open_url(path, inner, described or is_directory(path))
    if os.path.isdir(path):
        return imported("torchparams.sources.sharded:open_directory")(path, inner)
    return open_file(path, inner)


def _open_url(url: str, inner: str | None, directory: bool) -> Source:
    """Open a URL as a file or a directory; cached information about it is dropped first."""
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
    return imported("torchparams.sources.sharded:open_directory")(url, inner)


def open_file(path: str, inner: str | None = None, *, formats: tuple[Format, ...] = FORMATS) -> Source:
    """Open the file `path`, which must have one of `formats`."""
    if path.startswith("hf://"):
        from torchparams.io.remote.hub import cached

        path = cached(path) or path
    try:
        return format_of(path, formats).open(path, inner)
    except TruncatedFile as error:
        error.hint = error.hint or "download or copy the file again"
        raise


def format_of(path: str, formats: tuple[Format, ...] = FORMATS) -> Format:
    """Recognise the format of the file `path` by its first bytes; for a damaged file, by its suffix.

    Raises:
        SourceError: There is no such file.
        FileFormatError: The file has none of `formats`; the message says what it is, if that is known.
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
    if not path.endswith(".distcp"):  # shards of a distributed checkpoint may begin like another format
        for fmt in formats:
            if fmt.sniff(head, size):
                return fmt
    from torchparams.sources._recognise import foreign_file

    refused = foreign_file(path, head, size)
    if refused is not None:
        raise refused
    # Too damaged to be recognised: the reader of the format that the suffix suggests explains the error.
    for fmt in formats:
        if paths.name_of(path).endswith(fmt.suffixes):
            return fmt
    raise FileFormatError(
        f"unknown checkpoint format: the file starts with {head[:8]!r}",
        where=path,
        exists="supported formats: " + ", ".join(fmt.name for fmt in formats if fmt.name != "torch tar"),
    )


def _head(path: str) -> tuple[bytes, int]:
    """First 512 bytes of a file, and its size."""
    file = Files().open(path)
    try:
        memory = memoryview(bytearray(512))
        return bytes(memory[: read_into(file, [memory], 0, path)]), size_of(file)
    finally:
        file.close()


def reopened(source: Source) -> tuple[Any, ...]:
    """Value of `__reduce__` for a source of files: a copy, even in another process, opens the files itself."""
    label, mark, inner = source.label.partition("#") if paths.is_url(source.label) else (source.label, "", "")
    return open_path, (paths.full(label) + mark + inner,)


def split_target(target: str) -> tuple[str, str | None]:
    """Split a target into its path and the text after `#`; a file whose own name has `#` is tried first."""
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
