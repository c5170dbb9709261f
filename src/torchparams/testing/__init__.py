"""Conformance test suites for new sources and engines, and their references.

Only this package imports pytest. Tests of a source subclass `SourceTests`, declare what the source supports, and write
one method that makes a source from arrays. The suite then tests the whole contract of
`torchparams.sources.base.Source`.
"""

from __future__ import annotations

import pytest

# Must precede the import, so that failing assertions in the suites show their values.
_PARTS = ("_engines", "_files", "_inputs", "_reference", "_sources")
pytest.register_assert_rewrite(*(f"torchparams.testing.{part}" for part in _PARTS))

from torchparams.testing._engines import EngineTests  # noqa: E402  # as above
from torchparams.testing._reference import (  # noqa: E402  # as above
    NUMPY_DTYPES,
    SAFETENSORS_DTYPES,
    TORCH_DTYPES,
    Array,
    MemorySource,
    assert_identical,
    element_bytes,
    safetensors_bytes,
    sample,
    tensor_bytes,
    to_torch,
)
from torchparams.testing._sources import SourceTests  # noqa: E402  # as above

__all__ = [
    "NUMPY_DTYPES",
    "SAFETENSORS_DTYPES",
    "TORCH_DTYPES",
    "Array",
    "EngineTests",
    "MemorySource",
    "SourceTests",
    "assert_identical",
    "element_bytes",
    "safetensors_bytes",
    "sample",
    "tensor_bytes",
    "to_torch",
]
