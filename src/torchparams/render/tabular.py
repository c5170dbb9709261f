"""Results with table data: columns, rows, and the Arrow interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Columns = Mapping[str, Any]
    """Attribute of a row → type: `str`, `int`, `float`, `bool`, `list[…]`, `dict[…, …]`, or nested columns."""


class Tabular:
    """Result with rows that other libraries read through the Arrow PyCapsule interface.

    `polars.DataFrame(result)`, `pyarrow.table(result)`, `pandas.DataFrame.from_arrow(result)` and duckdb's `FROM
    result` work directly. Columns are the attributes of the rows; NaN stays NaN, and None becomes null.

    polars tests for mappings and sequences before Arrow, so results are neither.
    """

    __slots__ = ()

    @property
    def columns(self) -> Columns:
        """Type of each attribute of a row."""
        raise NotImplementedError

    def table_rows(self) -> Sequence[Any]:
        """Rows of the table, with the attributes in `columns`."""
        raise NotImplementedError

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """Export the rows as an Arrow C stream.

        Args:
            requested_schema: Ignored, as the protocol allows: the consumer casts.

        Raises:
            MissingDependency: nanoarrow is not installed.
        """
        from torchparams.render.arrow import stream

        return stream(self.table_rows(), self.columns)
