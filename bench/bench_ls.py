"""Claim: `torchparams ls` of 220 tensors takes at most 1.5 times a process that prints them with safetensors' own API.

    python bench/bench_ls.py

Whole processes by turns, medians. The file has the names and shapes of a Llama model of 24 layers, of width 8.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import machine, paired, print_pairs, process, torchparams
from torchparams.testing import safetensors_bytes, sample

THEIRS = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "np") as file:
    for name in file.keys():
        part = file.get_slice(name)
        print(name, part.get_shape(), part.get_dtype())
"""
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main(rounds: int = 21) -> None:
    state = {f"model.layers.{i}.{part}.weight": sample("float16", (8, 8)) for i in range(24) for part in PARTS}
    for i in range(24):
        for part in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{part}.weight"] = sample("float16", (8,))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.bias"):
        state[name] = sample("float16", (8, 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(safetensors_bytes(state))
        theirs = [sys.executable, "-c", THEIRS, str(path)]
        results = paired(
            {
                "safe_open, names, shapes and dtypes": lambda: process(theirs),
                "torchparams ls": lambda: process(torchparams("ls", path)),
                "torchparams ls --tree": lambda: process(torchparams("ls", path, "--tree")),
                "torchparams ls --json": lambda: process(torchparams("ls", path, "--json")),
                "torchparams ls -s '**.q_proj.*'": lambda: process(torchparams("ls", path, "-s", "**.q_proj.*")),
                "import torch": lambda: process([sys.executable, "-c", "import torch"]),
            },
            rounds,
        )
    print(f"{len(state)} tensors, {rounds} rounds, {machine()}")
    print_pairs(results, "safe_open, names, shapes and dtypes")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
