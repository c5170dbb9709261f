"""Results that are tables for programs: the columns that they declare, and how other libraries get them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Columns = Mapping[str, Any]
    """Attribute of a row → its type: `str`, `int`, `float`, `bool`, `list[…]`, `dict[…, …]`, or columns again."""


class Tabular:
    """A result whose rows other libraries take through the Arrow PyCapsule interface.

    `polars.DataFrame(result)`, `pyarrow.table(result)`, `pandas.DataFrame.from_arrow(result)` and duckdb's
    `FROM result` need no conversion. Columns are the attributes of the rows, NaN is NaN, and None is null.

    polars asks whether an object is a mapping or a sequence before it asks for Arrow, so results are neither.
    """

    __slots__ = ()

    @property
    def columns(self) -> Columns:
        """Attribute of a row → its type."""
        raise NotImplementedError

    def table_rows(self) -> Sequence[Any]:
        """The rows of the table; see `columns` for their attributes."""
        raise NotImplementedError

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The rows as an Arrow C stream.

        Args:
            requested_schema: Ignored, as the protocol allows: the consumer casts.

        Raises:
            MissingDependency: nanoarrow is not installed.
        """
        from torchparams.render.arrow import stream

        return stream(self.table_rows(), self.columns)
