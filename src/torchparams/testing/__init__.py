"""Conformance suites for those who add a source or an engine, and the references they are held against.

This is the one part that imports pytest. A source's tests subclass `SourceTests`, say in data what the source can
hold, and write one method that makes a source from arrays; everything that `torchparams.sources.base.Source` promises
is then tested.
"""

from __future__ import annotations

import pytest

# Before the import: an assertion that fails in a suite then shows its values, as one in a test does.
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
