"""Claims: 50,000 DCP chunks are listed in ≤ 2 unpicklings of .metadata, 800 MB joined ≥ 3 times faster.

Joining is held against dcp_to_torch_save and save_file; it takes < 300 MB and ≤ 1.5 times cp with sync.

    python bench/bench_dcp.py [ROUNDS]

The first is measured in one process that has torch loaded, by turns, in processor time; and as a whole command. The
second are whole processes, run by turns. Of the 50,000 chunks only `.metadata` is written: the files are holes.
"""

from __future__ import annotations

import os
import pickle
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import DATA, llama_shapes, machine, paired, print_pairs, process, torchparams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RANKS, SIZE = 4, 800
TENSORS, CHUNKS, CHUNK_BYTES = 625, 80, 5293
NAIVE = """
import sys, torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2] + ".pt")
save_file(torch.load(sys.argv[2] + ".pt", mmap=True, weights_only=True)["model"], sys.argv[2])
"""


def many_chunks(folder: Path) -> None:
    """A directory of 625 tensors in 80 chunks of rows each."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors, places, paths = {}, {}, {}
    for number in range(TENSORS):
        name = f"model.layers.{number}.attention.wq.weight"
        chunks = []
        for chunk in range(CHUNKS):
            offsets = torch.Size([chunk * 16, 0])
            chunks.append(ChunkStorageMetadata(offsets, torch.Size([16, 64])))
            places[MetadataIndex(name, offsets, chunk)] = _StorageInfo(
                f"__{chunk}_0.distcp", number * CHUNK_BYTES, CHUNK_BYTES
            )
        tensors[name] = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([16 * CHUNKS, 64]), chunks)
        paths[name] = ("model", name.removeprefix("model."))
    folder.mkdir()
    described = Metadata(tensors, paths, places, StorageMeta(checkpoint_id=str(folder)), "1.0.0")  # type: ignore[arg-type]
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    for chunk in range(CHUNKS):
        (folder / f"__{chunk}_0.distcp").touch()
        os.truncate(folder / f"__{chunk}_0.distcp", TENSORS * CHUNK_BYTES)


def of_ranks(folder: Path) -> None:
    """A checkpoint of a Llama model's shapes in bfloat16, rows of which each rank has a part."""
    import torch
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    save: Any = checkpoint
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child:
            children.append(child)
            continue
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}-store", rank=rank, world_size=RANKS)
        mesh = init_device_mesh("cpu", (RANKS,))
        made = torch.Generator().manual_seed(rank)
        state = {}
        for name, shape in llama_shapes(SIZE * 1e6 / 2).items():
            local = torch.randn(shape[0] // RANKS, *shape[1:], generator=made).mul_(0.02).bfloat16()
            state[name] = DTensor.from_local(local, mesh, [Shard(0)])
        save.save({"model": state}, checkpoint_id=folder)
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a rank failed")
    Path(f"{folder}-store").unlink()


def listing(folder: Path, rounds: int) -> None:
    """Unpickle `.metadata`, and list the directory, by turns."""
    import torch.distributed.checkpoint.filesystem  # noqa: F401  # what unpickling imports

    import torchparams as tp

    data = (folder / ".metadata").read_bytes()
    tp.of(folder).source.infos()
    times: dict[str, list[float]] = {"unpickling .metadata, torch loaded": [], "listing": []}
    for _ in range(rounds):
        for name, work in (
            ("unpickling .metadata, torch loaded", lambda: pickle.loads(data)),
            ("listing", lambda: tp.of(folder).source.infos()),
        ):
            begun = time.process_time()
            found = work()
            times[name].append(time.process_time() - begun)
            del found
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:<36} {median:6.2f} s")
    print(f"{'listing, in unpicklings':<36} {medians['listing'] / medians['unpickling .metadata, torch loaded']:6.2f}")


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    DATA.mkdir(exist_ok=True)
    print(machine())
    with tempfile.TemporaryDirectory(dir=DATA) as home:
        here = Path(home)
        many_chunks(here / "many")
        print(f"{TENSORS * CHUNKS:,} chunks:")
        listing(here / "many", rounds)
        of_ranks(here / "ranks")

        def fresh(argv: Sequence[str | Path], out: Path) -> Callable[[], tuple[float, int]]:
            def run() -> tuple[float, int]:
                for path in (out, Path(f"{out}.pt")):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                process(["sync"])  # nobody pays for what the one before has left to be written
                return process(argv)

            return run

        source, copy = here / "ranks", here / "copy"
        out, naive = here / "out.safetensors", here / "naive.safetensors"
        results = paired(
            {
                "ls of 50,000 chunks": lambda: process(torchparams("ls", here / "many")),
                "cp, sync": fresh(["sh", "-c", f"cp -r '{source}' '{copy}' && sync '{copy}'/*"], copy),
                "DCP → .safetensors": fresh(torchparams("convert", f"{source}#model", out), out),
                "dcp_to_torch_save, save_file": fresh([sys.executable, "-c", NAIVE, source, naive], naive),
            },
            rounds,
        )
        print_pairs(results, "cp, sync")


if __name__ == "__main__":
    main()
