"""Reader of safetensors files: eight bytes of length, a JSON header, and the bytes of the tensors without gaps.

`_read_header` reads every file. It has a fast path for headers as common writers write them, and a strict path that
accepts every legal header and explains every error. If the fast path is not sure, it leaves the header to the strict
path.

This reader refuses some files that the reference accepts: repeated tensor names or keys; an entry that is an array or a
dtype that is an object; a `null` as metadata; more arrays and objects than tensors need; sizes whose product overflows
beside a zero; and, in keys that are not part of the format, numbers of more than 40 characters or beyond the range of
floats.
"""

from __future__ import annotations

import json
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from torchparams import limits
from torchparams.dtypes import BY_CODE, DType
from torchparams.errors import (
    FileFormatError,
    LimitExceeded,
    SizeMismatch,
    SourceError,
    TrailingBytes,
    TruncatedFile,
)
from torchparams.info import file_tensor
from torchparams.io.filebytes import as_array, check_name_lengths, paused_gc
from torchparams.io.opened import bytes_of_file
from torchparams.io.packing import contiguous
from torchparams.io.strict_json import as_object, describe, quoted, refuse_hollow, refuse_repeats, strict
from torchparams.sources.base import NO_METADATA, Source
from torchparams.sources.opening import reopened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch

    from torchparams.encodings.base import Structure
    from torchparams.info import Location, ParameterInfo
    from torchparams.io.filebytes import FileBytes

_MOST = (1 << 64) - 1  # sizes and offsets are unsigned 64-bit integers


def open_safetensors(path: str, inner: str | None = None) -> SafetensorsSource:
    """Open the safetensors file `path`.

    Args:
        path: The file.
        inner: Text after `#` in the target; must be None, because safetensors files have no nested mappings.

    Raises:
        SourceError: The file cannot be read, or `inner` is not None.
        FileFormatError: The file is invalid; the message names the byte or tensor.
        LimitExceeded: Its header is longer than `limits.HEADER_BYTES`.
    """
    if inner is not None:
        raise SourceError(
            f"safetensors files have no nested mappings, so there is none at {inner!r}",
            where=path,
            hint=f"leave #{inner} out, and select by name: {inner}.**" if inner else "leave # out",
        )
    return SafetensorsSource(path)


class SafetensorsSource(Source):
    """A safetensors file: the header is read on opening, values when needed.

    Names are listed in the order of the header.

    Args:
        path: The file.
    """

    format = "safetensors"

    def __init__(self, path: str) -> None:
        self.label = path
        self._file = bytes_of_file(path)
        infos, metadata = _read_header(self._file)
        self._infos = MappingProxyType(infos)
        self._metadata = MappingProxyType(metadata) if metadata else NO_METADATA

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos, in the order of the header."""
        return self._infos

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """A read-only view of the mapped file; sub-byte elements are unpacked.

        Raises:
            NotReadable: numpy does not support so many dimensions.
        """
        info, at = self._entry(name)
        return as_array(
            self._file.view(at.start, at.stop),
            info.dtype,
            info.shape or (),
            where=f"{self.label}: {quoted(name)}",
        )

    def tensor(self, name: str) -> torch.Tensor:
        """A writable tensor: a private mapping of its bytes, or a copy if it is small.

        Raises:
            NotReadable: torch has no such dtype.
        """
        from torchparams.sources.totorch import from_bytes

        info, at = self._entry(name)
        shape = info.shape or ()
        memory = self._file.own(at.start, at.stop, info.dtype.itemsize)
        return from_bytes(memory, info, shape, contiguous(shape))

    def span(self, name: str) -> Location | None:
        """Byte range of the tensor: safetensors stores every tensor contiguously."""
        return self._entry(name)[1]

    @cached_property
    def structures(self) -> Sequence[Structure]:
        """Parameters of torchao classes, as the metadata describes them."""
        if "tensor_names" not in self._metadata:
            return ()
        from torchparams.encodings.flattened import structures_of

        return tuple(structures_of(self._metadata, self._infos))

    @property
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` of the header."""
        return self._metadata

    @property
    def files(self) -> tuple[str, ...]:
        """The file."""
        return (self._file.path,)

    def check_unchanged(self) -> None:
        """Raise if the file was changed after it was listed."""
        self._file.check_unchanged()

    # A copy opens the files itself.
    def __reduce__(self) -> tuple[Any, ...]:
        return reopened(self)

    def close(self) -> None:
        """Close the mapped file; it is mapped again when values are read."""
        self._file.close()

    def _entry(self, name: str) -> tuple[ParameterInfo, Location]:
        info = self._infos.get(name)
        if info is None:
            info = self._infos[self.resolve(name)]
        assert info.location is not None  # every tensor of a file has one
        return info, info.location


Header = tuple[dict[str, "ParameterInfo"], dict[str, str]]


