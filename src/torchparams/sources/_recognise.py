"""Files and directories that are no checkpoint of a known format: what they are, and what to do next.

Recognised by content, like the formats themselves. Nothing here reads more than the head of a file, or than the names
in a directory.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from torchparams.errors import FileFormatError, SourceError, TruncatedFile, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

AGAIN = "download or copy the file again"
"""What to do about a file of which a part is missing."""

_ARRAYS = "and pass its arrays as a mapping to torchparams.of"


class Magic(NamedTuple):
    """How the files of a foreign format begin.

    Attributes:
        mark: The bytes.
        at: Where they stand.
        what: What such a file is.
        hint: The next step.
    """

    mark: bytes
    at: int
    what: str
    hint: str


MAGICS = (
    Magic(
        b"GGUF",
        0,
        "a GGUF file of llama.cpp",
        "transformers reads it: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name); pass the model",
    ),
    *(
        Magic(mark, 0, "a GGML file, which llama.cpp wrote before GGUF", "convert it to GGUF with llama.cpp first")
        for mark in (b"lmgg", b"tjgg", b"fmgg", b"algg")
    ),
    Magic(b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", f"read it with h5py, or with Keras if it wrote it, {_ARRAYS}"),
    Magic(b"\x93NUMPY", 0, "a numpy array", "pass it under a name: torchparams.of({'array': numpy.load(path)})"),
    Magic(b"TFL3", 4, "a model of TensorFlow Lite", f"read it with its own library, {_ARRAYS}"),
    Magic(b"\x1f\x8b", 0, "compressed by gzip", "unpack it first: gunzip"),
    Magic(b"BZh", 0, "compressed by bzip2", "unpack it first: bunzip2"),
    Magic(b"\xfd7zXZ\0", 0, "compressed by xz", "unpack it first: unxz"),
    Magic(b"\x28\xb5\x2f\xfd", 0, "compressed by zstd", "unpack it first: unzstd"),
    Magic(b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", "unpack it first"),
    Magic(b"Rar!\x1a\x07", 0, "a RAR archive", "unpack it first"),
    Magic(b"%PDF", 0, "a PDF document", AGAIN),
)
"""Foreign formats that begin with a fixed mark."""

# Patterns as text: they are compiled when they are first asked for, which of most files none is.
_LFS = rb"version https?://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/"
_LFS_SIZE = rb"(?m)^size (\d{1,20})\r?$"
_ANNEX = rb"(?:\.\./)*(?:\.git)?/annex/objects/"
_HTML = rb"(?is)(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|title|script)\b"
_TITLE = rb"(?is)<title[^>]*>(.*?)</title>"
_WORDS = r"[A-Za-z]{2,}:? +[A-Za-z]{2,}"
# ONNX is a protobuf message: first its ir_version, a small number, then one of the fields that a model has.
_ONNX = rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]"
_DCP_PART = r"__\d+_\d+\.distcp"
_BESIDE = (
    r"(?:optimizer|scheduler|scaler)(?:_\d+)?\.(?:pt|bin)|sampler(?:_\d+)?\.bin|rng_state(?:_\d+)?\.pth|"
    r"training_args\.bin|random_states_\d+\.pkl|dl_state_dict(?:_\d+)?\.bin|custom_checkpoint_\d+\.pkl"
)


def foreign_file(path: str, head: bytes, size: int) -> FileFormatError | None:
    r"""The error that names a file of a format that is not read here; None where none is recognised.

    Args:
        path: The file.
        head: Its first bytes.
        size: How many it has.

    >>> pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5368709120\n"
    >>> print(foreign_file("model.safetensors", pointer, len(pointer)))
    model.safetensors: A Git LFS pointer to 5,368,709,120 bytes, not the file itself. Run git lfs pull.
    """
    if path.endswith(".distcp"):  # what begins like a zip is one tensor of many
        return FileFormatError(
            "one part of a distributed checkpoint (DCP)",
            where=path,
            hint=f"name the directory: {os.path.dirname(path) or '.'}",
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(_LFS, text):
        found = re.search(_LFS_SIZE, text)
        to = f" to {int(found[1]):,} bytes" if found else ""
        return FileFormatError(f"a Git LFS pointer{to}, not the file itself", where=path, hint="run git lfs pull")
    if re.match(_ANNEX, text):
        return FileFormatError("a git-annex pointer, not the file itself", where=path, hint="run git annex get")
    if re.match(_HTML, text):
        title = re.search(_TITLE, text)
        named = shorten(" ".join(title[1].decode("utf-8", "replace").split()), 60) if title else ""
        return FileFormatError(
            f"an HTML page{f' ({named})' if named else ''}, not a checkpoint",
            where=path,
            hint="the address leads to a page, or needs a login; download the file itself",
        )
    for magic in MAGICS:
        if head.startswith(magic.mark, magic.at):
            return FileFormatError(f"{magic.what}, which is not read here", where=path, hint=magic.hint)
    if re.match(_ONNX, head) and (path.endswith(".onnx") or b"onnx" in head or b"torch" in head):
        return FileFormatError(
            "an ONNX model, which is not read here",
            where=path,
            hint="the onnx package reads it: torchparams.of({each.name: onnx.numpy_helper.to_array(each) for each in "
            "onnx.load(path).graph.initializer})",
        )
    if not any(head):
        return TruncatedFile(
            f"it begins with {len(head):,} zero bytes, as an unfinished download does", where=path, hint=AGAIN
        )
    return _text(path, text, size)


def _text(path: str, head: bytes, size: int) -> FileFormatError | None:
    """The error for a short text without the braces of JSON: a message that was saved in the file's stead."""
    if size > len(head) + 8 or head[:1] in (b"{", b"["):
        return None
    try:
        line = " ".join(head.decode().split())
    except UnicodeDecodeError:
        return None
    if not line.isprintable() or not re.search(_WORDS, line):
        return None
    return FileFormatError(f"a text, not a checkpoint: {shorten(repr(line), 90)}", where=path, hint=AGAIN)


def foreign_directory(path: str, there: Sequence[str]) -> SourceError | None:
    """The error that names a directory with a checkpoint that is not read here; None where none is recognised.

    Args:
        path: The directory.
        there: The names in it.
    """
    if any(re.fullmatch(_DCP_PART, name) for name in there):
        return FileFormatError(
            "a distributed checkpoint (DCP) without its .metadata: it was not written to its end, or not copied whole",
            where=path,
        )
    return None


def weights_among(names: Sequence[str]) -> list[str]:
    """Of the files in a directory, those that may hold a model: not what a trainer saves beside it.

    >>> weights_among(["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"])
    ['model.safetensors']
    """
    return [name for name in names if not re.fullmatch(_BESIDE, name)]


def checkpoints_below(path: str, there: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """The directories in a directory that hold files with these suffixes, or a distributed checkpoint.

    Args:
        path: The directory.
        there: The names in it.
        suffixes: How checkpoints end.
    """
    found = []
    for name in there:
        below = os.path.join(path, name)
        try:
            inside = os.listdir(below) if os.path.isdir(below) else []
        except OSError:
            continue
        if any(each.endswith((*suffixes, ".distcp")) or each == "latest" for each in inside):
            found.append(name)
    return sorted(found, key=lambda name: [int(part) if part.isdecimal() else -1 for part in re.split(r"(\d+)", name)])
