"""Write torch's zip format without torch.

The files load with `torch.load(weights_only=True)`, with and without `mmap`.

The pickle (protocol 2) is a `collections.OrderedDict` of tensors, with only the opcodes and globals that torch's
restricted unpickler accepts. Each storage is an uncompressed zip member, aligned to 64 bytes as torch does. Every
member has a CRC-32: torch ignores it, but `unzip -t` and other zip readers check it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

from torchparams.edit.plan.layout import FileLayout
from torchparams.errors import PlanError, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.dtypes import DType
    from torchparams.edit.plan.layout import Output, View

ALIGNMENT = 64
FOLDER = "archive"

_FULL_32, _FULL_16 = 0xFFFFFFFF, 0xFFFF
"""Value of a field whose number is in the ZIP64 record."""

_LIMIT_32, _LIMIT_16 = _FULL_32, _FULL_16
"""Smallest numbers that need a ZIP64 record."""

_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage",
    "complex128": "ComplexDoubleStorage", "complex64": "ComplexFloatStorage",
}  # fmt: skip
"""Dtypes with a storage class in torch. Tensors of other dtypes use an untyped storage, and name their dtype."""


def check_dtype(dtype: DType, name: str) -> None:
    """Check that torch has a dtype.

    Raises:
        PlanError: torch lacks the dtype.
    """
    if dtype.torch_name is None:
        raise PlanError(f"torch has no dtype for {dtype}", where=shorten(repr(name)), hint="write a .safetensors file")


def lay_out(name: str, outputs: Sequence[Output], views: Sequence[View]) -> FileLayout:
    """Lay out one file.

    Args:
        name: File name.
        outputs: Tensors, each with its own storage.
        views: Other tensors over the bytes of these.

    Raises:
        PlanError: torch lacks a dtype.
    """
    for output in outputs:
        check_dtype(output.expression.dtype, output.name)
    members = [_Member(f"{FOLDER}/data.pkl", contents=pickled(outputs, views))]
    members.append(_Member(f"{FOLDER}/byteorder", contents=b"little"))
    members += [
        _Member(f"{FOLDER}/data/{key}", size=output.expression.nbytes, output=output.name)
        for key, output in enumerate(outputs)
    ]
    members.append(_Member(f"{FOLDER}/version", contents=b"3\n"))
    at = 0
    for member in members:
        at = member.place(at)
    size = at + len(_directory(members, at))

    def fixed(crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        pieces = []
        for member in members:
            member.crc = crc32(member.contents) if member.output is None else crcs[member.output]
            pieces.append((member.header, member.local_header()))
            if member.output is None:
                pieces.append((member.start, member.contents))
        pieces.append((at, _directory(members, at)))
        return pieces

    offsets = {member.output: member.start for member in members if member.output is not None}
    return FileLayout(name, size, offsets, fixed, crc=True)


# --- the zip ---------------------------------------------------------------------------------


@dataclass
class _Member:
    name: str
    contents: bytes = b""
    size: int = -1
    output: str | None = None
    header: int = 0
    start: int = 0
    crc: int = 0

    def __post_init__(self) -> None:
        if self.size < 0:
            self.size = len(self.contents)

    def place(self, at: int) -> int:
        """Place the member at offset `at`, and return its end."""
        self.header = at
        bare = at + 30 + len(self.name) + len(self._zip64())
        # The padding field has its own header of four bytes.
        self.start = -(-(bare + 4) // ALIGNMENT) * ALIGNMENT
        return self.start + self.size

    def _zip64(self) -> bytes:
        if self.size < _LIMIT_32:
            return b""
        return struct.pack("<HHQQ", 1, 16, self.size, self.size)

    def local_header(self) -> bytes:
        zip64 = self._zip64()
        fill = self.start - self.header - 30 - len(self.name) - len(zip64) - 4
        extra = zip64 + b"FB" + struct.pack("<H", fill) + b"Z" * fill  # the padding that torch writes
        size = _FULL_32 if zip64 else self.size
        fields = (0x04034B50, 45 if zip64 else 20, 0x0800, 0, 0, 0x21, self.crc, size, size, len(self.name), len(extra))
        return struct.pack("<IHHHHHIIIHH", *fields) + self.name.encode() + extra

    def central_header(self) -> bytes:
        large = [self.size, self.size] if self.size >= _LIMIT_32 else []
        far = [self.header] if self.header >= _LIMIT_32 else []
        wide = large + far
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size = _FULL_32 if large else self.size
        version = 45 if wide else 20
        fields = (
            *(0x02014B50, version, version, 0x0800, 0, 0, 0x21, self.crc, size, size, len(self.name), len(extra)),
            *(0, 0, 0, 0, _FULL_32 if far else self.header),
        )
        return struct.pack("<IHHHHHHIIIHHHHHII", *fields) + self.name.encode() + extra


def _directory(members: Sequence[_Member], at: int) -> bytes:
    entries = b"".join(member.central_header() for member in members)
    count, size = len(members), len(entries)
    tail = b""
    if count >= _LIMIT_16 or at >= _LIMIT_32 or size >= _LIMIT_32:
        tail = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, at)
        tail += struct.pack("<IIQI", 0x07064B50, 0, at + size, 1)
    shown = count if count < _LIMIT_16 else _FULL_16
    size = size if size < _LIMIT_32 else _FULL_32
    at = at if at < _LIMIT_32 else _FULL_32
    return entries + tail + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, shown, shown, size, at, 0)


# --- the pickle ------------------------------------------------------------------------------


def pickled(outputs: Sequence[Output], views: Sequence[View]) -> bytes:
    """Pickle of an ordered mapping of names to tensors.

    >>> import pickletools
    >>> [op.name for op, _, _ in pickletools.genops(pickled([], []))]
    ['PROTO', 'GLOBAL', 'BINPUT', 'EMPTY_TUPLE', 'REDUCE', 'STOP']
    """
    writer = _Pickle()
    writer.reduce_empty("collections", "OrderedDict")
    keys = {
        output.name: (str(i), output.expression.dtype, output.expression.nbytes) for i, output in enumerate(outputs)
    }
    entries: list[tuple[str, tuple[str, DType, int], DType, int, Sequence[int], Sequence[int]]] = []
    shown: dict[str, list[View]] = {}
    for view in views:
        shown.setdefault(view.base, []).append(view)
    for output in outputs:
        x = output.expression
        entries.append((output.name, keys[output.name], x.dtype, 0, x.shape, _contiguous(x.shape)))
        entries += [
            (view.name, keys[view.base], view.dtype, view.offset, view.shape, view.stride)
            for view in shown.get(output.name, ())
        ]
    if entries:
        writer.out += b"("
        for name, storage, dtype, offset, shape, stride in entries:
            writer.text(name)
            writer.tensor(storage, dtype, offset, shape, stride)
        writer.out += b"u"
    return bytes(writer.out + b".")


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


class _Pickle:
    """Pickle writer that memoises repeated globals and strings."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self._memo: dict[object, int] = {}

    def tensor(
        self, storage: tuple[str, DType, int], dtype: DType, offset: int, shape: Sequence[int], stride: Sequence[int]
    ) -> None:
        key, stored, nbytes = storage
        typed = _STORAGES.get(str(stored)) if dtype == stored else None
        self.name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += b"(("
        self.text("storage", memo=True)
        if typed:
            self.name("torch", typed)
        else:
            self.name("torch.storage", "UntypedStorage")
        self.text(key)
        self.text("cpu", memo=True)
        self.number(nbytes // stored.itemsize if typed else nbytes)
        self.out += b"tQ"
        self.number(offset)
        self.numbers(shape)
        self.numbers(stride)
        self.out += b"\x89"  # requires_grad
        self.reduce_empty("collections", "OrderedDict")  # backward hooks
        if not typed:
            self.name("torch", dtype.torch_name or "")
        self.out += b"tR"

    def name(self, module: str, name: str) -> None:
        self._once((module, name), b"c" + module.encode() + b"\n" + name.encode() + b"\n")

    def reduce_empty(self, module: str, name: str) -> None:
        self.name(module, name)
        self.out += b")R"

    def text(self, text: str, memo: bool = False) -> None:
        data = text.encode("utf-8", "surrogatepass")
        written = b"X" + struct.pack("<I", len(data)) + data
        if memo:
            self._once(text, written)
        else:
            self.out += written

    def numbers(self, numbers: Sequence[int]) -> None:
        if not numbers:
            self.out += b")"
            return
        if len(numbers) > 3:
            self.out += b"("
        for number in numbers:
            self.number(number)
        self.out += {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(numbers), b"t")

    def number(self, number: int) -> None:
        if number < 1 << 8:
            self.out += b"K" + bytes([number])
        elif number < 1 << 16:
            self.out += b"M" + struct.pack("<H", number)
        elif number < 1 << 31:
            self.out += b"J" + struct.pack("<i", number)
        else:
            data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data

    def _once(self, key: object, written: bytes) -> None:
        place = self._memo.get(key)
        if place is not None:
            self.out += b"h" + bytes([place]) if place < 256 else b"j" + struct.pack("<I", place)
            return
        place = self._memo[key] = len(self._memo)
        self.out += written + (b"q" + bytes([place]) if place < 256 else b"r" + struct.pack("<I", place))
