"""Render tables of parameters: columns, rows, order, and totals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.errors import SelectorError
from torchparams.order import in_order, natural_key
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    cut,
    human_bytes,
    human_count,
    human_shape,
    plural,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torchparams.info import ParameterInfo

ROWS_SHOWN = 40
"""Default number of printed rows; rows in the middle are omitted and counted."""

INFO_COLUMNS = {
    "name": str,
    "shape": list[int],
    "dtype": str,
    "numel": int,
    "nbytes": int,
    "device": str,
    "kind": str,
    "requires_grad": bool,
    "module": str,
    "raw_name": str,
    "aliases": list[str],
    "storage": {"key": str, "offset": int, "stride": list[int], "nbytes": int},
    "location": {"file": str, "start": int, "stop": int},
    "bases": list[str],
    "persistent": bool,
    "layout": str,
    "encoding": str,
    "raw_names": list[str],
    "bpw": float,
}
"""Types of the `ParameterInfo` columns, for tables handed to other libraries."""

ALIASES_SHOWN = 3
"""Maximum number of other names shown for a tied tensor."""


def sort_infos(
    infos: list[ParameterInfo], by: str | None, stored: Callable[[], Iterable[str]] = tuple
) -> list[ParameterInfo]:
    """Sort infos by a column, descending with a leading `-`.

    Args:
        infos: Infos of one source.
        by: Column; `stored` for stored order; None to keep the order.
        stored: Callable that returns the names in stored order.
    """
    if by is None:
        return infos
    key = by.removeprefix("-")
    if key == "stored":
        found = list(in_order({info.name: info for info in infos}, stored()).values())
        return found[::-1] if by.startswith("-") else found
    if key not in SORT_KEYS:
        raise SelectorError(f"no column {key!r} to sort by", exists="columns are " + ", ".join((*SORT_KEYS, "stored")))
    return sorted(infos, key=SORT_KEYS[key], reverse=by.startswith("-"))


SORT_KEYS: dict[str, Callable[[ParameterInfo], Any]] = {
    "name": lambda info: natural_key(info.name),
    "numel": lambda info: info.numel,
    "nbytes": lambda info: info.nbytes,
    "size": lambda info: info.nbytes,
    "dtype": lambda info: str(info.dtype),
    "shape": lambda info: info.shape or (),
    "module": lambda info: info.module or "",
}


def table_of(infos: list[ParameterInfo], limit: int | None) -> Table:
    """Table of infos. Columns that are empty for all infos are omitted."""
    live = any(info.requires_grad is not None for info in infos)
    modules = any(info.module is not None for info in infos)
    encodings = any(info.encoded is not None for info in infos)
    kinds = len({(info.kind, info.persistent) for info in infos}) > 1
    columns = [
        Column("name", style="name", shrink=True),
        Column("shape"),
        Column("dtype", style="dtype", drop=2),
        *([Column("encoding", style="dtype")] if encodings else []),
        Column("numel", right=True, style="number", drop=4),
        Column("size", right=True, drop=1 if live else 0),
        *([Column("kind", drop=3)] if kinds else []),
        *([Column("trainable")] if live else []),
        *([Column("module", style="dim", shrink=True, yields=True, drop=5)] if modules else []),
    ]

    def row(info: ParameterInfo) -> Row:
        more = len(info.aliases) - ALIASES_SHOWN
        tied = ", ".join((*info.aliases[:ALIASES_SHOWN], *([f"… {more:,} more"] if more > 0 else [])))
        trainable = {True: Cell("yes", "good"), False: Cell("no", "dim"), None: Cell("")}[info.requires_grad]
        return Row(
            (
                f"{info.name} = {tied}" if tied else info.name,
                shape_of(info),
                str(info.dtype),
                *([info.encoding or ""] if encodings else []),
                f"{info.numel:,}",
                human_bytes(info.nbytes),
                *([info.kind if info.persistent else f"{info.kind}, not saved"] if kinds else []),
                *([trainable] if live else []),
                *([(info.module or "").rpartition(".")[2]] if modules else []),
            )
        )

    # Rows that are not shown are not created: a table of 100,000 parameters prints at once.
    if limit is None or len(infos) <= limit:
        return Table(tuple(columns), tuple(map(row, infos)))
    head = (limit + 1) // 2
    shown = [*map(row, infos[:head]), *map(row, infos[len(infos) - (limit - head) :])]
    gap = cut(range(len(infos)), limit, "parameters")[head]  # type: ignore[arg-type]  # only its count is used
    return Table(tuple(columns), (*shown[:head], gap, *shown[head:]))


def total_of(infos: list[ParameterInfo]) -> str:
    """Totals: tensors, parameters, bytes, trainable share."""
    buffers = sum(info.numel for info in infos if info.kind == "buffer")
    numel = sum(info.numel for info in infos) - buffers
    stored = sum(len(info.encoded.parts) - 1 for info in infos if info.encoded is not None)
    parts = [
        plural(len(infos), "tensor") + (f" ({len(infos) + stored:,} stored)" if stored else ""),
        f"{human_count(numel)} parameters" if numel >= 1000 else plural(numel, "parameter"),
        *([f"{human_count(buffers)} in buffers"] if buffers else []),
        human_bytes(sum(info.nbytes for info in infos)),
    ]
    counted = [info for info in infos if info.requires_grad is not None and info.kind != "buffer"]
    if counted:
        trainable = sum(info.numel for info in counted if info.requires_grad)
        known = sum(info.numel for info in counted)  # unknown for plain tensors of a file
        parts.append(f"{trainable / known:.1%} trainable" if known else "nothing trainable")
    tied = sum(len(info.aliases) for info in infos)
    if tied:
        parts.append(plural(tied, "tied name"))
    return " · ".join(parts)


def shape_of(info: ParameterInfo) -> str:
    """Shape with the layout of tensors that are not strided: `[3, 3] sparse_coo`, `nested`."""
    if info.layout is None:
        return human_shape(info.shape)
    return info.layout if info.shape is None else f"{human_shape(info.shape)} {info.layout}"
