"""Export rows as an Arrow stream. Uses nanoarrow, which is small: polars and duckdb users need no pyarrow."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, get_args, get_origin

from torchparams.errors import MissingDependency

if TYPE_CHECKING:
    from collections.abc import Sequence


def stream(rows: Sequence[Any], columns: Mapping[str, Any]) -> object:
    """Export rows as a PyCapsule of one Arrow batch.

    Args:
        rows: Objects with the attributes named in `columns`.
        columns: Attribute → type; see `Tabular`.

    Raises:
        MissingDependency: nanoarrow is not installed.
    """
    na = _nanoarrow()
    batch = _array(na, rows, columns)
    return na.c_array_stream(batch).__arrow_c_stream__()


def _nanoarrow() -> Any:
    try:
        return importlib.import_module("nanoarrow")
    except ModuleNotFoundError as error:
        if error.name != "nanoarrow":
            raise
        raise MissingDependency(
            "nanoarrow is needed to hand a table to other libraries", hint="pip install 'torchparams[arrow]'"
        ) from None


_PLAIN = {str: "string", int: "int64", float: "float64", bool: "bool_"}


def _schema(na: Any, kind: Any) -> Any:
    if isinstance(kind, Mapping):
        return na.struct({name: _schema(na, each) for name, each in kind.items()})
    if get_origin(kind) is list:
        return na.list_(_schema(na, get_args(kind)[0]))
    if get_origin(kind) is dict:
        return na.map_(*(_schema(na, each) for each in get_args(kind)))
    return getattr(na, _PLAIN[kind])()


def _array(na: Any, values: Sequence[Any], kind: Any) -> Any:
    """Values of one type as an Arrow array; None becomes null."""
    if isinstance(kind, Mapping):
        children = [
            _array(na, [None if value is None else getattr(value, name) for value in values], each)
            for name, each in kind.items()
        ]
        return na.c_array_from_buffers(
            _schema(na, kind), len(values), [_validity(values)], children=children, null_count=_nulls(values)
        )
    origin = get_origin(kind)
    if origin is None:
        return na.c_array([None if value is None else kind(value) for value in values], _schema(na, kind))
    ends = accumulate((0 if value is None else len(value) for value in values), initial=0)
    offsets = na.c_buffer(list(ends), na.int32())
    if origin is list:
        each = get_args(kind)[0]
        child = _array(na, [item for value in values for item in value or ()], each)
    else:
        pairs = [pair for value in values for pair in (dict(value).items() if value else ())]
        keys, items = (_array(na, [pair[i] for pair in pairs], of) for i, of in enumerate(get_args(kind)))
        entries = na.struct(dict(zip(("key", "value"), (_schema(na, of) for of in get_args(kind)), strict=True)))
        child = na.c_array_from_buffers(entries, len(pairs), [None], children=[keys, items])
    return na.c_array_from_buffers(
        _schema(na, kind), len(values), [_validity(values), offsets], children=[child], null_count=_nulls(values)
    )


def _nulls(values: Sequence[Any]) -> int:
    return sum(value is None for value in values)


def _validity(values: Sequence[Any]) -> bytes | None:
    """Arrow validity bitmap, least significant bit first; None if no value is null."""
    if not _nulls(values):
        return None
    bits = bytearray((len(values) + 7) // 8)
    for i, value in enumerate(values):
        if value is not None:
            bits[i // 8] |= 1 << i % 8
    return bytes(bits)
