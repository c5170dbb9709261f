"""Claim: an audit of 50,000 parameters takes less than half a second, and one of large tensors what reading them takes.

    python bench/bench_audit.py [MiB]

Many small tensors are a mixture of experts of 49,752 parameters in 83,000 modules, alone and with an optimizer and
gradients. Few large ones are 24 matrices of float32 and of bfloat16, 1,024 MiB in all unless told otherwise; beside the
audit stand `torch.aminmax` of each, which is as fast as torch reads them, and what one would write by hand to see
whether all is finite: `torch.isfinite(tensor).all()`. Shown are medians of runs by turns.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import torchparams as tp
from bench_module import medians, mixture

if TYPE_CHECKING:
    from collections.abc import Callable

MATRICES = 24


def many() -> dict[str, Callable[[], Any]]:
    """Uses of a network of very many small tensors."""
    model = mixture(16_600, "cpu")
    decay = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(decay)
    return {
        "list(model.named_parameters())": lambda: list(model.named_parameters()),
        "tp.audit(model)": lambda: tp.audit(model),
        "tp.audit(model, optimizer)": lambda: tp.audit(model, optimizer),
        "tp.audit(model, select='M1,M2')": lambda: tp.audit(model, select="M1,M2"),
        "tp.audit(model, select='M3')": lambda: tp.audit(model, select="M3"),
    }


def large(megabytes: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Uses of a network of few large tensors."""
    side = int((megabytes * 2**20 / MATRICES / dtype.itemsize) ** 0.5)
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(side, side).to(dtype)) for _ in range(MATRICES)])
    tensors = [tensor.detach() for tensor in model.parameters()]
    return {
        "torch.isfinite(t).all()": lambda: [torch.isfinite(t).all().item() for t in tensors],
        "torch.aminmax(t)": lambda: [torch.aminmax(t) for t in tensors],
        "tp.audit(model)": lambda: tp.audit(model),
    }


def main(megabytes: int) -> None:
    print("49,752 parameters in 83,000 modules")
    for name, seconds in medians(many()).items():
        print(f"  {name:34} {seconds * 1000:8.0f} ms")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{MATRICES} matrices, {megabytes} MiB of {dtype}")
        for name, seconds in medians(large(megabytes, dtype)).items():
            print(f"  {name:34} {seconds * 1000:8.0f} ms {megabytes / 1024 / seconds:8.2f} GiB/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)