def _read_header(file: FileBytes) -> Header:
    """Infos by name, and the metadata."""
    if file.size < 8:
        raise TruncatedFile(
            f"the file ends after {file.size} bytes, within the 8 bytes that give the header's length", where=file.path
        )
    length = int.from_bytes(file.read(0, 8), "little")
    if length > limits.HEADER_BYTES:
        raise LimitExceeded(
            f"the header's length, in bytes 0 to 8, is {length}; the limit is {limits.HEADER_BYTES}",
            where=file.path,
            exists=f"the file has {file.size} bytes",
        )
    if length > file.size - 8:
        raise TruncatedFile(
            f"the file ends at byte {file.size}, within the header, which takes bytes 8 to {8 + length}",
            where=file.path,
        )
    header = file.read(8, 8 + length)
    refuse_hollow(header, "the header", file.path)
    # Parsing makes several objects per tensor and no cycles; garbage collection would take longer than the parsing.
    with paused_gc():
        found: Header | None = None
        tiled = False
        try:
            found, tiled = _fast(header, file)
        except (_Unsure, ValueError, TypeError, KeyError, RecursionError):
            pass  # the strict path explains it
        infos, metadata = found or _strict(header, file)
        check_name_lengths(infos, file.path)
        if not tiled:
            _check_tiling(infos, 8 + length, file)
        return infos, metadata


# --- fast path ----------------------------------------------------------------------------------


class _Unsure(Exception):
    """The header is unusual: perhaps invalid, perhaps legal."""


def _unsure(_: str) -> NoReturn:
    raise _Unsure


# Numbers that are not integers are detected while parsing, at no cost for the others.
_decode = json.JSONDecoder(parse_float=_unsure, parse_constant=_unsure).decode

# None of these belongs in a header, except in a name or in the metadata: an escape in a string (it may hide a repeated
# key), a boolean, a signed number.
_ODD = (b"\\", b"true", b"false")
_SIGNED = (b"[-", b",-", b":-", b" -", b"\t-", b"\n-", b"\r-")


def _fast(header: bytes, file: FileBytes) -> tuple[Header, bool]:
    """Infos by name and the metadata, and whether the tensors fill the file in their order."""
    # Searching one byte is ten times as fast as two.
    if any(odd in header for odd in _ODD) or (b"-" in header and any(sign in header for sign in _SIGNED)):
        raise _Unsure
    entries: dict[str, Any] = _decode(header.decode())
    if type(entries) is not dict:
        raise _Unsure
    # Python keeps the last value of a repeated key. Without escapes, every colon belongs to a key or to a text, so the
    # number of colons is known; one more means that a key was lost.
    colons = 4 * len(entries)
    metadata: Any = {}
    if "__metadata__" in entries:
        metadata = entries.pop("__metadata__")
        if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
            raise _Unsure
        colons += len(metadata) - 3 + sum(text.count(":") for pair in metadata.items() for text in pair)
    seen = header.count(b":")
    if seen != colons and seen != colons + sum(name.count(":") for name in entries):
        raise _Unsure

    base = 8 + len(header)
    path = file.path
    infos: dict[str, ParameterInfo] = {}
    sizes: dict[tuple[Any, ...], _Size] = {}
    ordered = True
    end = 0
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        shape = entry["shape"]
        if type(shape) is not list or len(entry) != 3:
            raise _Unsure
        key = (entry["dtype"], *shape)  # large models have few distinct ones
        size = sizes.get(key)
        if size is None:
            size = _size(name, entry)
            if len(sizes) < _SIZES:
                sizes[key] = size
        dtype, sides, numel, nbytes = size
        if stop - start != nbytes:
            raise _Unsure
        if start != end:
            ordered = False
        end = stop
        infos[name] = file_tensor(name, sides, dtype, numel, nbytes, path, base + start, base + stop)
    return (infos, metadata), ordered and base + end == file.size


_Size = tuple[DType, tuple[int, ...], int, int]

_SIZES = 64  # number to cache; small, because a file could choose numbers whose hashes collide


def _size(name: str, entry: dict[str, Any]) -> _Size:
    """dtype, shape, number of elements and bytes of a tensor."""
    dtype = BY_CODE[entry["dtype"]]
    shape = entry["shape"]
    # `sum` refuses what is not a number; the bounds on factors keep the product small.
    if len(shape) > 8 or sum(shape) > _MOST:
        raise _Unsure
    numel = prod(shape)
    if not numel:
        _numel(shape, dtype, name)
    if numel * dtype.bits % 8:
        raise _Unsure
    return dtype, tuple(shape), numel, numel * dtype.bits // 8


# --- strict path --------------------------------------------------------------------------------


_KEYS = ("dtype", "shape", "data_offsets")


