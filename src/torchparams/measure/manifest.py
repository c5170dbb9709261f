"""Manifests: digests in a JSON file with one tensor per line, so that two files can be compared with text tools.

    {
      "format": "torchparams manifest",
      "version": 1,
      "source": "model.safetensors",
      "digest": "…",
      "tensors": [
        {"name": "fc.weight", "dtype": "float32", "shape": [2, 3], "nbytes": 24, "digest": "…", "aliases": []}
      ]
    }

Other keys are ignored. A manifest is untrusted input: any malformed one gives one clear error.
"""

from __future__ import annotations

import json
import os
import re
import stat
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.dtypes import DType
from torchparams.errors import FileFormatError, LimitExceeded, SizeMismatch, TorchParamsError, WriteError
from torchparams.io.filebytes import FileBytes, check_name_lengths, paused_gc
from torchparams.io.strict_json import as_object, describe, quoted, strict
from torchparams.io.write import check_target, write_file
from torchparams.measure.hashing import VERSION, TensorDigest, set_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT = "torchparams manifest"
"""Value of `format` in a manifest."""

_HEXADECIMAL = re.compile(r"[0-9a-f]{64}")
_KEYS = ("format", "version", "source", "digest", "tensors")
_TENSOR_KEYS = ("name", "dtype", "shape", "nbytes", "digest", "aliases")
_MOST = (1 << 64) - 1  # sizes are unsigned 64-bit integers
_HINT = "torchparams digest TARGET -o FILE writes a manifest; torchparams diff compares two checkpoints"
_DIMENSIONS = 1024  # above any real tensor, small enough to multiply


def document_of(source: str, digest: str, tensors: Iterable[TensorDigest]) -> dict[str, Any]:
    """Manifest as a JSON document."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "digest": digest,
        "tensors": [tensor.to_json() for tensor in tensors],
    }


# --- write -----------------------------------------------------------------------------------


def write_manifest(document: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """Write a manifest atomically.

    Returns:
        Sentences about file attributes that could not be kept from the old file.

    Raises:
        WriteError: Writing failed, or the existing file is not a manifest.
    """
    check_target(path)
    _refuse_other(path)
    try:
        text = _text(document).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 20, 0) : error.end + 20]
        raise WriteError(f"JSON cannot store a name, at {near!r}", where=path) from None
    if len(text) > limits.MANIFEST_BYTES:
        raise WriteError(f"the manifest has {len(text)} bytes; the limit is {limits.MANIFEST_BYTES}", where=path)
    return write_file(path, text)


def _text(document: Mapping[str, Any]) -> str:
    head = {key: value for key, value in document.items() if key != "tensors"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    tensors = ",\n".join("    " + json.dumps(tensor, ensure_ascii=False) for tensor in document["tensors"])
    lines.append(f'  "tensors": [\n{tensors}\n  ]' if tensors else '  "tensors": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _refuse_other(path: str) -> None:
    """Refuse to replace a file that is not a manifest: it may be the checkpoint itself."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
        head = b""
        if regular:
            with open(path, "rb") as file:
                head = file.read(256)
    except FileNotFoundError:
        return
    except OSError as error:
        raise WriteError(error.strerror or str(error), where=path) from None
    if not regular:
        raise WriteError("not a regular file", where=path)
    if head and FORMAT.encode() not in head:
        raise WriteError("the file exists, and is not a manifest", where=path, hint="delete it, or choose another name")


# --- read ------------------------------------------------------------------------------------


