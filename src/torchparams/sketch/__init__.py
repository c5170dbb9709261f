"""The sketch: counts of bit patterns, from which everything elementwise follows."""

from torchparams.sketch.build import Builder as Builder
from torchparams.sketch.sketch import Sketch as Sketch

__all__ = ["Builder", "Sketch"]
