"""Rows of a comparison: one tensor, or a group of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torchparams.render.tree import json_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.info import ParameterInfo
    from torchparams.sketch.compared import Compared

STATUSES = ("identical", "equal", "changed", "shape", "dtype", "only_a", "only_b", "unread")
"""Possible values of `TensorDiff.status`."""

SAME = ("identical", "equal")

_SIDE = {"name": str, "shape": list[int], "dtype": str}
COLUMNS = {
    "name": str,
    "status": str,
    "a": _SIDE,
    "b": _SIDE,
    "numel": int,
    "changed": int,
    "share": float,
    "max": float,
    "relative": float,
    "cosine": float,
    "sqnr": float,
    "nan_a": int,
    "nan_b": int,
    "infinite": int,
    "opaque": bool,
    "reason": str,
}
"""Types of the `TensorDiff` columns, for tables handed to other libraries."""

GROUP_COLUMNS = {
    "name": str,
    "tensors": int,
    "differing": int,
    "numel": int,
    "changed": int,
    "share": float,
    "max": float,
    "relative": float,
    "cosine": float,
}
"""Types of the `GroupDiff` columns, for tables handed to other libraries."""


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """Comparison of one tensor of A and B.

    Numbers are NaN if nothing was compared, or if the bits are not numbers: quantised dtypes, or codes of an unknown
    encoding.

    Attributes:
        name: Name in A; for a tensor only in B, its name after the rename.
        status: `identical` (bit for bit), `equal` in value (only with `numeric`), `changed`, `shape` or `dtype` (these
            differ, so elements were not compared), `only_a`, `only_b`, or `unread` (values cannot be read).
        a: Info in A, or None.
        b: Info in B, or None.
        compared: Counts and sums; None if nothing was compared.
        reason: Reason why it is unread, or why its bits are not numbers.
    """

    name: str
    status: str
    a: ParameterInfo | None
    b: ParameterInfo | None
    compared: Compared | None = None
    reason: str = ""

    def of_codes(self, reason: str) -> TensorDiff:
        """Copy for a tensor of codes: it keeps only the count of changed elements."""
        from torchparams.sketch.compared import Compared

        compared = None if self.compared is None else Compared(changed=self.compared.changed)
        return replace(self, compared=compared, reason=self.reason or reason)

    @property
    def info(self) -> ParameterInfo:
        """Info in A, or in B if the tensor is only there."""
        found = self.a or self.b
        assert found is not None
        return found

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.info.numel

    @property
    def changed(self) -> int:
        """Number of changed elements."""
        return 0 if self.compared is None else self.compared.changed

    @property
    def share(self) -> float:
        """Share of changed elements, from 0 to 1."""
        if self.compared is None:
            return math.nan
        return self.compared.changed / self.numel if self.numel else 0.0

    @property
    def max(self) -> float | int:
        """Maximum |b - a|.

        NaN if a NaN appeared or disappeared; infinite if an infinity appeared, disappeared or changed sign.
        """
        return math.nan if self.compared is None or self.opaque else self.compared.greatest

    @property
    def relative(self) -> float:
        """Relative difference ‖b - a‖ / ‖a‖ in L2.

        NaN or infinite as for `max`. Values that are non-finite in both are excluded.
        """
        return math.nan if self.compared is None or self.opaque else self.compared.relative

    @property
    def cosine(self) -> float:
        """Cosine similarity; 1 if nothing changed.

        NaN if one tensor is all zeros, or if a NaN or infinity appeared, disappeared or changed sign. Values that are
        non-finite in both are excluded.
        """
        if self.compared is None or self.opaque:
            return math.nan
        return self.compared.cosine if self.compared.changed else 1.0

    @property
    def sqnr(self) -> float:
        """Signal-to-quantisation-noise ratio in dB, 20·log₁₀(‖a‖ / ‖b - a‖); infinite for equal tensors."""
        relative = self.relative
        return math.inf if relative == 0 else -math.inf if relative == math.inf else -20 * math.log10(relative)

    @property
    def nan_a(self) -> int:
        """Number of values that are NaN only in A."""
        return 0 if self.compared is None else self.compared.nan_a

    @property
    def nan_b(self) -> int:
        """Number of values that are NaN only in B."""
        return 0 if self.compared is None else self.compared.nan_b

    @property
    def infinite(self) -> int:
        """Number of values, without NaN, that are infinite on one side only, or with different signs."""
        return 0 if self.compared is None else self.compared.infinite

    @property
    def opaque(self) -> bool:
        """Whether the bits are not numbers."""
        return self.info.dtype.kind == "opaque" or bool(self.reason)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON data."""
        numbers = self.compared is not None
        return {
            "name": self.name,
            "status": self.status,
            "a": _side(self.a),
            "b": _side(self.b),
            "numel": self.numel,
            "changed": self.changed if numbers else None,
            "share": self.share if numbers else None,
            "max": json_number(self.max) if numbers else None,
            "relative": json_number(self.relative) if numbers else None,
            "cosine": json_number(self.cosine) if numbers else None,
            "sqnr": json_number(self.sqnr) if numbers else None,
            "nan_a": self.nan_a if numbers else None,
            "nan_b": self.nan_b if numbers else None,
            "infinite": self.infinite if numbers else None,
            "reason": self.reason or None,
        }


