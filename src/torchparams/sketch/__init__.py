"""The sketch: counts of bit patterns, from which everything elementwise follows.

Its two names come with their first use: whether two tensors are equal is told without numpy, which they need.
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
