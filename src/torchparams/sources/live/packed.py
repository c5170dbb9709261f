"""Layers of `torch.ao.quantization`, whose weights are packed in compiled objects and are not parameters.

The weight is a quantised tensor, the bias a plain one. Both are read with methods of torch's own layers:
`_weight_bias`, and `weight` of embeddings.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_CLASSES = {
    "torch.ao.nn.quantized": ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "EmbeddingBag"),
    "torch.ao.nn.quantized.dynamic": ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    "torch.ao.nn.intrinsic.quantized": (
        "LinearReLU", "LinearLeakyReLU", "LinearTanh", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "ConvAdd2d",
        "ConvAddReLU2d",
    ),
    "torch.ao.nn.intrinsic.quantized.dynamic": ("LinearReLU",),
}  # fmt: skip
"""Module → supported layers in it: only torch's own classes, no subclasses."""

_EMBEDDINGS = ("Embedding", "EmbeddingBag")

_DYNAMIC = ("torch.ao.nn.quantized.dynamic.", "torch.ao.nn.intrinsic.quantized.dynamic.")


@lru_cache(maxsize=1)
def packed_classes() -> frozenset[type]:
    """The classes of layers with packed weights; `import torch` has imported them."""
    found = ((sys.modules.get(home), names) for home, names in _CLASSES.items())
    return frozenset(
        cls for module, names in found for name in names if (cls := getattr(module, name, None)) is not None
    )


def unpacked(layer: nn.Module) -> dict[str, Any]:
    """Weight and bias of a layer with packed weights; they share memory if torch keeps them unpacked.

    Args:
        layer: Layer of one of `packed_classes`.
    """
    torchs: Any = layer
    if type(layer).__name__ in _EMBEDDINGS:
        return {"weight": torchs.weight().detach()}
    weight, bias = torchs._weight_bias()
    return {"weight": weight.detach()} | ({} if bias is None else {"bias": bias.detach()})


def keeps_output_scale(layer: nn.Module) -> bool:
    """Whether a layer also keeps the scale and zero point of its output, as in static quantisation."""
    cls = type(layer)
    return not f"{cls.__module__}.".startswith(_DYNAMIC) and cls.__name__ not in _EMBEDDINGS
