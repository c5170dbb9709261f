"""Recognise files and directories that are not a supported checkpoint, and suggest the next step.

Recognition uses content, as for supported formats. It only reads the head of a file, or the names in a directory.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from torchparams.errors import FileFormatError, SourceError, TruncatedFile, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

AGAIN = "download or copy the file again"
"""Hint for truncated files."""

_ARRAYS = "and pass its arrays as a mapping to torchparams.of"


class Magic(NamedTuple):
    """Magic bytes of a foreign format.

    Attributes:
        mark: Magic bytes.
        at: Their offset.
        what: Description of the file.
        hint: Next step.
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
        "load it with transformers: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name); pass the model",
    ),
    *(
        Magic(mark, 0, "a GGML file, which llama.cpp wrote before GGUF", "convert it to GGUF with llama.cpp first")
        for mark in (b"lmgg", b"tjgg", b"fmgg", b"algg")
    ),
    Magic(b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", f"read it with h5py, or with Keras if Keras wrote it, {_ARRAYS}"),
    Magic(b"\x93NUMPY", 0, "a numpy array", "pass it under a name: torchparams.of({'array': numpy.load(path)})"),
    Magic(b"TFL3", 4, "a TensorFlow Lite model", f"read it with TensorFlow Lite, {_ARRAYS}"),
    Magic(b"\x1f\x8b", 0, "compressed by gzip", "unpack it first: gunzip"),
    Magic(b"BZh", 0, "compressed by bzip2", "unpack it first: bunzip2"),
    Magic(b"\xfd7zXZ\0", 0, "compressed by xz", "unpack it first: unxz"),
    Magic(b"\x28\xb5\x2f\xfd", 0, "compressed by zstd", "unpack it first: unzstd"),
    Magic(b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", "unpack it first"),
    Magic(b"Rar!\x1a\x07", 0, "a RAR archive", "unpack it first"),
    Magic(b"%PDF", 0, "a PDF document", AGAIN),
)
"""Foreign formats with magic bytes."""

# Patterns as text: they are compiled at first use, which most files do not need.
_LFS = rb"version https?://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/"
_LFS_SIZE = rb"(?m)^size (\d{1,20})\r?$"
_ANNEX = rb"(?:\.\./)*(?:\.git)?/annex/objects/"
_HTML = rb"(?is)(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|title|script)\b"
_TITLE = rb"(?is)<title[^>]*>(.*?)</title>"
_WORDS = r"[A-Za-z]{2,}:? +[A-Za-z]{2,}"
# An ONNX file is a protobuf message: a small ir_version, then one of the fields of a model.
_ONNX = rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]"
_DCP_PART = r"__\d+_\d+\.distcp"
_BESIDE = (
    r"(?:optimizer|scheduler|scaler)(?:_\d+)?\.(?:pt|bin)|sampler(?:_\d+)?\.bin|rng_state(?:_\d+)?\.pth|"
    r"training_args\.bin|random_states_\d+\.pkl|dl_state_dict(?:_\d+)?\.bin|custom_checkpoint_\d+\.pkl"
)


def foreign_file(path: str, head: bytes, size: int) -> FileFormatError | None:
    r"""Error that names a foreign format; None if the file is not recognised.

    Args:
        path: Path of the file.
        head: First bytes of the file.
        size: Size of the file in bytes.

    >>> pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5368709120\n"
    >>> print(foreign_file("model.safetensors", pointer, len(pointer)))
    model.safetensors: A Git LFS pointer to 5,368,709,120 bytes, not the file itself. Run git lfs pull.
    """
    if path.endswith(".distcp"):  # a zip of one tensor among many
        return FileFormatError(
            "one part of a distributed checkpoint (DCP)",
            where=path,
            hint=f"pass the directory: {os.path.dirname(path) or '.'}",
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
            hint="the URL leads to a web page, or needs a login; download the file itself",
        )
    for magic in MAGICS:
        if head.startswith(magic.mark, magic.at):
            return FileFormatError(f"{magic.what}, which is not supported", where=path, hint=magic.hint)
    if re.match(_ONNX, head) and (path.endswith(".onnx") or b"onnx" in head or b"torch" in head):
        return FileFormatError(
            "an ONNX model, which is not supported",
            where=path,
            hint="load it with the onnx package: "
            "torchparams.of({each.name: onnx.numpy_helper.to_array(each) for each in "
            "onnx.load(path).graph.initializer})",
        )
    if not any(head):
        return TruncatedFile(
            f"the file starts with {len(head):,} zero bytes, like an unfinished download", where=path, hint=AGAIN
        )
    return _text(path, text, size)


def _text(path: str, head: bytes, size: int) -> FileFormatError | None:
    """Error for a short text that is not JSON: an error message saved in place of a file."""
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
    """Error that names a directory with an unsupported checkpoint; None if it is not recognised.

    Args:
        path: Path of the directory.
        there: Names in the directory.
    """
    if any(re.fullmatch(_DCP_PART, name) for name in there):
        return FileFormatError(
            "a distributed checkpoint (DCP) without .metadata: writing or copying it was not completed",
            where=path,
        )
    if "record.json" in there:
        return FileFormatError(
            "the record of a training, not a checkpoint",
            where=path,
            hint=f"torchparams history {path} shows it; so do diagnose and report",
        )
    return None


def weights_among(names: Sequence[str]) -> list[str]:
    """Files in a directory that may hold a model, without files that a trainer saves beside it.

    >>> weights_among(["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"])
    ['model.safetensors']
    """
    return [name for name in names if not re.fullmatch(_BESIDE, name)]


def checkpoints_below(path: str, there: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """Subdirectories with files of these suffixes, or with a distributed checkpoint.

    Args:
        path: Path of the directory.
        there: Names in the directory.
        suffixes: Suffixes of checkpoints.
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
