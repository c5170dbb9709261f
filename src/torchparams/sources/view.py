"""A source whose rows are expressions over other sources: a conversion or merge that has not been written."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torchparams.errors import PlanError, shorten
from torchparams.info import ParameterInfo
from torchparams.sources.base import NO_METADATA, Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

    from torchparams.expressions.base import Expression
    from torchparams.info import Location
    from torchparams.left_out import LeftOut


class ViewSource(Source):
    """Named rows that are expressions. It can be pickled if all its tensors are in files.

    Args:
        rows: Pairs of name and expression, in order.
        label: The name in tables and messages.
        aliases: Name of a row → other names of the same tensor.
        metadata: The `metadata` of the source.

    Raises:
        PlanError: Two rows have one name, or an alias is the name of a row.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> from torchparams.expressions.operations import Linear
    >>> from torchparams.testing import MemorySource
    >>> a, b = (MemorySource({"w": np.full(3, value, np.float32)}) for value in (1, 3))
    >>> view = ViewSource([("mean", Linear([a.row("w"), b.row("w")], [0.5, 0.5]))])
    >>> tp.of(view).numpy("mean")
    array([2., 2., 2.], dtype=float32)
    """

    format = "view"

    def __init__(
        self,
        rows: Iterable[tuple[str, Expression]],
        *,
        label: str = "view",
        aliases: Mapping[str, tuple[str, ...]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.label = label
        self._rows: dict[str, Expression] = {}
        self._aliases = dict(aliases or {})
        self._metadata = MappingProxyType(dict(metadata)) if metadata else NO_METADATA
        for name, row in rows:
            if name in self._rows:
                raise PlanError(f"two rows have the name {shorten(repr(name))}", where=label, hint="rename one")
            self._rows[name] = row
        for name in (alias for names in self._aliases.values() for alias in names):
            if name in self._rows:
                raise PlanError(f"{shorten(repr(name))} is a row and an alias", where=label, hint="rename one")
        self._infos: Mapping[str, ParameterInfo] | None = None
        self.sources = tuple(
            {id(leaf.source): leaf.source for row in self._rows.values() for leaf in row.leaves()}.values()
        )

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Infos, in the order of the rows."""
        if self._infos is None:
            self._infos = MappingProxyType({name: self._info_of(name, row) for name, row in self._rows.items()})
        return self._infos

    def _info_of(self, name: str, row: Expression) -> ParameterInfo:
        leaves = list(row.leaves())
        return ParameterInfo(
            name=name,
            shape=row.shape,
            dtype=row.dtype,
            numel=row.numel,
            nbytes=row.nbytes,
            device="file" if all(leaf.info.device == "file" for leaf in leaves) else "cpu",
            kind="tensor",
            raw_name=name,
            aliases=self._aliases.get(name, ()),
            location=row.place,
        )

    def row(self, name: str, info: ParameterInfo | None = None) -> Expression:
        """Expression of a row."""
        return self._rows[name] if name in self._rows else self._rows[self.resolve(name)]

    def span(self, name: str) -> Location | None:
        """Byte range of a row that is one range of a file."""
        return self.row(name).place

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Computed values of a row."""
        from torchparams.expressions.work import evaluate

        return evaluate(self.row(name))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of the view."""
        return self._metadata

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """State that the sources of the rows do not list."""
        return tuple(each for source in self.sources for each in source.left_out)

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the sources, each once."""
        return tuple(dict.fromkeys(path for source in self.sources for path in source.files))

    def check_unchanged(self) -> None:
        """Raise if a file was changed after it was listed."""
        for source in self.sources:
            source.check_unchanged()

    def close(self) -> None:
        """Close open files."""
        for source in self.sources:
            source.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (tuple(self._rows.items()), self.label, self._aliases, dict(self._metadata))


def _again(
    rows: tuple[tuple[str, Expression], ...], label: str, aliases: dict[str, tuple[str, ...]], metadata: dict[str, Any]
) -> ViewSource:
    return ViewSource(rows, label=label, aliases=aliases, metadata=metadata)
