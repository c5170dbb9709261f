"""Claim: .pt → .safetensors, sharding and joining 750 MB go at ≥ 0.8 of the speed of cp with sync, in < 120 MB.

    python bench/bench_convert.py [ROUNDS]

All are whole processes, run by turns; times are medians, memory the most that any ever held. What torchparams writes
is on the disk when it ends (fsync). What cp writes is in the cache of the system, and on the disk some time later: so
there is a row for cp with a sync of its file, and one for torchparams without fsync (a run that it does not offer), to
be held against cp alone. The start of a process is that of `torchparams ls` on a file of one tensor.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common import DATA, llama_file, machine, paired, print_pairs, process, torchparams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZE = 750
NO_SYNC = """
import sys
from torchparams.io import system as _system
_system.sync = _system.sync_directory = lambda *_: None
_system.begin_writeback = lambda *_: None
from torchparams.cli.app import run
sys.exit(run(sys.argv[1:]))
"""
NAIVE = """
import sys, torch
from safetensors.torch import save_file
save_file(torch.load(sys.argv[1], mmap=True, weights_only=True), sys.argv[2])
"""


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    source, same = llama_file(megabytes=SIZE, suffix=".pt"), llama_file(megabytes=SIZE)
    with tempfile.TemporaryDirectory(dir=DATA) as folder:
        here = Path(folder)
        shards = here / "shards"
        process(torchparams("convert", same, shards, "--max-shard-size", "200MB"))
        tiny = here / "tiny.safetensors"
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        tiny.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

        def fresh(argv: Sequence[str | Path], out: Path) -> Callable[[], tuple[float, int]]:
            def run() -> tuple[float, int]:
                shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
                process(["sync"])  # nobody pays for what the one before has left to be written
                return process(argv)

            return run

        copy, out, many, joined = here / "cp.pt", here / "out.safetensors", here / "many", here / "joined.safetensors"
        results = paired(
            {
                "process start (ls of one tensor)": lambda: process(torchparams("ls", tiny)),
                "cp": fresh(["cp", source, copy], copy),
                "cp, sync": fresh(["sh", "-c", f"cp '{source}' '{copy}' && sync '{copy}'"], copy),
                ".pt → .safetensors": fresh(torchparams("convert", source, out), out),
                ".pt → .safetensors, without fsync": fresh(
                    [sys.executable, "-c", NO_SYNC, "convert", source, out], out
                ),
                ".safetensors → shards of 200 MB": fresh(
                    torchparams("convert", same, many, "--max-shard-size", "200MB"), many
                ),
                "shards → .safetensors": fresh(torchparams("convert", shards, joined), joined),
                ".safetensors → .pt (with CRC-32)": fresh(torchparams("convert", same, here / "o.pt"), here / "o.pt"),
                "bfloat16 → float16, losses counted": fresh(
                    torchparams("convert", same, here / "h.safetensors", "--dtype", "f16"), here / "h.safetensors"
                ),
                "save_file(torch.load(mmap=True))": fresh(
                    [sys.executable, "-c", NAIVE, source, here / "naive.safetensors"], here / "naive.safetensors"
                ),
            },
            rounds,
        )
    print(f"{source.stat().st_size / 1e6:.0f} MB, {rounds} rounds, {machine()}")
    print_pairs(results, "cp, sync")
    start = results["process start (ls of one tensor)"][0]
    for base, row in (
        ("cp, sync", ".pt → .safetensors"),
        ("cp", ".pt → .safetensors, without fsync"),
        ("cp", ".pt → .safetensors"),
    ):
        ratio = results[base][0] / max(results[row][0] - start, 1e-9)
        print(f"{row}: {ratio:.2f} of the speed of {base}, the start of the process apart")


if __name__ == "__main__":
    main()
