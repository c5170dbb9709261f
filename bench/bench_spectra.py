"""Claim: `tp.spectra` takes half the time of `torch.linalg.svdvals` on each matrix or less; figures are within 1e-3.

    python bench/bench_spectra.py [layers of svdvals, 1 by default]

A checkpoint in bfloat16 of 24 layers of width 1,120 and 850 MB. All of it by `tp.spectra` in this process, from the
file; the matrices of the first layers by `torch.linalg.svdvals` in float32, values in memory, whose time is multiplied
by the count of layers (one layer takes as long as another). The errors are against numpy's decomposition in float64.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import torchparams as tp
from common import DATA, encoded, machine

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, WIDTH, VOCABULARY = 24, 1120, 50_000


def checkpoint() -> Path:
    """A file of the shapes of a GPT of 24 layers."""
    path = DATA / f"gpt-{LAYERS}-{WIDTH}.safetensors"
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        numbers = np.random.default_rng(0)
        shapes = {"wte.weight": (VOCABULARY, WIDTH)}
        for i in range(LAYERS):
            shapes |= {
                f"h.{i}.attn.qkv.weight": (3 * WIDTH, WIDTH),
                f"h.{i}.attn.proj.weight": (WIDTH, WIDTH),
                f"h.{i}.mlp.fc.weight": (4 * WIDTH, WIDTH),
                f"h.{i}.mlp.proj.weight": (WIDTH, 4 * WIDTH),
            }
        tensors = {}
        for name, shape in shapes.items():
            values = 0.02 * numbers.standard_normal(shape, dtype=np.float32)
            data = bytearray(encoded(values, "bfloat16"))
            tensors[name] = torch.frombuffer(data, dtype=torch.bfloat16).reshape(shape)
        save_file(tensors, path)
    return path


def main(layers: int) -> None:
    print(machine())
    path = checkpoint()
    begun = time.perf_counter()
    found = tp.spectra(path, "h.**")
    ours = time.perf_counter() - begun
    print(f"tp.spectra, {len(found)} matrices of {path.stat().st_size / 1e6:,.0f} MB: {ours:.1f} s")
    begun = time.perf_counter()
    with safe_open(path, "pt") as file:
        names = [row.name for row in found if int(row.name.split(".")[1]) < layers]
        for name in names:
            torch.linalg.svdvals(file.get_tensor(name).float())
        theirs = (time.perf_counter() - begun) * LAYERS / layers
        print(f"torch.linalg.svdvals, from {layers} of {LAYERS} layers: {theirs:.1f} s   {theirs / ours:.1f} ×")
        worst = 0.0
        for name in names:
            exact = np.linalg.svd(file.get_tensor(name).double().numpy(), compute_uv=False)
            row = found[name]
            figures = {
                "spectral_norm": exact[0],
                "nuclear_norm": exact.sum(),
                "stable_rank": np.square(exact).sum() / exact[0] ** 2,
                "condition": exact[0] / exact[-1],
            }
            worst = max(worst, *(abs(getattr(row, key) / value - 1) for key, value in figures.items()))
            worst = max(worst, float(np.abs(np.array(row.singular_values) / exact - 1).max()))
    print(f"greatest relative error of a figure: {worst:.1e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
