"""One reading of a source: the names at once, and of the records as much as somebody asks for.

A selector by name needs no records, and one by dimensions needs nothing but the dimensions. Making every record of a
live model with tens of thousands of parameters takes longer than everything else that a verb does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

    from torchparams.info import ParameterInfo


class Records:
    """The records of one reading, in the source's order: for the time of one call, and never kept.

    A verb that asks several things of a model reads it once, with `Parameters.records`, and gives the reading to each
    selector: all of them see the same state. Fields are looked up when they are first asked for.

    Args:
        infos: The records, where they are there already.

    Attributes:
        tensors: Canonical name → tensor, where the reading has the tensors themselves (of a live model); else None.
        root: The model that was read, where it is a live one; else None.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> records = tp.of({"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}).records()
    >>> records.names, records.column("ndim")
    (['fc.weight', 'fc.bias'], [2, 1])
    >>> sorted(tp.Selector("[ndim=1]").names(records))
    ['fc.bias']
    """

    tensors: Mapping[str, Any] | None = None
    root: Any = None

    def __init__(self, infos: Iterable[ParameterInfo]) -> None:
        self._made = list(infos)
        self._columns: dict[str, Sequence[Any]] = {}
        self.applied: Any = None  # what a selector found out of this reading, for the next one

    @cached_property
    def names(self) -> list[str]:
        """The canonical names."""
        return [info.name for info in self.infos]

    @property
    def held(self) -> Mapping[str, Any] | None:
        """Canonical name → the parameter or buffer that the model holds; None where it is no live model."""
        return self.tensors

    @property
    def infos(self) -> list[ParameterInfo]:
        """The records themselves, all of them."""
        return self._made

    def column(self, field: str) -> Sequence[Any]:
        """One field of every record: an attribute of `ParameterInfo`, `owner`, which is `(module, bases)`, or `dense`.

        `dense` is the shape and the dtype where the values lie as an array in memory or in a file, and can be copied
        from there (of a live model, to there too); None where more has to be known.
        """
        found = self._columns.get(field)
        if found is None:
            found = self._columns[field] = self._find(field)
        return found

    def _find(self, field: str) -> Sequence[Any]:
        if field == "dense":
            # Of a file, where one range has the values; of anything else, a record does not say it.
            return [
                (info.shape, info.dtype)
                if info.location is not None and info.dtype.kind != "opaque" and info.device != "meta"
                else None
                for info in self.infos
            ]
        get: Callable[[ParameterInfo], Any] = attrgetter(*(("module", "bases") if field == "owner" else (field,)))
        return list(map(get, self.infos))

    @property
    def raws(self) -> Iterable[tuple[int, str]]:
        """Place and raw name of those whose raw name is not the canonical one."""
        return [(row, info.raw_name) for row, info in enumerate(self.infos) if info.raw_name not in ("", info.name)]

    @property
    def aliases(self) -> Iterable[tuple[int, str]]:
        """Place and alias, for every alias."""
        return [(row, alias) for row, info in enumerate(self.infos) if info.aliases for alias in info.aliases]

    def one(self, name: str) -> ParameterInfo:
        """The record of the canonical name `name`."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, ParameterInfo]:
        return {info.name: info for info in self.infos}

    def only(self, names: Container[str]) -> Records:
        """Those of `names`, in the same order."""
        part = Records(info for info in self.infos if info.name in names)
        if self.tensors is not None:
            part.tensors = {name: self.tensors[name] for name in part.names}
        return part

    def __iter__(self) -> Iterator[ParameterInfo]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.names)


INTRINSIC = frozenset(
    (
        *("shape", "ndim", "numel", "nbytes", "layout", "dtype", "device", "requires_grad", "storage", "location"),
        "sharding",
    )
)
"""The fields that are the same under every name that a tensor has."""


@dataclass(frozen=True, slots=True)
class Lone:
    """One parameter, found by its name without a look at the others: whether it has further names is not known.

    Attributes:
        records: The parameter alone, under the name that leads to it.
        certain: The fields of its record that a look at the others would not change.
        passed: The modules that lead to it, and what is held there.
    """

    records: Records
    certain: frozenset[str] = INTRINSIC
    passed: tuple[Any, ...] = ()


class InfosByName(Mapping[str, "ParameterInfo"]):
    """The records of a reading by canonical name; none is made before the first is asked for, and then all are.

    Args:
        records: The reading.
        names: The names to give, where these are not all.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> infos = InfosByName(tp.of({"w": np.ones(2), "b": np.zeros(1)}).records(), ["b"])
    >>> list(infos), infos["b"].shape
    (['b'], (1,))
    """

    def __init__(self, records: Records, names: Iterable[str] | None = None) -> None:
        self._records = records
        self._names = dict.fromkeys(records.names if names is None else names)

    def __getitem__(self, name: str) -> ParameterInfo:
        return self._infos[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def _infos(self) -> dict[str, ParameterInfo]:
        made = dict(zip(self._records.names, self._records.infos, strict=True))
        return {name: made[name] for name in self._names}


class FieldFunction:
    """A function of a record that looks at some fields only; as a selector, no more than these is looked up.

    Args:
        name: What a selector of it prints.
        fields: The fields, as `Records.column` knows them.
        function: What is asked of their values, in this order.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> wide = FieldFunction("wide", ("shape",), lambda shape: max(shape) > 100)
    >>> tp.of({"a": np.zeros(101), "b": np.zeros(3)}).select(wide).names
    ['a']
    """

    def __init__(self, name: str, fields: tuple[str, ...], function: Callable[..., object]) -> None:
        self.__qualname__ = name
        self.fields = fields
        self.function = function

    def __call__(self, info: ParameterInfo) -> bool:
        """Whether it holds for one record."""
        return self.over(Records([info]))[0]

    def over(self, records: Records) -> list[bool]:
        """Whether it holds, for every record of a reading."""
        return [bool(self.function(*values)) for values in zip(*map(records.column, self.fields), strict=True)]
