"""Where the bytes of every output come to lie: what the executor and the formats agree on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchparams.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchparams.dtypes import DType
    from torchparams.expressions.base import Expression


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that is to be written.

    Attributes:
        name: Its name in the target.
        expression: What it is computed from.
        before: Its name in the source, where it had one and has another now; for reports.
    """

    name: str
    expression: Expression
    before: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """A further name of bytes that are written already: only a torch zip has these.

    Attributes:
        name: The name in the target.
        base: The output whose bytes it shows.
        dtype: The element type.
        shape: The shape.
        offset: The first element, in elements of its own type from the base's first byte.
        stride: Distances between neighbours along each dimension, in elements.
    """

    name: str
    base: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file that is to be written.

    Attributes:
        name: Its name in the directory of the target.
        size: Its bytes.
        offsets: Where the bytes of each output begin.
        fixed: Gives everything that is no tensor, as `(offset, bytes)`; it is told the CRC-32 of every output, where
            `crc` asks for them.
        crc: Whether the format stores a CRC-32 of every tensor.
    """

    name: str
    size: int
    offsets: Mapping[str, int]
    fixed: Callable[[Mapping[str, int]], list[tuple[int, bytes]]] = field(repr=False)
    crc: bool = False


_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {unit + "b": size for unit, size in _UNITS.items() if unit not in ("", "b")}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_bytes(size: int | str) -> int:
    """A count of bytes, as a number or with one of the units K M G T (powers of 1000) or KiB MiB GiB TiB.

    Raises:
        PlanError: It is none, or not positive.

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
        raise PlanError(f"a size of {count} bytes is not one that anything fits in")
    return count
