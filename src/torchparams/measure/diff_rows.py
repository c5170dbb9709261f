"""What is said of one tensor of two sources, and of several together."""

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
"""What can be said of a tensor: see `TensorDiff.status`."""

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
"""Attributes of `TensorDiff` → their types, for tables handed to other libraries."""

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
"""Attributes of `GroupDiff` → their types, likewise."""


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """A tensor of A, of B, or of both, and how the one in B differs from the one in A.

    Numbers are NaN where nothing was compared, and where the bits are not numbers (quantised types, and codes whose
    scales stand beside them).

    Attributes:
        name: What A calls it; of a tensor of B alone, its name there once that is renamed.
        status: `identical`, bit for bit; `equal` in value (only with `numeric`); `changed`; `shape` or `dtype` where
            these differ, so that no element was compared; `only_a`, `only_b`; `unread` where the values cannot be had.
        a: Its record in A, None where it is not there.
        b: Its record in B.
        compared: What was counted and summed up; of what is the same, nothing.
        reason: Why it is unread, or why its bits are not numbers.
    """

    name: str
    status: str
    a: ParameterInfo | None
    b: ParameterInfo | None
    compared: Compared | None = None
    reason: str = ""

    def of_codes(self, reason: str) -> TensorDiff:
        """The same of tensors whose elements are no numbers: the count of those that changed, and nothing else."""
        from torchparams.sketch.compared import Compared

        compared = None if self.compared is None else Compared(changed=self.compared.changed)
        return replace(self, compared=compared, reason=self.reason or reason)

    @property
    def info(self) -> ParameterInfo:
        """The record in A, or in B where it is only there."""
        found = self.a or self.b
        assert found is not None
        return found

    @property
    def numel(self) -> int:
        """Count of elements."""
        return self.info.numel

    @property
    def changed(self) -> int:
        """Elements that changed."""
        return 0 if self.compared is None else self.compared.changed

    @property
    def share(self) -> float:
        """Share of the elements that changed, from 0 to 1."""
        if self.compared is None:
            return math.nan
        return self.compared.changed / self.numel if self.numel else 0.0

    @property
    def max(self) -> float | int:
        """Greatest |b - a|; NaN where a NaN came or went, else infinite where an infinity came, went or turned."""
        return math.nan if self.compared is None or self.opaque else self.compared.greatest

    @property
    def relative(self) -> float:
        """‖b - a‖ / ‖a‖ in L2; NaN or infinite where `max` is so. Values that are finite in neither are left out."""
        return math.nan if self.compared is None or self.opaque else self.compared.relative

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 1 where nothing changed.

        NaN where one is all zeros, and where a NaN or an infinity came, went or turned. Values that are finite in
        neither are left out.
        """
        if self.compared is None or self.opaque:
            return math.nan
        return self.compared.cosine if self.compared.changed else 1.0

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB, 20·log₁₀(‖a‖ / ‖b - a‖), of B as A quantised; infinite where the two agree."""
        relative = self.relative
        return math.inf if relative == 0 else -math.inf if relative == math.inf else -20 * math.log10(relative)

    @property
    def nan_a(self) -> int:
        """Values that are NaN in A only."""
        return 0 if self.compared is None else self.compared.nan_a

    @property
    def nan_b(self) -> int:
        """Values that are NaN in B only."""
        return 0 if self.compared is None else self.compared.nan_b

    @property
    def infinite(self) -> int:
        """Values that are infinite in one only, or of the other sign, and NaN in none."""
        return 0 if self.compared is None else self.compared.infinite

    @property
    def opaque(self) -> bool:
        """Whether the bits are not numbers."""
        return self.info.dtype.kind == "opaque" or bool(self.reason)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON takes it."""
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
    """Several tensors together.

    Attributes:
        name: What the group is called.
        tensors: How many tensors there are, in A, in B, or in both.
        differing: How many of them are not the same in both.
        numel: Elements that were compared.
        compared: What was counted and summed up of the tensors that changed: norms and cosine are of these.
        numbers: Elements that were compared and are numbers: without any, there are no norms.
    """

    name: str
    tensors: int
    differing: int
    numel: int
    compared: Compared
    numbers: int

    @staticmethod
    def of(name: str, rows: Sequence[TensorDiff]) -> GroupDiff:
        """The group of some tensors."""
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
        """Share of the elements that changed, from 0 to 1."""
        return self.compared.changed / self.numel if self.numel else 0.0

    @property
    def changed(self) -> int:
        """Elements that changed."""
        return self.compared.changed

    @property
    def max(self) -> float | int:
        """Greatest |b - a|, as in `TensorDiff`; NaN where no elements are numbers, as for `relative` and `cosine`."""
        return math.nan if self._without else self.compared.greatest

    @property
    def relative(self) -> float:
        """‖b - a‖ / ‖a‖ in L2, of the tensors that changed, as in `TensorDiff`."""
        return math.nan if self._without else self.compared.relative

    @property
    def cosine(self) -> float:
        """Cosine of the angle between A and B, of the tensors that changed, as in `TensorDiff`; 1 where none did."""
        if self._without:
            return math.nan
        return self.compared.cosine if self.compared.changed else 1.0

    @property
    def _without(self) -> bool:
        return bool(self.numel and not self.numbers)

    def to_json(self) -> dict[str, Any]:
        """The group as JSON takes it."""
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
