"""Tables: ordered mappings of names to tensors, in memory or on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import TYPE_CHECKING, Any, NoReturn

from torchparams.encodings.companions import undecoded_lines
from torchparams.errors import ReadOnlyTable, SelectorError, UnknownName
from torchparams.left_out import LeftOut, concerned, left_out_lines
from torchparams.mapping_views import Items, Keys, Values
from torchparams.reading import Reading
from torchparams.render.result import Result
from torchparams.render.rows import INFO_COLUMNS, sort_infos, table_of, total_of
from torchparams.render.rows import ROWS_SHOWN as ROWS_SHOWN
from torchparams.render.tabular import Tabular
from torchparams.render.tree import Text, Tree, filled, printable

if TYPE_CHECKING:
    import numpy as np

    from torchparams.info import ParameterInfo
    from torchparams.selectors import Explanation, Selector
    from torchparams.sources.base import Source


class Parameters(Result, Tabular, Mapping[str, Any]):
    """Named parameters of a source: an ordered mapping of names to tensors.

    A table of a live model, or a selection of one, reads the model at every use, so it is never stale. It stores
    nothing that it read, so threads may share it. A loop covers the names that existed when it began. Calling a table
    gives the same as `nn.Module.parameters()`, and `items()` the same as `named_parameters()`: references to the
    tensors, not copies.

    Looking up one name only visits the modules on its path. The same holds in a selection by names, patterns, shape,
    dtype, `:trainable` and similar. Selections with `~`, `-`, `:tied`, `:bias`, `:norm`, `[module=…]` or functions
    depend on all names of a tensor, so each look-up reads the model. For many look-ups, use `items()` or a
    `snapshot()`.

    Created by `torchparams.of`; `select`, `|`, `&`, `-` and `~` give selections of the same source.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> params = tp.of({"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)})
    >>> params.select("**.bias").names
    ['fc.bias']
    >>> len(params), params.numel, params.nbytes
    (2, 8, 32)
    """

    __slots__ = ("_chosen", "_selector", "_source")
    columns = INFO_COLUMNS

    def __init__(self, source: Source, selector: Selector | None = None) -> None:
        self._source = source
        self._selector = selector
        # cached for files, which do not change; None for live sources
        self._chosen: Mapping[str, ParameterInfo] | None = None

    # --- the table -------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """Source of the parameters."""
        return self._source

    @property
    def selector(self) -> Selector | None:
        """Selector of a selection; None for the whole source."""
        return self._selector

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the source."""
        return self._source.metadata

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the source that the table does not list; for a selection, only that of its modules."""
        found = self._source.left_out
        if not found or self._selector is None:
            return found
        return concerned(found, self._selector, self.names)

    @property
    def undecoded(self) -> dict[str, str]:
        """Tensors whose codes are not decoded, and are listed as stored: name → reason as a sentence.

        Empty for a table of stored tensors (`raw=True`).
        """
        found = {name: each.reason for name, each in self._source.coded().items() if each.codes}
        if not found or self._source.stored is self._source:
            return {}
        return {name: found[name] for name in self.names if name in found}

    @property
    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos of all parameters by canonical name, in order."""
        if self._selector is None:
            return self._source.ordered()
        if self._chosen is not None:
            return self._chosen
        reading = self.reading()
        chosen = dict(zip(reading.names, reading.infos, strict=True))
        if not self._source.live:
            self._chosen = chosen
        return chosen

    @property
    def narrow(self) -> str | None:
        """Note about a `*` of the selector that matches few parameters where `**` would match many more, or None."""
        if self._selector is None or "*" not in str(self._selector):
            return None
        source = self._source
        return self._selector.narrow(
            source.reading() if source.live else Reading(source.infos().values()), where=source.label
        )

    def reading(self) -> Reading:
        """Single reading of the table, to answer several questions; see `Reading`."""
        if self._chosen is not None:
            return Reading(self._chosen.values())
        reading = self._source.reading() if self._source.live else Reading(self._source.ordered().values())
        # The order is that of the source, whatever the order of terms in the selector.
        return (
            reading if self._selector is None else reading.only(self._selector.names(reading, where=self._source.label))
        )

    def records(self) -> Reading:
        """Deprecated name of `reading`, which will be removed in the next version."""
        warnings.warn("Parameters.records is now reading", DeprecationWarning, stacklevel=2)
        return self.reading()

    def snapshot(self) -> Parameters:
        """Immutable reading of the table: later changes of a live model do not affect it.

        Use it for many look-ups: a live table reads the model at each use, a snapshot does not. Names, infos and
        selections are fixed. The tensors are references to those of the model, so their values are current. A table of
        a file is its own snapshot.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> weights = {"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}
        >>> before = tp.of(weights).snapshot()
        >>> del weights["fc.bias"]
        >>> before.names, tp.of(weights).names
        (['fc.weight', 'fc.bias'], ['fc.weight'])
        """
        return Parameters(self._source.snapshot(self.reading())) if self._source.live else self

    def info(self, name: str) -> ParameterInfo:
        """Info of a parameter by canonical or raw name.

        For a live model, this reads the model to find the other names of the tensor. For many parameters, use `infos`.

        Raises:
            UnknownName: The table has no such parameter.
        """
        if self._source.live and isinstance(name, str):
            reading = self._source.reading()
            if reading.tensors is not None and name in reading.tensors:
                if self._selector is None or name in self._selector.names(reading, where=self._source.label):
                    return reading.one(name)
                raise self._unselected(name)
        return self._source.info(self._name(name))

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Values of a parameter as a NumPy array (bfloat16 and float8 with ml_dtypes); reads no other tensor.

        For a file or array, a view without a copy if possible; it is read-only, or private to this process. For a live
        tensor, a copy.

        Raises:
            UnknownName: The table has no such parameter.
            NotReadable: The values cannot be read.
        """
        return self._source.array(self._taken(name))

    @property
    def names(self) -> list[str]:
        """Canonical names, in order."""
        return list(self._keys())

    @property
    def numel(self) -> int:
        """Number of elements of all parameters; tied tensors count once."""
        return sum(info.numel for info in self.infos.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters if contiguous; tied tensors count once."""
        return sum(info.nbytes for info in self.infos.values())

    # --- mapping ---------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        return self._source.value(self._taken(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return self._source.count() if self._selector is None else len(self._keys())

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        taken = self._source.takes(name) or self._source.find(name) is not None
        return taken and self._selects(name)

    def keys(self) -> KeysView[str]:
        """Canonical names, in order. The view reads the model once, at first use."""
        return Keys(self, self._keys)

    def items(self) -> ItemsView[str, Any]:
        """Names and tensors, in order. The view reads the model once, at first use.

        Tensors of a file are read one by one.
        """
        return Items(self, self._source, self._read)

    def values(self) -> ValuesView[Any]:
        """Tensors, in order. The view reads the model once, at first use.

        Tensors of a file are read one by one.
        """
        return Values(self, self._source, self._read)

    def __setitem__(self, name: str, value: object) -> NoReturn:
        raise self._read_only(name, "set")

    def __delitem__(self, name: str) -> NoReturn:
        raise self._read_only(name, "deleted")

    def _read_only(self, name: str, done: str) -> ReadOnlyTable:
        if self._source.files:
            hint = "write a new file with torchparams.convert"
        elif self._source.format != "module":
            hint = "change the underlying mapping"
        else:
            code = "model" + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in name.split("."))
            hint = (
                f"to change values: with torch.no_grad(): {code}.copy_(…); "
                f"to replace the parameter: {code} = torch.nn.Parameter(…)"
                if done == "set"
                else f"`del {code}`"
            )
        return ReadOnlyTable(
            f"{name!r} cannot be {done} through a table of parameters", where=self._source.label, hint=hint
        )

    def __call__(self, recurse: bool = True) -> Iterator[Any]:
        """Iterate over the tensors, in the order of `nn.Module.parameters(recurse)`."""
        for _, tensor in self.named_parameters(recurse=recurse):
            yield tensor

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Iterate over names and tensors like `nn.Module.named_parameters`, with canonical names.

        Args:
            prefix: Prefix for every name, joined by a dot.
            recurse: Include parameters of submodules; False gives only names without a dot.
            remove_duplicate: Yield a tied tensor once; False also yields its aliases.
        """
        dot = prefix + "." if prefix else ""
        chosen = None if self._selector is None else self._keys()
        for name, tied_to, tensor in self._source.walk(recurse=recurse, remove_duplicate=remove_duplicate):
            if chosen is None or tied_to in chosen:
                yield dot + name, tensor

    def _keys(self) -> Mapping[str, Any]:
        """Cheapest available mapping with the names as keys."""
        if self._selector is None:
            return self._source.keys() if self._source.live else self._source.ordered()
        return self._tensors() if self._source.live else self.infos

    def _tensors(self) -> Mapping[str, Any]:
        """Tensors by name, from one reading of a live source."""
        if self._selector is None:
            return dict(self._source.items())
        reading = self.reading()
        return dict(self._source.items(reading.names)) if reading.tensors is None else reading.tensors

    def _read(self) -> Mapping[str, Any]:
        """Read the contents of a view of tensors: the tensors of a live source, or the names of any other."""
        return self._tensors() if self._source.live else self._keys()

    def _taken(self, name: str) -> str:
        """Spelling of a name that the source accepts for values; cheaper to find than the canonical one."""
        if isinstance(name, str) and self._source.takes(name) and self._selects(name):
            return name
        return self._name(name)

    def _name(self, name: str) -> str:
        if not isinstance(name, str):
            raise TypeError(f"a parameter name must be a str, not {type(name).__name__}: {name!r}")
        canonical = self._source.resolve(name)
        if not self._selects(canonical):
            raise self._unselected(name)
        return canonical

    def _unselected(self, name: str) -> UnknownName:
        return UnknownName(
            f"{name!r} is not in this selection", where=self._source.label, exists=f"the selector is {self._selector}"
        )

    def _selects(self, name: str) -> bool:
        """Whether the selector matches a parameter of the source."""
        if self._selector is None:
            return True
        # Decide by the parameter alone if possible: reading all of them per name would make loops quadratic.
        lone = self._source.alone(name) if self._source.live else None
        alone = None if lone is None else self._selector.decides(lone)
        return self._source.find(name) in self._keys() if alone is None else alone

    # --- selections ------------------------------------------------------------------------

    def select(self, selector: object, *, strict: bool = True) -> Parameters:
        """Select parameters; returns a table of the same source.

        Args:
            selector: Text in the selector language, a `Selector`, or a function of `ParameterInfo`.
            strict: Raise if any branch of the selector matches nothing.

        Raises:
            SelectorSyntaxError: The text is not a selector.
            NoMatch: A branch matches nothing.
        """
        from torchparams.selectors import Selector

        chosen = Selector.of(selector)
        if strict:
            chosen.names(self.reading(), strict=True, where=self._source.label)
        return Parameters(self._source, chosen if self._selector is None else self._selector & chosen)

    def explain(self, selector: object) -> Explanation:
        """Explain which term of a selector matches which parameters; prints as a table."""
        from torchparams.selectors import Selector

        return Selector.of(selector).explain(self.reading(), where=self._source.label)

    def filter(self, keep: Callable[[ParameterInfo], bool]) -> Parameters:
        """Select the parameters whose info `keep` accepts."""
        return self.select(keep, strict=False)

    def _combine(self, other: Parameters, how: Callable[[Selector, Selector], Selector]) -> Parameters:
        if other._source != self._source:
            raise SelectorError(
                "the selections belong to different sources",
                where=f"{self._source.label} and {other._source.label}",
                hint="combine selections of the same table, or compare sources with torchparams.diff",
            )
        return Parameters(self._source, how(self._terms(), other._terms()))

    def _terms(self) -> Selector:
        from torchparams.selectors import Selector

        return Selector.everything() if self._selector is None else self._selector

    # Mapping itself has no set operators (only its views do), so nothing is overridden here.
    def __or__(self, other: object) -> Parameters:
        return self._combine(other, lambda a, b: a | b) if isinstance(other, Parameters) else NotImplemented

    def __and__(self, other: object) -> Parameters:
        return self._combine(other, lambda a, b: a & b) if isinstance(other, Parameters) else NotImplemented

    def __sub__(self, other: object) -> Parameters:
        return self._combine(other, lambda a, b: a & ~b) if isinstance(other, Parameters) else NotImplemented

    def __invert__(self) -> Parameters:
        return Parameters(self._source, ~self._terms())

    # Tables are equal if source and selector are equal; `diff` compares values.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parameters):
            return NotImplemented
        return self._source == other._source and self._selector == other._selector

    def __hash__(self) -> int:
        return hash((self._source, self._selector))

    # A copied or unpickled table refers to a copy of the source.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._source, self._selector)

    # --- print -----------------------------------------------------------------------------

    def table_rows(self) -> list[ParameterInfo]:
        """Infos, as rows for pyarrow and duckdb.

        polars would treat a table as a mapping of columns; use `torchparams.ls(params)` there.
        """
        return list(self.infos.values())

    def tree(self, *, limit: int | None = ROWS_SHOWN, sort: str | None = None) -> Tree:
        """The table as a tree, as printed.

        Args:
            limit: Maximum number of rows; None for all.
            sort: Column to sort by (`name`, `shape`, `dtype`, `numel`, `size`, `module`), with a leading `-` for
                descending; `stored` for file order; None for the order of the table.
        """
        infos = list(self.infos.values())
        title = Text(printable(f"{self._source.label} ({self._source.format})"), "title")
        total = Text(total_of(infos), "dim")
        narrow = self.narrow
        beside = [*([Text(narrow, "warn")] if narrow else []), *undecoded_lines(self.undecoded)]
        beside += left_out_lines(self.left_out)
        if not infos and self._selector is None and (reasons := self._source.why_empty()):
            return Tree((title, *(Text(filled(reason, hanging=2)) for reason in reasons), total, *beside))
        return Tree((title, table_of(sort_infos(infos, sort, self._source.keys), limit), total, *beside))

    def _title(self) -> str:
        return f"Parameters of {self._source.label}"


def of(x: object, *, buffers: bool = False, raw: bool = False) -> Parameters:
    """Open the parameters of a model, checkpoint or mapping as a table.

    Sharded parameters have the shape of the whole. Ranks do not communicate, so any of them may list the table.

    Args:
        x: A live `nn.Module`; a mapping of names to tensors or arrays; the path of a checkpoint (safetensors, torch
            zip, legacy torch), of a directory of shards or of its index; a path with `#inner` for a mapping nested in a
            checkpoint; a `Source`; or a `Parameters`, which is returned unchanged.
        buffers: Include the buffers of a live model. Other sources list everything.
        raw: List the stored tensors of quantised parameters, codes and scales separately.

    Raises:
        UnsupportedSource: The type of `x` is not supported.
        SourceError: The file cannot be read, or breaks the rules of its format.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> tp.of({"w": np.zeros(3)}).info("w").dtype
    'float64'
    """
    if isinstance(x, Parameters):
        return stored(x) if raw else x
    from torchparams.sources.opening import open_source

    return Parameters(open_source(x, buffers=buffers, raw=raw))


def stored(params: Parameters) -> Parameters:
    """Table of the stored tensors behind the parameters of a table.

    >>> import torchparams as tp
    >>> from torchparams.dtypes import DType
    >>> import numpy as np
    >>> weights = {"w": np.ones((2, 3), DType.of("float8_e4m3fn").numpy), "w_scale": np.ones(1, np.float32)}
    >>> tp.of(weights).names, stored(tp.of(weights)).names
    (['w'], ['w', 'w_scale'])
    """
    source = params.source.stored
    if source is params.source:
        return params
    if params.selector is None:
        return Parameters(source)
    from torchparams.selectors import Selector

    names = {part for info in params.infos.values() for part in info.raw_names if info.encoded} | {
        info.name for info in params.infos.values() if not info.encoded
    }
    return Parameters(source, Selector.of(names))
