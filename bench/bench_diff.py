"""Claim: `torchparams diff` is 8 × as fast as weightscope in a tenth of its memory; of equal files, as fast as cmp.

    python bench/bench_diff.py [rounds, 5 by default]

Whole processes, from start to end, page cache warm, on two files of a model in bfloat16 and of 750 MB: of the same
shapes and other values, and of the same bytes. weightscope (installed in an environment of its own) takes of each
tensor the share of elements that differ by more than a threshold; `torchparams diff` takes that of the bits, the
greatest difference, the relative L2 norm and the cosine. `cmp` says whether two files are equal.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING

from common import DATA, llama_file, machine, paired, peer, print_pairs, process, torchparams

if TYPE_CHECKING:
    from pathlib import Path


def weightscope() -> str:
    """The command of weightscope."""
    return peer("WEIGHTSCOPE", "weightscope", "weightscope==0.4.3")


def folder_of(file: Path) -> Path:
    """A directory with this file alone, as weightscope takes it."""
    folder = file.with_suffix("")
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        os.link(file, folder / "model.safetensors")
    return folder


def copy_of(file: Path) -> Path:
    """Another file of the same bytes."""
    copy = DATA / f"copy-of-{file.name}"
    if not copy.exists():
        shutil.copyfile(file, copy)
    return copy


def main(rounds: int) -> None:
    print(machine())
    a, b = llama_file("bfloat16", 750, seed=0), llama_file("bfloat16", 750, seed=1)
    print(f"\ntwo files of {a.stat().st_size / 1e6:,.0f} MB, other values")
    other = [weightscope(), "diff", str(folder_of(a)), str(folder_of(b))]
    results = paired(
        {
            "torchparams diff": partial(process, torchparams("diff", a, b), status=1),
            "weightscope diff": partial(process, other),
        },
        rounds,
    )
    print_pairs(results, "torchparams diff")

    same = copy_of(a)
    print("\ntwo files of the same bytes")
    results = paired(
        {
            "torchparams diff": partial(process, torchparams("diff", a, same)),
            "cmp": partial(process, ["cmp", a, same]),
            "torchparams --version": partial(process, torchparams("--version")),
        },
        rounds,
    )
    print_pairs(results, "torchparams diff")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
