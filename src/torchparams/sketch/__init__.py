"""Sketches: counts of bit patterns, which determine every elementwise statistic.

Both names are imported at first use, because they need NumPy; the equality test does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchparams.sketch.build import Builder as Builder
    from torchparams.sketch.sketch import Sketch as Sketch

__all__ = ["Builder", "Sketch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchparams.sketch.build import Builder
    from torchparams.sketch.sketch import Sketch

    globals().update(Builder=Builder, Sketch=Sketch)
    return globals()[name]
