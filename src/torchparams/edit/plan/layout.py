"""Layout of output files: tensors, views and byte offsets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torchparams.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression, Readable
    from torchparams.expressions.operations import Cast


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write.

    Attributes:
        name: Name in the target.
        expression: Expression that computes its values.
        before: Name in the source if it was renamed; to show.
    """

    name: str
    expression: Expression
    before: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """A second tensor over the bytes of an output; torch zip only.

    Attributes:
        name: Name in the target.
        base: Name of the output that holds the bytes.
        dtype: Dtype.
        shape: Shape.
        offset: First element, counted from the first byte of the base, in elements of `dtype`.
        stride: Strides, in elements.
    """

    name: str
    base: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Layout of one file to write.

    Attributes:
        name: File name in the target directory.
        size: Size in bytes.
        offsets: Byte offset of each output.
        fixed: Function that returns all bytes outside tensors, as `(offset, bytes)`. Its argument maps each output to
            its CRC-32 if `crc` is true.
        crc: Whether the format stores a CRC-32 of every tensor.
    """

    name: str
    size: int
    offsets: Mapping[str, int]
    fixed: Callable[[Mapping[str, int]], list[tuple[int, bytes]]] = field(repr=False)
    crc: bool = False


class Writable(Protocol):
    """The part of a plan that the writer uses; see `Plan`."""

    path: str
    is_directory: bool
    outputs: tuple[Output, ...]
    views: tuple[View, ...]
    files: tuple[FileLayout, ...]
    index: bytes | None
    config_json: str | None
    sources: tuple[Readable, ...]
    memory: int
    overwrite: bool
    allow_overflow: bool
    dropped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""

    @property
    def copied(self) -> int:
        """Bytes copied unchanged from file to file."""

    def check(self) -> None:
        """Check the target against the current state of the disk."""

    def check_sources(self) -> None:
        """Raise if a source changed after the plan was made."""

    def casts(self) -> list[tuple[Output, Cast]]:
        """All casts, each with the output that contains it."""


_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {unit + "b": size for unit, size in _UNITS.items() if unit not in ("", "b")}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_bytes(size: int | str) -> int:
    """Parse a size in bytes: a number, or text with a unit K M G T (powers of 1000) or KiB MiB GiB TiB.

    Raises:
        PlanError: The size is invalid, or not positive.

    >>> parse_bytes("5GB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (5000000000, 1610612736, 4096)
    """
    if isinstance(size, int):
        count = size
    else:
        text = size.strip().lower()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = text[len(number) :].strip()
        try:
            count = int(float(number) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise PlanError(
                f"{size!r} is not a size", hint="write a number of bytes, or one with a unit: 500M, 5GB, 2GiB"
            ) from None
    if count <= 0:
        raise PlanError(f"a size must be positive, not {count}")
    return count
