"""Describe one tensor, or one metadata entry, with some of its values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable, SourceError, UnknownName, shorten
from torchparams.left_out import left_out_lines
from torchparams.measure.beside import as_json, items_of, text_of
from torchparams.parameters import of
from torchparams.render.result import Result
from torchparams.render.rows import shape_of
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    human_bytes,
    human_shape,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from torchparams.info import ParameterInfo
    from torchparams.left_out import LeftOut
    from torchparams.parameters import Parameters
    from torchparams.sources.base import Source

EDGE = 3
"""Number of values shown at each end of every dimension."""


@dataclass(frozen=True, repr=False)
class Description(Result):
    """Description of one tensor, the result of `show`.

    Attributes:
        info: Info of the tensor.
        source: Label and format of the source.
        values: Values at the ends of every dimension, formatted by NumPy; None if they cannot be read.
        unreadable: Reason why the values cannot be read, or None.
        left_out: State of the tensor's module outside the table.
        parts: Infos of the stored tensors of a quantised parameter.
        note: Why the values are codes that are not decoded, or None.
    """

    info: ParameterInfo
    source: tuple[str, str]
    values: str | None
    unreadable: str | None
    left_out: tuple[LeftOut, ...] = ()
    parts: tuple[ParameterInfo, ...] = ()
    note: str | None = None

    def tree(self) -> Tree:
        """Tree of the facts, one per line, and the values."""
        rows = tuple(Row((Cell(fact, "dim"), said)) for fact, said in self._facts())
        facts = Table((Column(""), Column("")), rows)
        below = Text(self.values) if self.values is not None else Text(self.unreadable or "", "dim")
        return Tree((Text(printable(self.info.name), "title"), facts, Text(""), below, *left_out_lines(self.left_out)))

    def _facts(self) -> Iterator[tuple[str, str]]:
        info = self.info
        label, fmt = self.source
        yield "source", f"{label} ({fmt})"
        if info.raw_name not in ("", info.name):
            yield "stored as", info.raw_name
        for alias in info.aliases:
            yield "tied to", alias
        yield "shape", shape_of(info)
        if info.encoded is not None:
            yield "encoding", f"{info.encoding}, {info.bpw:.4g} bits per weight"
        yield "dtype", f"{info.dtype} ({info.dtype.bits} bits)"
        yield "numel", f"{info.numel:,}"
        yield "size", human_bytes(info.nbytes) + (f" ({info.nbytes:,} bytes)" if info.nbytes >= 1000 else "")
        yield "kind", info.kind if info.persistent else f"{info.kind}, not saved in a state dict"
        if info.device != "file":
            yield "device", info.device
        if info.requires_grad is not None:
            yield "trainable", "yes" if info.requires_grad else "no"
        if info.module is not None:
            yield "module", info.module
        if info.storage is not None:
            view = info.storage
            yield "storage", f"{view.key}, {human_bytes(view.nbytes)}"
            yield "view", f"starts at element {view.offset:,}, stride {list(view.stride)}"
        if info.location is not None:
            at = info.location
            yield "file", at.file
            yield "bytes", f"{at.start:,} to {at.stop:,} (exclusive)"
        if self.note is not None:
            yield "note", self.note
        for part in self.parts:
            lies = part.location
            where = "" if lies is None else f", {os.path.basename(lies.file)}: bytes {lies.start:,} to {lies.stop:,}"
            yield "part", f"{part.name} {human_shape(part.shape)} {part.dtype}{where}"

    def to_json(self) -> dict[str, Any]:
        """The info as in `torchparams ls --json`, with `source`, `format`, `values` (text), `unreadable` and `note`."""
        label, fmt = self.source
        return {
            "source": label,
            "format": fmt,
            **self.info.to_json(),
            "values": self.values,
            "unreadable": self.unreadable,
            "left_out": [each.to_json() for each in self.left_out],
            "parts": [part.to_json() for part in self.parts],
            "note": self.note,
        }


@dataclass(frozen=True, repr=False)
class MetadataValue(Result):
    """Metadata entry of a source, such as an epoch or a configuration.

    Attributes:
        name: Name of the entry.
        value: Value as JSON data; objects that were not unpickled are replaced by a description.
        source: Label and format of the source.
    """

    name: str
    value: Any
    source: tuple[str, str]

    def tree(self) -> Tree:
        """Tree of the value, with one row per item of a mapping or list."""
        label, fmt = self.source
        title = Text(printable(self.name), "title")
        where = Text(printable(f"{label} ({fmt}), not a tensor"), "dim")
        items = items_of(self.value)
        if not items:
            return Tree((title, where, Text(text_of(self.value))))
        rows = tuple(Row((Cell(printable(str(key)), "name"), shorten(text_of(item), 1000))) for key, item in items)
        return Tree((title, where, Table((Column("key"), Column("value")), rows)))

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON data."""
        label, fmt = self.source
        return {"source": label, "format": fmt, "name": self.name, "value": as_json(self.value)}


