from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.testing import Array, MemorySource, SourceTests

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class TestMemory(SourceTests):
    ties = metadata = True
    device = "cpu"

    def make(
        self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
    ) -> MemorySource:
        return MemorySource(tensors, metadata)
