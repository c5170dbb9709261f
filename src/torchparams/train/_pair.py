"""What a load moves: a tensor of the model, with the tensor of a source that its values come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the model, and where its values come from.

    Attributes:
        name: Its canonical name.
        target: The tensor itself.
        source: What holds the values.
        info: Their record there.
    """

    name: str
    target: torch.Tensor
    source: Source
    info: ParameterInfo
