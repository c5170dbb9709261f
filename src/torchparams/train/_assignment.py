"""Assignment of a load: a tensor of the model and the source of its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source


@dataclass(frozen=True, slots=True)
class Assignment:
    """Tensor of the model and the source of its values.

    Attributes:
        name: Canonical name.
        target: The model's tensor.
        source: Source of the values.
        info: Info of the values in the source.
    """

    name: str
    target: torch.Tensor
    source: Source
    info: ParameterInfo
