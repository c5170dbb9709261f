"""Availability of the C kernels; without them, the NumPy definitions run."""

from __future__ import annotations

import os

try:
    from torchparams.sketch import _compare, _kernels, _sums  # noqa: F401  whether there are such modules is the question

    BUILT = True
except ImportError:  # built without a compiler
    BUILT = False

WANTED = os.environ.get("TORCHPARAMS_KERNELS", "").lower()
"""Value of the environment variable TORCHPARAMS_KERNELS; `numpy` selects the definitions."""


def uses_c() -> bool:
    """Whether the C kernels are in use."""
    return BUILT and WANTED != "numpy"
