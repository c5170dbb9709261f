"""Whether the kernels in C are there, and wanted; otherwise their definitions in NumPy run."""

from __future__ import annotations

import os

try:
    from torchparams.sketch import _compare, _kernels, _sums  # noqa: F401  whether there are such modules is the question

    BUILT = True
except ImportError:  # built without a compiler
    BUILT = False

WANTED = os.environ.get("TORCHPARAMS_KERNELS", "").lower()
"""The environment's word: `numpy` for the definitions."""


def uses_c() -> bool:
    """Whether the kernels in use are those in C."""
    return BUILT and WANTED != "numpy"
