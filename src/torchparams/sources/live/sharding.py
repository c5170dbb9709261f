"""How a live tensor is sharded. Nothing here communicates."""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

from torchparams.info import Sharding


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor; imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharding_of(tensor: Any) -> Sharding | None:
    """The sharding of a DTensor; None for a plain tensor.

    >>> import torch
    >>> sharding_of(torch.ones(2)) is None
    True
    """
    if not is_dtensor(tensor):
        return None
    local = tensor._local_tensor
    sizes, ranks = mesh_of(tensor.device_mesh)
    placements = tuple(map(repr, tensor.placements))
    return Sharding("DTensor", placements, sizes, ranks, tuple(local.shape), local.numel() * local.element_size())


_meshes: WeakKeyDictionary[Any, tuple[tuple[int, ...], tuple[int, ...]]] = WeakKeyDictionary()


def mesh_of(mesh: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of a mesh, and its ranks in C order."""
    known = _meshes.get(mesh)
    if known is None:
        known = _meshes[mesh] = tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist())
    return known
