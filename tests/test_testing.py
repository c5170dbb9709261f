from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torchparams.sources.base import Source
from torchparams.testing import Array, MemorySource, SourceTests


class TestMemory(SourceTests):
    ties = metadata = True
    device = "cpu"

    def make(self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Source:
        return MemorySource(tensors, metadata)
