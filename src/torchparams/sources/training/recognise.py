"""Recognition of training checkpoints in directories by their file names.

A directory stands for its weights. Other parts that a trainer saves follow `#`: `DIR#optimizer`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torchparams.io.paths import join
from torchparams.sources.opening import format_of, open_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchparams.sources.base import Source

_META = "meta.pt"  # beside `.metadata`: Lightning keeps the state of its trainer there
_FSDP_MODEL = r"pytorch_model_fsdp_\d+"  # accelerate's folders, each a distributed checkpoint
_FSDP_OPTIMIZER = r"optimizer_\d+"
_BESIDE = (".pt", ".bin", ".pth", ".ckpt", ".safetensors")


def training_directory(
    path: str, there: Mapping[str, bool], weights: Sequence[str], inner: str | None
) -> Source | None:
    """Open a directory that a training run wrote; None if its weights are files that can be opened directly.

    Args:
        path: The directory.
        there: Names in the directory, and whether each is a directory.
        weights: Names of files that may contain a whole model.
        inner: Text after `#`.
    """
    if ".metadata" in there:
        return _dcp(path, there, inner)
    if any(name.startswith("shard-") for name in there):
        from torchparams.sources.training.dcp_safetensors import open_shards, shards_among

        shards = shards_among(list(there))
        if shards:
            return open_shards(path, shards, inner)
    if any("_world_size_" in name for name in there):
        from torchparams.sources.training.ranks import open_ranks, ranks_among

        ranks = ranks_among(list(there))
        if ranks:
            return open_ranks(path, ranks, inner)
    weights = [name for name in weights if "mp_rank_" not in name]  # DeepSpeed's are parts
    head, _, rest = (inner or "").partition(".")
    beside = next((f"{head}{suffix}" for suffix in _BESIDE if f"{head}{suffix}" in there), None) if head else None
    if beside is not None and beside not in weights:
        return _file_beside(join(path, beside), rest or None)
    folders = [name for name, is_folder in there.items() if is_folder]
    if head == "optimizer":
        of_accelerate = sorted(name for name in folders if re.fullmatch(_FSDP_OPTIMIZER, name))
        if of_accelerate:
            return _accelerate(path, of_accelerate[0], "optimizer", rest, f"{path}#{inner}")
    if weights and head != "optimizer":
        return None
    of_accelerate = sorted(name for name in folders if re.fullmatch(_FSDP_MODEL, name))
    if of_accelerate and not weights:
        return _accelerate(path, of_accelerate[0], "model", inner or "", f"{path}#{inner}" if inner else path)
    return _zero(path, there, inner)


def _dcp(path: str, there: Mapping[str, bool], inner: str | None) -> Source:
    from torchparams.sources.training.dcp import open_dcp

    if _META in there:
        if inner == "meta":
            return _file_beside(join(path, _META), None)
        if inner is None:
            return open_dcp(path, "model", path)
    return open_dcp(path, inner)


def _accelerate(path: str, folder: str, part: str, inner: str, label: str) -> Source:
    """Open a distributed checkpoint that accelerate keeps in a subfolder, under its own name."""
    from torchparams.sources.training.dcp import open_dcp

    return open_dcp(join(path, folder), f"{part}.{inner}" if inner else part, label)


def _zero(path: str, there: Mapping[str, bool], inner: str | None) -> Source | None:
    if there.get("latest") is not False and not any("zero_pp_rank_" in name for name in there):
        return None
    from torchparams.sources.training._zero_files import folder_of
    from torchparams.sources.training.zero import open_zero

    folder = folder_of(path, there)
    return None if folder is None else open_zero(path, folder, inner)


def _file_beside(path: str, inner: str | None) -> Source:
    """Open a file beside the weights, which may contain no tensors: a scheduler, random states."""
    from torchparams.sources.torchfile.torchzip import open_torch_zip

    if format_of(path).name == "torch zip":
        return open_torch_zip(path, inner, tensorless=True)
    return open_file(path, inner)