def is_manifest(path: str) -> bool:
    """Whether a file is meant as a manifest: by its head, or any JSON file that is not the index of shards."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return path.endswith(".json")
    return FORMAT.encode() in head or (path.endswith(".json") and b'"weight_map"' not in head)


def read_manifest(path: str) -> tuple[str, dict[str, TensorDigest], str]:
    """Read a manifest: source label, tensors by name, and digest of the set.

    Raises:
        SourceError: The file cannot be read.
        FileFormatError: The file is not a manifest, or is inconsistent.
        LimitExceeded: The file is longer than `limits.MANIFEST_BYTES`.
    """
    file = FileBytes(path)
    if file.size > limits.MANIFEST_BYTES:
        raise LimitExceeded(
            f"the manifest has {file.size} bytes; the limit is {limits.MANIFEST_BYTES}",
            where=path,
            hint="if you trust the file, raise torchparams.limits.MANIFEST_BYTES",
        )
    with paused_gc():
        return _parse(file.read(0, file.size), path)


def _parse(data: bytes, path: str) -> tuple[str, dict[str, TensorDigest], str]:
    if data.lstrip(b" \t\r\n")[:1] != b"{":
        raise FileFormatError(f"not a manifest: it starts with {data[:8]!r}", where=path, hint=_HINT)
    document = as_object(strict(data, "the manifest", path), "the manifest", path)
    made_by = document.get("format")
    if made_by != FORMAT:
        found = "it has no format" if made_by is None else f"its format is {describe(made_by)}"
        raise FileFormatError(f"not a manifest: {found}", where=path, hint=_HINT)
    _refuse_missing(document, _KEYS, "the manifest", path)
    version = document["version"]
    if type(version) is not int or version != VERSION:
        raise FileFormatError(
            f"its version is {describe(version)}; the supported version is {VERSION}",
            where=path,
            hint="verify with the torchparams version that wrote it, or write a new manifest",
        )
    source = _of_type(document["source"], str, "a text", "its source", path)
    stated = _digest(document["digest"], "its digest", path)
    listed = _of_type(document["tensors"], list, "an array", "its tensors", path)
    tensors: dict[str, TensorDigest] = {}
    names: set[str] = set()
    for number, entry in enumerate(listed):
        tensor = _tensor(entry, f"entry {number} of its tensors", path)
        for name in tensor.names:
            if name in names:
                raise FileFormatError(f"it lists the tensor {quoted(name)} twice", where=path)
            names.add(name)
        tensors[tensor.name] = tensor
    check_name_lengths(names, path)
    if set_digest((name, tensor.digest) for tensor in tensors.values() for name in tensor.names) != stated:
        raise FileFormatError(
            "the digest of the set does not match the tensors: the manifest was edited or damaged", where=path
        )
    return source, tensors, stated


def _tensor(entry: Any, what: str, path: str) -> TensorDigest:
    fields = as_object(entry, what, path)
    _refuse_missing(fields, _TENSOR_KEYS, what, path)
    name = _of_type(fields["name"], str, "a text", f"the name in {what}", path)
    where = f"{path}: tensor {quoted(name)}"
    spelled = _of_type(fields["dtype"], str, "a text", "its dtype", where)
    try:
        dtype = DType.of(spelled)
    except TorchParamsError:
        raise FileFormatError(f"unknown dtype {quoted(spelled)}", where=where) from None
    shape = _of_type(fields["shape"], list, "an array", "its shape", where)
    if len(shape) > _DIMENSIONS:
        raise FileFormatError(f"its shape has {len(shape):,} dimensions", where=where)
    for size in (*shape, fields["nbytes"]):
        if type(size) is not int or not 0 <= size <= _MOST:
            raise FileFormatError(f"{describe(size)} is not a size", where=where)
    takes = dtype.nbytes(prod(shape))
    if fields["nbytes"] != takes:
        raise SizeMismatch(
            f"its nbytes is {fields['nbytes']}, but {dtype} {shape[:8]} takes "
            f"{takes if takes <= _MOST else 'more than 64 bits can count'}",
            where=where,
        )
    aliases = _of_type(fields["aliases"], list, "an array", "its aliases", where)
    for alias in aliases:
        _of_type(alias, str, "a text", "one of its aliases", where)
    digest = _digest(fields["digest"], "its digest", where)
    return TensorDigest(name, dtype, tuple(shape), takes, digest, tuple(aliases))


def _refuse_missing(fields: Mapping[str, Any], keys: Iterable[str], what: str, where: str) -> None:
    missing = [key for key in keys if key not in fields]
    if missing:
        raise FileFormatError(f"{what} has no {' and no '.join(missing)}", where=where)


def _of_type(value: Any, kind: type, wanted: str, what: str, where: str) -> Any:
    if type(value) is not kind:  # JSON objects are parsed as lists of pairs, of their own type
        raise FileFormatError(f"{what} is {describe(value)}, not {wanted}", where=where)
    return value


def _digest(value: Any, what: str, where: str) -> str:
    text: str = _of_type(value, str, "a text", what, where)
    if not _HEXADECIMAL.fullmatch(text):
        raise FileFormatError(f"{what} is {describe(value)}, not 64 hexadecimal digits", where=where)
    return text
