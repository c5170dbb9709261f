"""Infos without a source, for tests of code that needs only infos."""

from __future__ import annotations

import math

from torchparams.dtypes import DType
from torchparams.info import ParameterInfo

MODULE = "torch.nn.modules.module.Module"
LINEAR = "torch.nn.modules.linear.Linear"
NORM = "torch.nn.modules.normalization.LayerNorm"
EMBEDDING = "torch.nn.modules.sparse.Embedding"


def live(
    name: str,
    shape: tuple[int, ...] | None = (4,),
    *,
    kind: str = "parameter",
    requires_grad: bool = True,
    module: str = LINEAR,
    bases: tuple[str, ...] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    raw: str = "",
    aliases: tuple[str, ...] = (),
) -> ParameterInfo:
    """A parameter of a live model."""
    numel = 0 if shape is None else math.prod(shape)
    kept = DType.of(dtype)
    chain = (module, MODULE) if bases is None else bases
    return ParameterInfo(
        name, shape, kept, numel, kept.nbytes(numel), device, kind, requires_grad, module, raw, aliases, bases=chain
    )


def stored(name: str, shape: tuple[int, ...] = (4,), dtype: str = "float32") -> ParameterInfo:
    """A tensor of a checkpoint."""
    kept = DType.of(dtype)
    numel = math.prod(shape)
    return ParameterInfo(name, shape, kept, numel, kept.nbytes(numel), "file", "tensor")


def transformer(layers: int = 3) -> list[ParameterInfo]:
    """A small encoder with a head, and a frozen head of a decoder whose name ends in `head`, too."""
    infos = [live("embeddings.word.weight", (100, 16), module=EMBEDDING, aliases=("lm_head.weight",))]
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        for name in "qkv":
            infos.append(live(f"{at}.attn.{name}_proj.weight", (16, 16)))
            infos.append(live(f"{at}.attn.{name}_proj.bias", (16,)))
        infos.append(live(f"{at}.norm.weight", (16,), module=NORM))
        infos.append(live(f"{at}.norm.bias", (16,), module=NORM))
    infos.append(live("head.weight", (2, 16)))
    infos.append(live("head.bias", (2,)))
    infos.append(live("decode_head.weight", (2, 16), requires_grad=False))
    return infos
