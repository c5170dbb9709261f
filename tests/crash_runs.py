"""A program that writes targets and is killed at every moment of it; run by `test_crash.py`, in a process of its own.

    python crash_runs.py FOLDER SCENARIO

A moment lies before each call that changes something on the disk, and in the middle of each that writes bytes. At each,
a child process (a fork of this one) ends itself by SIGKILL. Then the target has to be the old one or the new one, and
stay what it is when a run cleans up and then writes nothing, whether that is killed, too, or not; and another run has
to succeed and to leave nothing else behind. Prints how many moments there were, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import torchparams as tp
from torchparams.edit.write import execute
from torchparams.edit.write.directory import Directory
from torchparams.io import system as _system
from torchparams.io.write import OneFile
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = 200  # bytes that are copied at once: several copies for each tensor
CALLS = (
    *("create", "resize", "reserve", "write", "copy", "sync", "sync_directory", "rename", "link", "remove"),
    *("make_directory", "remove_directory", "lock"),
)


def weights(seed: int, count: int = 6) -> dict[str, Any]:
    numbers = np.random.default_rng(seed)
    return {f"layer.{i}.weight": numbers.normal(size=(8, 10)).astype(np.float32) for i in range(count)}


def shards(folder: Path, seed: int, size: int = 640) -> None:
    tp.convert(weights(seed), f"{folder}/", max_shard_size=size).run()


def no_index(folder: Path) -> None:
    shards(folder, 1)
    (folder / "model.safetensors.index.json").unlink()


def one_in_directory(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights(1)))


def with_others(folder: Path) -> None:
    shards(folder, 1)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()


def nothing(path: Path) -> None:
    del path


def write_safetensors(path: Path) -> None:
    path.write_bytes(safetensors_bytes(weights(1)))


def write_torch(path: Path) -> None:
    tp.convert(weights(1), path).run()


# Target, what is there before, and the options of `convert`.
SCENARIOS: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    "a file over a file": ("t.safetensors", write_safetensors, {}),
    "a new file": ("t.safetensors", nothing, {}),
    "a cast file over a file": ("t.safetensors", write_safetensors, {"dtype": "bf16", "allow_overflow": True}),
    "a torch file over a file": ("t.pt", write_torch, {}),
    "a new directory": ("t", nothing, {"max_shard_size": 640}),
    "shards over as many": ("t", with_others, {"max_shard_size": 640}),
    "shards over fewer": ("t", lambda p: shards(p, 1, 1000), {"max_shard_size": 640}),
    "shards over shards without an index": ("t", no_index, {"max_shard_size": 640}),
    "shards over one file": ("t", one_in_directory, {"max_shard_size": 640}),
    "one file over shards": ("t", with_others, {}),
    "one file over one file": ("t", one_in_directory, {}),
    "one file over shards without an index": ("t", no_index, {}),
    "two threads": ("t", with_others, {"max_shard_size": 640}),
}


def state(path: Path) -> dict[str, bytes] | None:
    """What a target holds; None where it cannot be opened."""
    if not path.exists():
        return None
    try:
        table = tp.of(str(path))
        return {name: str(table.info(name).dtype).encode() + table.numpy(name).tobytes() for name in table.names}
    except tp.TorchParamsError:
        return None


class Killing:
    """Counts the calls, and kills this process at one of them."""

    def __init__(self, moment: int) -> None:
        self.moment, self.count = moment, 0
        self.lock = threading.Lock()
        for name in CALLS:
            setattr(_system, name, self.watched(name, getattr(_system, name)))

    def watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self.step()
            if name == "write" and len(arguments[1]) > 1:
                fd, data, offset = arguments
                half = len(data) // 2
                call(fd, data[:half], offset)
                self.step()
                return call(fd, data[half:], offset + half)
            return call(*arguments)

        return watched

    def step(self) -> None:
        with self.lock:
            self.count += 1
            if self.count == self.moment:
                os.kill(os.getpid(), signal.SIGKILL)


def killed_at(moment: int, write: Callable[[], None]) -> int:
    """The exit status of a process that writes and is killed at a moment, if it comes so far."""
    child = os.fork()
    if not child:
        try:
            Killing(moment)
            write()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def run(folder: Path, scenario: str) -> int:
    """Every moment of a scenario; gives how many there were."""
    name, before, options = SCENARIOS[scenario]
    execute.PIECE = PARTS
    if scenario == "two threads":
        execute.INLINE = -1
    source = folder / "source.safetensors"
    source.write_bytes(safetensors_bytes(weights(2)))
    place = folder / "place"
    target = place / name
    pristine = folder / "pristine"
    pristine.mkdir()
    before(pristine / name)
    old = state(pristine / name)
    assert (old is None) == (before is nothing)

    def write() -> None:
        tp.convert(str(source), f"{target}", overwrite=True, **options).run()

    def clean_up() -> None:
        with (OneFile if target.suffix else Directory)(str(target)):
            pass  # as a run that is refused

    shutil.copytree(pristine, place)
    write()
    new = state(target)
    assert new is not None
    assert new != old
    complete = listing(place)
    moment = 0
    while True:
        moment += 1
        shutil.rmtree(place)
        shutil.copytree(pristine, place)
        status = killed_at(moment, write)
        found = state(target)
        assert found in (old, new), f"{scenario}, moment {moment}: neither old nor new"
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert found == new
            assert listing(place) == complete
            return moment - 1
        again = 1 + moment * 7 % 12
        killed_at(again, clean_up)
        assert state(target) == found, f"{scenario}, moment {moment}, then {again}: {listing(place)}"
        clean_up()
        assert state(target) == found, f"{scenario}, moment {moment}, cleaned up: {listing(place)}"
        write()
        assert state(target) == new, f"{scenario}, moment {moment}: the next run"
        assert listing(place) == complete, f"{scenario}, moment {moment}: {listing(place)}"


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


if __name__ == "__main__":
    # A process that is killed leaves its files to the system: that the disk has them all is not of interest here.
    os.fsync = lambda fd: None
    _system.begin_writeback = lambda *_: None
    where = Path(sys.argv[1])
    counts = {}
    for number, each in enumerate(sys.argv[2:] or SCENARIOS):
        (where / str(number)).mkdir()
        counts[each] = run(where / str(number), each)
    json.dump(counts, sys.stdout)