def _side(info: ParameterInfo | None) -> dict[str, Any] | None:
    if info is None:
        return None
    return {"name": info.name, "shape": None if info.shape is None else list(info.shape), "dtype": str(info.dtype)}


@dataclass(frozen=True, slots=True)
class GroupDiff:
    """Comparison of a group of tensors.

    Attributes:
        name: Name of the group.
        tensors: Number of tensors in A, B or both.
        differing: Number of tensors that differ, or are in one source only.
        numel: Number of compared elements.
        compared: Counts and sums over the changed tensors; norms and cosine cover these only.
        numbers: Number of compared elements that are numbers. If it is 0, there are no norms.
    """

    name: str
    tensors: int
    differing: int
    numel: int
    compared: Compared
    numbers: int

    @staticmethod
    def of(name: str, rows: Sequence[TensorDiff]) -> GroupDiff:
        """Group of the given rows."""
        from torchparams.sketch.compared import Compared

        with_numbers = [row for row in rows if row.compared is not None]
        return GroupDiff(
            name,
            len(rows),
            sum(row.status not in SAME for row in rows),
            sum(row.numel for row in with_numbers),
            Compared.total(row.compared for row in with_numbers if row.compared is not None),
            sum(row.numel for row in with_numbers if not row.opaque),
        )

    @property
    def share(self) -> float:
        """Share of changed elements, from 0 to 1."""
        return self.compared.changed / self.numel if self.numel else 0.0

    @property
    def changed(self) -> int:
        """Number of changed elements."""
        return self.compared.changed

    @property
    def max(self) -> float | int:
        """Maximum |b - a| as in `TensorDiff`; NaN if no elements are numbers, as for `relative` and `cosine`."""
        return math.nan if self._without else self.compared.greatest

    @property
    def relative(self) -> float:
        """Relative difference ‖b - a‖ / ‖a‖ in L2 over the changed tensors, as in `TensorDiff`."""
        return math.nan if self._without else self.compared.relative

    @property
    def cosine(self) -> float:
        """Cosine similarity over the changed tensors, as in `TensorDiff`; 1 if none changed."""
        if self._without:
            return math.nan
        return self.compared.cosine if self.compared.changed else 1.0

    @property
    def _without(self) -> bool:
        return bool(self.numel and not self.numbers)

    def to_json(self) -> dict[str, Any]:
        """The group as JSON data."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            "differing": self.differing,
            "numel": self.numel,
            "changed": self.compared.changed,
            "share": self.share,
            "max": None if self._without else json_number(self.compared.greatest),
            "relative": None if self._without else json_number(self.compared.relative),
            "cosine": None if self._without else json_number(self.cosine),
        }
