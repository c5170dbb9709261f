"""Tensors of a file that are not read yet: on the meta device, with the row that has their values.

So the state of a sharded optimizer is matched by names and shapes, and a rank then reads its own parts alone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from torchparams.expressions.base import Expression
    from torchparams.sources.base import Source

_ROW = "_torchparams_row"  # attribute of a placeholder: the source and the name


def placeholder(source: Source, name: str) -> torch.Tensor:
    """A tensor to read later; scalars, and dtypes that torch lacks, are read at once.

    Args:
        source: The file.
        name: Name of the tensor in it.
    """
    import torch

    info = source.infos()[name]
    if not info.shape or info.dtype.torch_name is None:
        return source.tensor(name)
    made = torch.empty(info.shape, dtype=info.dtype.torch, device="meta")
    setattr(made, _ROW, (source, name))
    return made


def row_of(tensor: torch.Tensor) -> Expression | None:
    """The row of a placeholder; None for any other tensor."""
    found = getattr(tensor, _ROW, None)
    return None if found is None else found[0].row(found[1])


def copied(value: Any) -> Any:
    """Deep copy of a value, so that two optimizers never share state; placeholders are read."""
    import torch

    if isinstance(value, torch.Tensor):
        found = getattr(value, _ROW, None)
        return value.detach().clone() if found is None else found[0].tensor(found[1])
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    if isinstance(value, tuple):
        items = [copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return copy.deepcopy(value)