def metadata_value(source: Source, name: str) -> MetadataValue | None:
    """Metadata entry of that name, or a nested value by a dotted name; None if there is none.

    >>> import torchparams as tp
    >>> from torchparams.testing import MemorySource
    >>> metadata_value(MemorySource({}, {"config": {"dims": [3, 5]}}), "config.dims.1").value
    5
    """
    label = source.label, source.format
    starts: list[tuple[str, Any]] = [(name, source.metadata)]
    while starts:  # a key may contain dots
        rest, here = starts.pop()
        for key, value in items_of(here):
            if str(key) == rest:
                return MetadataValue(name, value, label)
            if rest.startswith(f"{key}.") and isinstance(value, dict | list):
                starts.append((rest[len(str(key)) + 1 :], value))
    return None


def show(x: object, name: str) -> Description | MetadataValue:
    """Describe one tensor (shape, location, some values), or one metadata entry.

    For a file, only the displayed values are read, if the tensor is stored as plain bytes.

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`. Buffers of a live model are included.
        name: Name of the tensor, canonical or raw; or of a metadata entry (`epoch`), or a value inside one
            (`config.layers`).

    Raises:
        UnknownName: There is no such tensor or entry; the message lists the nearest tensor names.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> print(tp.show({"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}, "fc.weight").values)
    [[0. 1. 2.]
     [3. 4. 5.]]
    """
    params = of(x, buffers=True)
    try:
        info = params.info(name)
    except UnknownName:
        beside = metadata_value(params.source, name)
        if beside is None:
            raise
        return beside
    values = unreadable = None
    try:
        values = _decoded_ends(params, info) or _printed(params.numpy(info.name))
        info = params.info(name)  # of a remote zip, where it lies is known once its values were read
    except NotReadable as error:
        unreadable = f"Cannot read the values: {error.what}."
    except SourceError as error:
        unreadable = f"Cannot read the values: {error}"
    owners = {name.rpartition(".")[0] for name in (info.name, *info.aliases)}
    left_out = tuple(each for each in params.source.left_out if each.name in owners)
    parts = () if info.encoded is None else tuple(map(params.source.stored.info, info.encoded.parts))
    note = params.undecoded.get(info.name)
    return Description(info, (params.source.label, params.source.format), values, unreadable, left_out, parts, note)


def _decoded_ends(params: Parameters, info: ParameterInfo) -> str | None:
    """Values at the ends of a large quantised matrix, without decoding the others; None for other parameters."""
    if info.encoded is None or info.shape is None or len(info.shape) < 2:
        return None
    rows, columns = info.shape[-2:]
    if rows <= 2 * EDGE + 1 or rows * columns <= (2 * EDGE) ** 2:
        return None
    import numpy as np

    from torchparams.expressions.work import ThreadWork

    row = params.source.row(info.name, info)
    first = np.zeros((2 * EDGE + 1, columns), row.dtype.numpy)  # its middle row is not printed
    with ThreadWork() as work:
        work.begin(row)
        for part, start in ((first[:EDGE], 0), (first[-EDGE:], rows - EDGE)):
            values = row.compute(start * columns, (start + EDGE) * columns, work)
            part[...] = values.reshape(EDGE, columns)
    return _printed(first, info.numel // (rows * columns), always=True)


def _printed(array: np.ndarray[Any, Any], count: int | None = None, *, always: bool = False) -> str:
    """Values of the first matrix, those in the middle left out.

    Args:
        array: The tensor.
        count: Number of matrices; None to count those of the array.
        always: Whether values are left out however few there are.
    """
    import numpy as np

    if array.size == 0:
        return f"no values: shape {human_shape(array.shape)}"
    first = array[(0,) * (array.ndim - 2)] if array.ndim > 2 else array
    printed = np.array2string(first, threshold=0 if always else (2 * EDGE) ** 2, edgeitems=EDGE, max_line_width=100)
    count = int(np.prod(array.shape[:-2])) if count is None else count
    if count > 1:
        return f"{printed}\nthe first of {count:,} matrices"
    return printed
