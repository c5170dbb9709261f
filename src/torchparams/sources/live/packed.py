"""Layers of `torch.ao.quantization`: their weights are packed in compiled objects, and are no parameters.

The weight is a quantised tensor, the bias a plain one. What is read is what torch's own layers give: `_weight_bias`.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_CLASSES = {
    "torch.ao.nn.quantized": ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    "torch.ao.nn.quantized.dynamic": ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    "torch.ao.nn.intrinsic.quantized": (
        "LinearReLU", "LinearLeakyReLU", "LinearTanh", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "ConvAdd2d",
        "ConvAddReLU2d",
    ),
    "torch.ao.nn.intrinsic.quantized.dynamic": ("LinearReLU",),
}  # fmt: skip
"""Home → the layers there that are understood: torch's own, and no subclass of another's."""

_DYNAMIC = ("torch.ao.nn.quantized.dynamic.", "torch.ao.nn.intrinsic.quantized.dynamic.")


@lru_cache(maxsize=1)
def packed_classes() -> frozenset[type]:
    """The classes of the layers with packed weights; `import torch` has imported them."""
    found = ((sys.modules.get(home), names) for home, names in _CLASSES.items())
    return frozenset(
        cls for module, names in found for name in names if (cls := getattr(module, name, None)) is not None
    )


def unpacked(layer: nn.Module) -> dict[str, Any]:
    """The weight and the bias of a layer with packed weights; they share the memory where torch keeps them plain.

    Args:
        layer: A layer of one of `packed_classes`.
    """
    torchs: Any = layer
    weight, bias = torchs._weight_bias()
    return {"weight": weight.detach()} | ({} if bias is None else {"bias": bias.detach()})


def keeps_output_scale(layer: nn.Module) -> bool:
    """Whether a layer keeps the scale and the zero point of its output too, as those for static quantisation do."""
    cls = type(layer)
    return not f"{cls.__module__}.".startswith(_DYNAMIC)
