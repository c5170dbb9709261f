"""Work grows with the number of tensors and files, not with their product; calls and opened files are counted."""

from __future__ import annotations

import collections
import json
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FEW, FACTOR = 15, 4
MARGIN = 1.2  # of what grows with the logarithm beside


def safetensors(folder: Path, count: int) -> Path:
    """A file of many tensors."""
    path = folder / "model.safetensors"
    path.write_bytes(safetensors_bytes({f"l.{i}.w": np.full(4, i, np.float32) for i in range(count)}))
    return path


def torch_zip(folder: Path, count: int) -> Path:
    """A file of many tensors, tied ones and views among them."""
    entries: dict[str, torch.Tensor] = {}
    for i in range(count):
        tensor = torch.arange(12.0).reshape(3, 4)
        entries |= {f"l.{i}.w": tensor.T, f"l.{i}.tied": tensor.T, f"l.{i}.c": torch.ones(2)}
    torch.save(entries, folder / "model.pt")
    return folder / "model.pt"


def safetensors_shards(folder: Path, count: int) -> Path:
    """Many files of one tensor."""
    places = {}
    for i in range(1, count + 1):
        file = f"model-{i:05}-of-{count:05}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({f"l.{i}.w": np.full(4, i, np.float32)}))
        places[f"l.{i}.w"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def torch_shards(folder: Path, count: int) -> Path:
    """Many files of a tied tensor that is a view, and of a plain one; without an index."""
    for i in range(1, count + 1):
        tensor = torch.arange(12.0).reshape(3, 4)
        entries = {f"l.{i}.w": tensor.T, f"l.{i}.tied": tensor.T, f"l.{i}.c": torch.ones(2)}
        torch.save(entries, folder / f"pytorch_model-{i:05}-of-{count:05}.bin")
    return folder


def aliases(path: Path, _: Path) -> None:
    """Look at every further name."""
    params = tp.of(path)
    for info in params.infos.values():
        for alias in info.aliases:
            params.info(alias)


VERBS: dict[str, Callable[[Path, Path], object]] = {
    "list": lambda path, out: str(tp.of(path)),
    "select": lambda path, out: tp.of(path).select("**.w").names,
    "values": lambda path, out: list(tp.of(path).items()),
    "aliases": aliases,
    "stats": lambda path, out: tp.stats(path),
    "diff": lambda path, out: tp.diff(path, path),
    "digest": lambda path, out: tp.digest(path).to_json(),
    "duplicates": lambda path, out: tp.duplicates(path, path),
    "verify": lambda path, out: tp.verify(path),
    "verify a manifest": lambda path, out: tp.verify(path, tp.digest(path)),
    "convert": lambda path, out: tp.convert(path, out / "out.safetensors").run(),
    "convert to torch": lambda path, out: tp.convert(path, out / "out.pt").run(),
    "convert to shards": lambda path, out: tp.convert(path, f"{out}/out/", max_shard_size=48).run(),
    "merge": lambda path, out: tp.merge([path, path], out / "out.safetensors").run(),
    "delta": lambda path, out: tp.delta(path, path, out / "out.safetensors").run(),
}


def calls(run: Callable[[], object]) -> collections.Counter[str]:
    """How often functions were called in all threads, files opened, and paths looked at."""
    found: collections.Counter[str] = collections.Counter()

    def see(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found["calls"] += 1
            code = frame.f_code
            if "torchparams" in code.co_filename:
                found[f"{code.co_filename.rpartition('torchparams')[2]}:{code.co_qualname}"] += 1
        elif event == "c_call":
            found["calls of C"] += 1
            if argument in (os.stat, os.open, open):
                found[f"calls of {argument.__name__}"] += 1

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("make", [safetensors, torch_zip, safetensors_shards, torch_shards])
def test_work_grows_with_the_tensors_and_with_the_files(
    make: Callable[[Path, int], Path], verb: str, tmp_path: Path
) -> None:
    counted = []
    for number, count in enumerate((FEW, FEW, FACTOR * FEW)):  # the first run imports and caches
        folder, out = tmp_path / f"in{number}", tmp_path / f"out{number}"
        folder.mkdir()
        out.mkdir()
        path = make(folder, count)
        counted.append(calls(lambda: VERBS[verb](path, out)))  # noqa: B023  # called at once
    _, few, many = counted
    for what in many:
        if many[what] > 4 * FACTOR * FEW:  # less is linear, whatever it was before
            assert many[what] <= MARGIN * FACTOR * max(few[what], FEW), what