def _strict(header: bytes, file: FileBytes) -> Header:
    path = file.path
    if not header.strip(b" \t\r\n"):
        raise FileFormatError("the header is empty, not a JSON object", where=f"{path}, bytes 8 to {8 + len(header)}")
    entries = as_object(strict(header, "the header", path, 8), "the header", path)
    metadata: dict[str, str] = {}
    if "__metadata__" in entries:
        metadata = as_object(entries.pop("__metadata__"), "__metadata__", path)
        for key, text in metadata.items():
            if type(text) is not str:
                raise FileFormatError(
                    f"the value of {quoted(key)} in __metadata__ is {describe(text)}, not a text", where=path
                )

    base = 8 + len(header)
    infos: dict[str, ParameterInfo] = {}
    for name, value in entries.items():
        where = f"{path}: tensor {quoted(name)}"
        entry = as_object(value, "its entry", where)
        for key, other in entry.items():
            if key not in _KEYS:
                refuse_repeats(other, f"its {quoted(key)}", where)
        missing = [key for key in _KEYS if key not in entry]
        if missing:
            raise FileFormatError(f"its entry has no {' and no '.join(missing)}", where=where)
        dtype = _dtype(entry["dtype"], where)
        shape = _sizes(entry["shape"], "shape", where)
        numel = _numel(shape, dtype, where)
        offsets = _sizes(entry["data_offsets"], "data_offsets", where)
        if len(offsets) != 2:
            raise FileFormatError(
                f"its data_offsets hold {len(offsets)} number{'s' * (len(offsets) != 1)}, not 2", where=where
            )
        start, stop = offsets
        if stop < start:
            raise FileFormatError(f"its data_offsets [{start}, {stop}] end before they start", where=where)
        if (stop - start) * 8 != numel * dtype.bits:
            raise SizeMismatch(
                f"its data_offsets [{start}, {stop}] span {stop - start} bytes, and {_bytes_of(dtype, shape, numel)}",
                where=where,
            )
        infos[name] = file_tensor(name, shape, dtype, numel, stop - start, path, base + start, base + stop)
    return infos, metadata


def _dtype(code: Any, where: str) -> DType:
    if type(code) is not str:
        raise FileFormatError(f"its dtype is {describe(code)}, not a text", where=where)
    dtype = BY_CODE.get(code)
    if dtype is None:
        raise FileFormatError(f"unknown dtype {quoted(code)}", where=where, exists="there are " + " ".join(BY_CODE))
    return dtype


def _sizes(value: Any, what: str, where: str) -> tuple[int, ...]:
    if type(value) is not list:
        raise FileFormatError(f"its {what} is {describe(value)}, not an array", where=where)
    for size in value:
        if type(size) is not int:
            raise FileFormatError(f"its {what} holds {describe(size)}, not an integer", where=where)
        if not 0 <= size <= _MOST:
            raise FileFormatError(
                f"its {what} holds the number {size}, which is {'negative' if size < 0 else 'more than 64 bits hold'}",
                where=where,
            )
    return tuple(value)


def _numel(shape: Sequence[int], dtype: DType, where: str) -> int:
    # Multiplied step by step, because the product of the sizes could be huge. A zero must not hide that the other sizes
    # overflow, because no array can have such a shape.
    product = dtype.bits
    for size in shape:
        product *= size or 1
        if product // 8 > _MOST:
            shown = f"[{', '.join(map(str, shape[:6]))}{', …' if len(shape) > 6 else ''}]"
            raise FileFormatError(f"its shape {shown} of {dtype} overflows 64 bits", where=where)
    return 0 if 0 in shape else product // dtype.bits


def _bytes_of(dtype: DType, shape: tuple[int, ...], numel: int) -> str:
    shown = f"[{', '.join(map(str, shape[:6]))}{', …' if len(shape) > 6 else ''}]"
    bits = numel * dtype.bits
    takes = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, which is not a whole number of bytes"
    return f"{dtype} {shown} takes {takes}"


def _check_tiling(infos: dict[str, ParameterInfo], base: int, file: FileBytes) -> None:
    """Check that the tensors, sorted by offset, fill the data up to the end of the file."""
    ranges = sorted(
        (info.location.start - base, info.location.stop - base, name)
        for name, info in infos.items()
        if info.location is not None
    )
    end, before = 0, ""
    for start, stop, name in ranges:
        if start < end:
            raise FileFormatError(
                f"the tensors {quoted(before)} and {quoted(name)} overlap: the first ends at byte {end} of the data, "
                f"the second starts at byte {start}",
                where=f"{file.path}, byte {base + start}",
            )
        if start > end:
            raise FileFormatError(
                f"bytes {end} to {start} of the data belong to no tensor: "
                + (f"{quoted(before)} ends before them, " if before else "")
                + f"{quoted(name)} starts after them",
                where=f"{file.path}, byte {base + end}",
            )
        end, before = stop, name
    if base + end > file.size:
        # The first incomplete tensor is more useful to name than the last.
        name, start, stop = next((n, base + a, base + b) for a, b, n in ranges if base + b > file.size)
        raise TruncatedFile(
            f"the file ends at byte {file.size}, and its tensors at byte {base + end}: "
            f"{quoted(name)} lies at bytes {start} to {stop}",
            where=file.path,
        )
    if base + end < file.size:
        raise TrailingBytes(
            f"the tensors end at byte {base + end}, but the file ends at byte {file.size}: the rest belongs to "
            "no tensor",
            where=file.path,
        )
