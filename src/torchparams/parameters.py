"""The table: an ordered mapping of names to tensors, live or on disk."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from torchparams.errors import ReadOnlyTable, SelectorError, UnknownName
from torchparams.left_out import LeftOut, concerned, left_out_lines
from torchparams.records import Records
from torchparams.render.result import Result
from torchparams.render.rows import INFO_COLUMNS, sort_infos, table_of, total_of
from torchparams.render.rows import ROWS_SHOWN as ROWS_SHOWN
from torchparams.render.tabular import Tabular
from torchparams.render.tree import Report, Text, filled, printable

if TYPE_CHECKING:
    import numpy as np

    from torchparams.info import ParameterInfo
    from torchparams.selectors import Explanation, Selector
    from torchparams.sources.base import Source


class Parameters(Result, Tabular, Mapping[str, Any]):
    """Named parameters of one source: an ordered mapping, name → tensor.

    A table of a live model reads the model anew at every use, and so does a selection of one: it is never stale. It
    keeps nothing of what it read, so threads may share it. A loop goes over the names or pairs that were there when it
    began. Called, a table gives what `nn.Module.parameters()` gives, and `items()` what `named_parameters()` gives:
    references to the tensors, never copies.

    One name is looked up on the way to its module alone. In a selection that is so where the parameter alone tells
    whether it is selected: by names, patterns, shape, dtype, `:trainable` and the like. `~`, `-`, `:tied`, `:bias`,
    `:norm`, `[module=…]` and functions need to know all names of the tensor, and each look-up reads the model. Many
    look-ups there are made in `items()` or in a `snapshot()`.

    Made by `torchparams.of`; `select`, `|`, `&`, `-` and `~` make smaller ones of the same source.

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
        # What is chosen from a file, which never changes; of a live source always None.
        self._chosen: Mapping[str, ParameterInfo] | None = None

    # --- the table -------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """Where the parameters live."""
        return self._source

    @property
    def selector(self) -> Selector | None:
        """What chose them from the source; None for all of it."""
        return self._selector

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the source says of itself beside its tensors."""
        return self._source.metadata

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State of the source that the table does not list; of a selection, only of the modules that it concerns."""
        found = self._source.left_out
        if not found or self._selector is None:
            return found
        return concerned(found, self._selector, self.names)

    @property
    def infos(self) -> Mapping[str, ParameterInfo]:
        """Every parameter's record, by canonical name, in order."""
        if self._selector is None:
            return self._source.ordered()
        if self._chosen is not None:
            return self._chosen
        records = self.records()
        chosen = dict(zip(records.names, records.infos, strict=True))
        if not self._source.live:
            self._chosen = chosen
        return chosen

    @property
    def narrow(self) -> str | None:
        """One line about a `*` of the selector that hits a few parameters where `**` would hit many more, or None."""
        if self._selector is None or "*" not in str(self._selector):
            return None
        source = self._source
        return self._selector.narrow(
            source.records() if source.live else Records(source.infos().values()), where=source.label
        )

    def records(self) -> Records:
        """One reading of the table, for something that asks several things of it; see `Records`."""
        if self._chosen is not None:
            return Records(self._chosen.values())
        records = self._source.records() if self._source.live else Records(self._source.ordered().values())
        # The order is the source's, whatever the order of the selector's terms.
        return (
            records if self._selector is None else records.only(self._selector.names(records, where=self._source.label))
        )

    def snapshot(self) -> Parameters:
        """The table as it is now: no later change of a live model shows in it.

        For whoever asks many things at once, or of many names: each use of a live table reads the model, and a snapshot
        never does. Names, records and selections stay as they are. The tensors are the model's own, not copies, so
        their values are those of the moment at which they are read. A table of files is its own snapshot.

        >>> import numpy as np
        >>> import torchparams as tp
        >>> weights = {"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}
        >>> before = tp.of(weights).snapshot()
        >>> del weights["fc.bias"]
        >>> before.names, tp.of(weights).names
        (['fc.weight', 'fc.bias'], ['fc.weight'])
        """
        return Parameters(self._source.snapshot(self.records())) if self._source.live else self

    def info(self, name: str) -> ParameterInfo:
        """The record of the parameter `name`, under any of its spellings.

        A live model is read for it, since a record lists the other names of the tensor. Of many parameters, `infos`
        makes all records at once.

        Raises:
            UnknownName: No parameter of this table is named so.
        """
        if self._source.live and isinstance(name, str):
            records = self._source.records()
            if records.tensors is not None and name in records.tensors:
                if self._selector is None or name in self._selector.names(records, where=self._source.label):
                    return records.one(name)
                raise self._unselected(name)
        return self._source.info(self._name(name))

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """The values of `name` as a numpy array (bfloat16 and float8 as ml_dtypes' types); reads no other tensor.

        Of a file or an array, a view without a copy where the bytes allow; such a view is read-only or private to this
        process. Of a live tensor, a copy.

        Raises:
            UnknownName: No parameter of this table is named so.
            NotReadable: Its values cannot be had.
        """
        return self._source.array(self._taken(name))

    @property
    def names(self) -> list[str]:
        """The canonical names, in order."""
        return list(self._keys())

    @property
    def numel(self) -> int:
        """Count of elements of all parameters together; a tied tensor counts once."""
        return sum(info.numel for info in self.infos.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters together, each laid out contiguously; a tied tensor counts once."""
        return sum(info.nbytes for info in self.infos.values())

    # --- a mapping -------------------------------------------------------------------------

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
        """The canonical names, in order: those of one reading, made when the view is first used."""
        return _Keys(self)

    def items(self) -> ItemsView[str, Any]:
        """Names and tensors, in order: those of one reading, made when the view is first used.

        A file's tensors are read one by one.
        """
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """The tensors, in order: those of one reading, made when the view is first used.

        A file's tensors are read one by one.
        """
        return _Values(self)

    def __setitem__(self, name: str, value: object) -> NoReturn:
        raise self._read_only(name, "set")

    def __delitem__(self, name: str) -> NoReturn:
        raise self._read_only(name, "deleted")

    def _read_only(self, name: str, done: str) -> ReadOnlyTable:
        if self._source.files:
            hint = "torchparams.convert writes another file"
        elif self._source.format != "module":
            hint = "change the mapping that it was made from"
        else:
            code = "model" + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in name.split("."))
            hint = (
                f"for other values, with torch.no_grad(): {code}.copy_(…); "
                f"for another parameter, {code} = torch.nn.Parameter(…)"
                if done == "set"
                else f"del {code}"
            )
        return ReadOnlyTable(
            f"{name!r} cannot be {done} through a table of parameters", where=self._source.label, hint=hint
        )

    def __call__(self, recurse: bool = True) -> Iterator[Any]:
        """PyTorch's iterator: the tensors, in the order of `nn.Module.parameters(recurse)`."""
        for _, tensor in self.named_parameters(recurse=recurse):
            yield tensor

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Names and tensors, with the meaning of `nn.Module.named_parameters`; names are canonical.

        Args:
            prefix: Put before every name, with a dot.
            recurse: Also those of submodules; False gives only the names without a dot.
            remove_duplicate: A tied tensor once; False gives it under its aliases too.
        """
        dot = prefix + "." if prefix else ""
        chosen = None if self._selector is None else self._keys()
        for name, tied_to, tensor in self._source.walk(recurse=recurse, remove_duplicate=remove_duplicate):
            if chosen is None or tied_to in chosen:
                yield dot + name, tensor

    def _keys(self) -> Mapping[str, Any]:
        """A mapping with the names as its keys, the cheapest there is."""
        if self._selector is None:
            return self._source.keys() if self._source.live else self._source.ordered()
        return self._tensors() if self._source.live else self.infos

    def _tensors(self) -> Mapping[str, Any]:
        """Name → tensor, of one reading of a live source."""
        if self._selector is None:
            return dict(self._source.items())
        records = self.records()
        return dict(self._source.items(records.names)) if records.tensors is None else records.tensors

    def _taken(self, name: str) -> str:
        """A spelling of `name` under which the source gives the values; cheaper to have than the canonical one."""
        if isinstance(name, str) and self._source.takes(name) and self._selects(name):
            return name
        return self._name(name)

    def _name(self, name: str) -> str:
        if not isinstance(name, str):
            raise TypeError(f"a parameter's name is a str, not {type(name).__name__}: {name!r}")
        canonical = self._source.resolve(name)
        if not self._selects(canonical):
            raise self._unselected(name)
        return canonical

    def _unselected(self, name: str) -> UnknownName:
        return UnknownName(
            f"{name!r} is not in this selection", where=self._source.label, exists=f"it is {self._selector}"
        )

    def _selects(self, name: str) -> bool:
        """Whether the selector hits the parameter `name`, which the source has."""
        if self._selector is None:
            return True
        # One parameter alone, where that is enough: reading all of them for each name would make a loop quadratic.
        lone = self._source.alone(name) if self._source.live else None
        alone = None if lone is None else self._selector.decides(lone)
        return self._source.find(name) in self._keys() if alone is None else alone

    # --- selections ------------------------------------------------------------------------

    def select(self, selector: object, *, strict: bool = True) -> Parameters:
        """The parameters that `selector` hits, as a table of the same source.

        Args:
            selector: Text in the selector language, a `Selector`, or a callable on `ParameterInfo`.
            strict: Refuse a selector of which any union branch hits nothing.

        Raises:
            SelectorSyntaxError: The text is not a selector.
            NoMatch: A branch hits nothing.
        """
        from torchparams.selectors import Selector

        chosen = Selector.of(selector)
        if strict:
            chosen.names(self.records(), strict=True, where=self._source.label)
        return Parameters(self._source, chosen if self._selector is None else self._selector & chosen)

    def explain(self, selector: object) -> Explanation:
        """Which term of `selector` hits which parameter, and how many each; it prints as a table."""
        from torchparams.selectors import Selector

        return Selector.of(selector).explain(self.records(), where=self._source.label)

    def filter(self, keep: Callable[[ParameterInfo], bool]) -> Parameters:
        """The parameters whose record `keep` accepts."""
        return self.select(keep, strict=False)

    def _combine(self, other: Parameters, how: Callable[[Selector, Selector], Selector]) -> Parameters:
        if other._source != self._source:
            raise SelectorError(
                "these are selections of two sources",
                where=f"{self._source.label} and {other._source.label}",
                hint="combine selections that were made from one table; compare two sources with torchparams.diff",
            )
        return Parameters(self._source, how(self._terms(), other._terms()))

    def _terms(self) -> Selector:
        from torchparams.selectors import Selector

        return Selector.everything() if self._selector is None else self._selector

    # Mapping has no set operators on itself (its views have), so nothing is overridden here.
    def __or__(self, other: object) -> Parameters:
        return self._combine(other, lambda a, b: a | b) if isinstance(other, Parameters) else NotImplemented

    def __and__(self, other: object) -> Parameters:
        return self._combine(other, lambda a, b: a & b) if isinstance(other, Parameters) else NotImplemented

    def __sub__(self, other: object) -> Parameters:
        return self._combine(other, lambda a, b: a & ~b) if isinstance(other, Parameters) else NotImplemented

    def __invert__(self) -> Parameters:
        return Parameters(self._source, ~self._terms())

    # Two tables are equal when they are the same view of the same source: comparing values is `diff`.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parameters):
            return NotImplemented
        return self._source == other._source and self._selector == other._selector

    def __hash__(self) -> int:
        return hash((self._source, self._selector))

    # A copy or an unpickled table is one of a copy of the source.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._source, self._selector)

    # --- print -----------------------------------------------------------------------------

    def table_rows(self) -> list[ParameterInfo]:
        """The records: the rows that pyarrow and duckdb get. polars takes a table for a mapping of columns.

        So it gets `torchparams.ls(params)`.
        """
        return list(self.infos.values())

    def report(self, *, limit: int | None = ROWS_SHOWN, sort: str | None = None) -> Report:
        """The table as a report: what printing shows.

        Args:
            limit: Most rows to show; None for all.
            sort: A column to order by (`name`, `shape`, `dtype`, `numel`, `size`, `module`), `-` before it for
                descending; `stored` for a file's own order; None for the table's order.
        """
        infos = list(self.infos.values())
        title = Text(printable(f"{self._source.label} ({self._source.format})"), "title")
        total = Text(total_of(infos), "dim")
        narrow = self.narrow
        beside = [*([Text(narrow, "warn")] if narrow else []), *left_out_lines(self.left_out)]
        if not infos and self._selector is None and (reasons := self._source.why_empty()):
            return Report((title, *(Text(filled(reason, hanging=2)) for reason in reasons), total, *beside))
        return Report((title, table_of(sort_infos(infos, sort, self._source.keys()), limit), total, *beside))

    def _title(self) -> str:
        return f"Parameters of {self._source.label}"


class _Keys(KeysView[str]):
    _mapping: Parameters

    @cached_property
    def _reading(self) -> Mapping[str, Any]:
        return self._mapping._keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reading)

    def __len__(self) -> int:
        return len(self._reading)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._reading


class _Pairs:
    """The reading that a view of tensors holds: the tensors of a live source; of any other the names."""

    _mapping: Parameters

    @cached_property
    def _reading(self) -> Mapping[str, Any]:
        table = self._mapping
        return table._tensors() if table._source.live else table._keys()

    def _pairs(self) -> Iterator[tuple[str, Any]]:
        table, read = self._mapping, self._reading
        if table._source.live:
            return iter(read.items())
        return table._source.items(read)

    def __len__(self) -> int:
        return len(self._reading)


class _Items(_Pairs, ItemsView[str, Any]):
    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self._pairs()

    def __contains__(self, pair: object) -> bool:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            return False
        name, value = pair
        if name not in self._reading:
            return False
        if self._mapping._source.live:
            return self._reading[name] is value  # as for values
        return bool(self._mapping[name] == value)


class _Values(_Pairs, ValuesView[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(self._reading.values()) if self._mapping._source.live else (value for _, value in self._pairs())

    def __contains__(self, value: object) -> bool:
        # `==` of two tensors is a tensor, and its truth an accident: a value is there when it is that very object.
        return any(other is value for other in self)


def of(x: object, *, buffers: bool = False, raw: bool = False) -> Parameters:
    """The table of anything that has parameters.

    Args:
        x: A live `nn.Module`; a mapping of names to tensors or arrays; the path of a checkpoint (safetensors,
            torch zip, torch legacy), of a directory of shards or of its index; a path with `#inner` for a mapping
            nested in a checkpoint; a `Source`; a `Parameters`, which is given back.
        buffers: List the buffers of a live model too. Other sources list everything they hold.
        raw: List the tensors of quantised parameters as they are stored, codes and scales apart.

    Raises:
        UnsupportedSource: `x` is none of these.
        SourceError: The file cannot be read, or is not what its format says.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> tp.of({"w": np.zeros(3)}).info("w").dtype
    'float64'
    """
    if isinstance(x, Parameters):
        return stored(x) if raw else x
    from torchparams.sources.base import open_source

    return Parameters(open_source(x, buffers=buffers, raw=raw))


def stored(params: Parameters) -> Parameters:
    """The table of the stored tensors that the parameters of a table are made of.

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
