"""Single reading of a source, with infos created on demand.

Selecting by name needs no infos, and selecting by dimensions needs only the dimensions. Creating every info of a live
model with tens of thousands of parameters would take longer than the rest of a verb.
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


class Reading:
    """Infos of one reading in source order; valid for one call, and never stored.

    A verb with several questions reads the model once, by `Parameters.reading`, and passes the reading to each
    selector, so that all see the same state. Fields are computed at first use.

    Args:
        infos: Infos, if they already exist.

    Attributes:
        tensors: Tensors by canonical name, if the reading has them (live models); otherwise None.
        root: The live model that was read; otherwise None.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> reading = tp.of({"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}).reading()
    >>> reading.names, reading.column("ndim")
    (['fc.weight', 'fc.bias'], [2, 1])
    >>> sorted(tp.Selector("[ndim=1]").names(reading))
    ['fc.bias']
    """

    tensors: Mapping[str, Any] | None = None
    root: Any = None

    def __init__(self, infos: Iterable[ParameterInfo]) -> None:
        self._made = list(infos)
        self._columns: dict[str, Sequence[Any]] = {}
        self.applied: Any = None  # results of a selector on this reading, cached for the next

    @cached_property
    def names(self) -> list[str]:
        """Canonical names."""
        return [info.name for info in self.infos]

    @property
    def held(self) -> Mapping[str, Any] | None:
        """Parameters and buffers of the model by canonical name; None for other sources."""
        return self.tensors

    @property
    def infos(self) -> list[ParameterInfo]:
        """All infos."""
        return self._made

    def column(self, field: str) -> Sequence[Any]:
        """One field of every info: an attribute of `ParameterInfo`, `owner` (module, bases), or `dense`.

        `dense` is the shape and the dtype where the values lie as an array in memory or in a file, and can be copied
        from there (of a live model, to there too); None where more has to be known.
        """
        found = self._columns.get(field)
        if found is None:
            found = self._columns[field] = self._find(field)
        return found

    def _find(self, field: str) -> Sequence[Any]:
        if field == "dense":
            # For a file, `dense` means a single byte range; other infos do not record it.
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
        """Index and raw name of parameters whose raw name differs from the canonical one."""
        return [(row, info.raw_name) for row, info in enumerate(self.infos) if info.raw_name not in ("", info.name)]

    @property
    def aliases(self) -> Iterable[tuple[int, str]]:
        """Index and name of every alias."""
        return [(row, alias) for row, info in enumerate(self.infos) if info.aliases for alias in info.aliases]

    def one(self, name: str) -> ParameterInfo:
        """Info of a canonical name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, ParameterInfo]:
        return {info.name: info for info in self.infos}

    def only(self, names: Container[str]) -> Reading:
        """Reading of the given names, in the same order."""
        part = Reading(info for info in self.infos if info.name in names)
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
"""Fields that are the same for every name of a tensor."""


@dataclass(frozen=True, slots=True)
class Lone:
    """One parameter, found by name without reading the others; it may have further names.

    Attributes:
        reading: Reading with this parameter alone, under the name it was found by.
        certain: Fields that do not depend on other parameters.
        passed: Modules on the path to it, and the object at the end.
    """

    reading: Reading
    certain: frozenset[str] = INTRINSIC
    passed: tuple[Any, ...] = ()


class InfosByName(Mapping[str, "ParameterInfo"]):
    """Infos of a reading by canonical name; the first access creates all of them.

    Args:
        reading: Reading of a source.
        names: Names to include; by default, all.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> infos = InfosByName(tp.of({"w": np.ones(2), "b": np.zeros(1)}).reading(), ["b"])
    >>> list(infos), infos["b"].shape
    (['b'], (1,))
    """

    def __init__(self, reading: Reading, names: Iterable[str] | None = None) -> None:
        self._of = reading
        self._names = dict.fromkeys(reading.names if names is None else names)

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
        made = dict(zip(self._of.names, self._of.infos, strict=True))
        return {name: made[name] for name in self._names}


class FieldFunction:
    """Function of some fields of an info; as a selector, it reads only these.

    Args:
        name: Name in printed selectors.
        fields: Fields, as in `Reading.column`.
        function: Function of the values, in this order.

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
        """Result for one info."""
        return self.over(Reading([info]))[0]

    def over(self, reading: Reading) -> list[bool]:
        """Result for every info of a reading."""
        return [bool(self.function(*values)) for values in zip(*map(reading.column, self.fields), strict=True)]
