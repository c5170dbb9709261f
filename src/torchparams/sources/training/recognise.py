"""Which training checkpoint a directory is, by the names in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchparams.sources.base import Source


def training_directory(path: str, there: Sequence[str], inner: str | None) -> Source | None:
    """The source that reads a directory which a training run wrote in parts; None where it is no such one.

    Args:
        path: The directory.
        there: The names in it.
        inner: The text after `#`.
    """
    if ".metadata" in there:
        from torchparams.sources.training.dcp import open_dcp

        return open_dcp(path, inner)
    if any(name.startswith("shard-") for name in there):
        from torchparams.sources.training.dcp_safetensors import open_shards, shards_among

        shards = shards_among(there)
        if shards:
            return open_shards(path, shards, inner)
    if any("_world_size_" in name for name in there):
        from torchparams.sources.training.ranks import open_ranks, ranks_among

        ranks = ranks_among(there)
        if ranks:
            return open_ranks(path, ranks, inner)
    return None
