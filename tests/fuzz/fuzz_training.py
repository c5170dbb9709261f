"""Mutated training checkpoints: none may crash, hang, run anything, or make the reader allocate without bound.

    python tests/fuzz/fuzz_training.py [inputs for each reader]

A mutation is of bytes, anywhere in a file, or of what a pickle says: a number, a text or a key of it is exchanged for
another. What a reader takes is listed, and read whole.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import checkpoint

import torchparams as tp
from fuzz.watching import draws, quiet_folder, watched
from torchparams.errors import TorchParamsError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

SLACK = 8 << 20
"""Bytes that listing and reading any of these small directories may take, beside 200 for each of theirs."""

ODD: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 7, 255, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**40, 0.5, float("nan"), None, True, "", "..", "w",
    "../x", "/etc/passwd", "a" * 5000, b"\xff", [], {}, (), (1, 2), [0] * 70, {"w": 1}, torch.Size([2, 3]),
    torch.float16, torch.zeros(3),
)  # fmt: skip


def dcp_files(folder: Path) -> None:
    """A distributed checkpoint of a few tensors."""
    save: Any = checkpoint
    state = {"model": {"w": torch.ones(4, 3), "b": torch.arange(5)}, "step": 3, "t": torch.ones(3, 2).t()}
    save.save(state, storage_writer=save.FileSystemWriter(folder, single_file_per_rank=False), no_dist=True)


def rank_files(folder: Path) -> None:
    """The files of two ranks, with plain tensors."""
    folder.mkdir()
    for rank in range(2):
        state = {"model": {"w": torch.ones(4, 3), "b": torch.arange(5)}, "epoch": 3}
        torch.save(state, folder / f"model_world_size_2_rank_{rank}.pt")


def zero_files(folder: Path) -> None:
    """A checkpoint of ZeRO, stage 2, of two ranks."""
    folder.mkdir()
    torch.save(
        {
            "module": {"w": torch.ones(4, 3), "f": torch.ones(2), "t": torch.ones(3)},
            "buffer_names": ["t"],
            "param_shapes": [{"w": torch.Size([4, 3])}],
            "frozen_param_shapes": {"f": torch.Size([2])},
            "frozen_param_fragments": {"f": torch.ones(2)},
            "shared_params": {"v": "w"},
        },
        folder / "mp_rank_00_model_states.pt",
    )
    for rank in range(2):
        state = {
            "zero_stage": 2,
            "partition_count": [2],
            "single_partition_of_fp32_groups": [torch.ones(6)],
            "param_alignment_paddings": [[0]],
            "base_optimizer_state": {"state": {0: {"exp_avg": torch.ones(6), "step": torch.tensor(1.0)}}},
        }
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


READERS: dict[str, Callable[[Path], None]] = {"dcp": dcp_files, "ranks": rank_files, "zero": zero_files}


def bytes_changed(content: bytes, draw: random.Random) -> bytes:
    """The bytes of a file with one to four places changed."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del data[at : at + draw.choice((1, 2, 8, 100))]
        elif kind == 2:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
        else:
            other = draw.randrange(len(data) + 1)
            data[at : at + 8] = data[other : other + 8]
    return bytes(data)


def value_changed(node: Any, draw: random.Random) -> Any:
    """What a pickle says with one value exchanged, somewhere in it."""
    places: list[Callable[[Any], None]] = []
    seen: set[int] = set()
    stack: list[Any] = [node]
    while stack:
        holder = stack.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        fields = holder if isinstance(holder, dict | list) else getattr(holder, "__dict__", None)
        if isinstance(fields, dict | list):
            keys = list(fields) if isinstance(fields, dict) else list(range(len(fields)))
            for key in keys:
                places.append(lambda value, fields=fields, key=key: fields.__setitem__(key, value))  # type: ignore[misc]
                if isinstance(fields, dict):
                    places.append(lambda _, fields=fields, key=key: fields.pop(key, None))  # type: ignore[misc]
                    if not isinstance(key, str | int):
                        stack.append(key)
                stack.append(fields[key])
    draw.choice(places)(copy.deepcopy(draw.choice(ODD)))
    return node


def mutated(path: Path, content: bytes, draw: random.Random) -> bytes:
    """Another content for a file."""
    if draw.random() < 0.5 or path.suffix == ".distcp":
        return bytes_changed(content, draw)
    try:
        if path.name == ".metadata":
            return pickle.dumps(value_changed(pickle.loads(content), draw))
        out = io.BytesIO()
        torch.save(value_changed(torch.load(io.BytesIO(content), weights_only=False), draw), out)
        return out.getvalue()
    except (AttributeError, TypeError):  # a class that does not pickle without what was exchanged
        return bytes_changed(content, draw)


def attempt(folder: Path, inner: str | None) -> bool:
    """Whether the directory is taken; any exception that is not the library's own is a failure."""
    try:
        params = tp.of(f"{folder}#{inner}" if inner else folder)
        str(tp.ls(params))
        tp.stats(params)
        tp.digest(params)
    except TorchParamsError as error:
        text = str(error)
        assert len(text) < 2000, "an endless message"
        assert text.isprintable(), f"a message that is not one line: {text!r}"
        return False
    return True


def run(reader: str, count: int, seed: int = 0) -> int:
    """Try `count` inputs on a reader: how many of them were taken.

    Args:
        reader: One of `READERS`.
        count: Inputs.
        seed: Where they start; equal seeds give equal inputs.
    """

    taken = 0
    with quiet_folder() as home:
        folder = home / "checkpoint"
        READERS[reader](folder)
        contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}
        size = sum(map(len, contents.values()))
        assert attempt(folder, None), "as it was written, it is taken"
        for number, draw in draws(count, seed):
            path = draw.choice(list(contents))
            content = mutated(path, contents[path], draw)
            path.write_bytes(content)
            with watched(f"{path.name}, input {number} of seed {seed}: {content[:4000]!r}") as trial:
                trial.nbytes = SLACK + 200 * (size + len(content))
                taken += attempt(folder, draw.choice((None, None, None, "model", "optimizer")))
            path.write_bytes(contents[path])
    return taken


def main(n: int = 100_000) -> None:
    """Run every reader, and say how many inputs were taken."""
    for reader in READERS:
        begun = time.monotonic()
        taken = run(reader, n)
        seconds = time.monotonic() - begun
        print(
            f"{reader}: {n:,} inputs, {taken:,} taken, {n - taken:,} refused, none wrong, {seconds:.0f} s", flush=True
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
