"""Tests of checkpoints in a bucket, whatever store has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from torchparams.errors import RemoteError
from torchparams.io.remote import transfer
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from pathlib import Path

Upload = Callable[[str, bytes], None]
"""Function that puts an object into the bucket `models`."""

ARRAYS = {
    f"layers.{i}.{name}": np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i in range(3)
    for name, shape in (("weight", (400, 900)), ("bias", (9,)))
}


class BucketTests:
    """Tests of a store; their module has a fixture `upload`, which gives an `Upload`.

    Attributes:
        bucket: URL of the bucket `models`.
        talks: Whether the store's own library writes to standard error.
    """

    bucket: str
    talks = False

    @pytest.fixture
    def files(self, upload: Upload, tmp_path: Path) -> Path:
        """The folder of checkpoints that are in the bucket too, under `net/`."""
        (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(ARRAYS))
        torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, tmp_path / "model.pt")
        tp.convert(ARRAYS, f"{tmp_path}/index/", max_shard_size=2 << 20).run()
        for path in tmp_path.rglob("*.*"):
            if path.is_file():
                upload(f"net/{path.relative_to(tmp_path)}", path.read_bytes())
        return tmp_path

    @pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "index", "index/"])
    def test_the_same_as_of_the_local_file(self, name: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
        url = f"{self.bucket}/net/{name}"
        for verb in ("ls", "stats", "digest"):
            here, there = command(capsys, verb, files / name), command(capsys, verb, url)
            assert (here.status, there.status) == (0, 0), there.err
            assert there.out.splitlines()[1:] == here.out.splitlines()[1:]
            said = there.err.splitlines()
            assert said[-1 if self.talks else 0].startswith("transferred ")
        assert tp.diff(url, files / name).same

    @pytest.mark.parametrize(("name", "most"), [("model.safetensors", 2), ("model.pt", 8)])
    def test_what_a_listing_and_statistics_transfer(self, name: str, most: int, files: Path) -> None:
        figures = transfer.transferred
        figures.summary()
        params = tp.of(f"{self.bucket}/net/{name}")
        assert 1 <= figures.requests <= most and figures.nbytes <= 2 << 20
        tp.stats(params)
        assert figures.nbytes <= 1.02 * (files / name).stat().st_size + (512 << 10)
        figures.summary()

    def test_an_object_that_changes(self, upload: Upload, files: Path) -> None:
        params = tp.of(f"{self.bucket}/net/model.safetensors")
        changed = {name: array + 1 for name, array in ARRAYS.items()}
        upload("net/model.safetensors", safetensors_bytes(changed))
        with pytest.raises(RemoteError, match="changed after it was listed"):
            tp.stats(params)
        assert tp.diff(f"{self.bucket}/net/model.safetensors", changed).same
