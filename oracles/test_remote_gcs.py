"""Checkpoints in a bucket of Google Cloud Storage, as a local emulator has them, through gcsfs."""

from __future__ import annotations

import socketserver
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote
from urllib.request import Request, urlopen

import fsspec
import numpy as np
import pytest
import torch
from gcp_storage_emulator.server import create_server

import torchparams as tp
from command import command
from torchparams.errors import RemoteError
from torchparams.io.remote import transfer
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ARRAYS = {
    f"layers.{i}.{name}": np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i in range(3)
    for name, shape in (("weight", (400, 900)), ("bias", (9,)))
}


Upload = Callable[[str, bytes], None]


@pytest.fixture
def upload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upload]:
    """A function that puts an object into the bucket `models`, which gcsfs reads."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="models")
    monkeypatch.setattr(socketserver.BaseServer, "handle_error", lambda *_: None)  # connections that are closed early
    server.start()
    address = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    # Otherwise gcsfs asks Google who is calling, and what kind of bucket this is.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setattr(transfer, "DELAYS", (0.0,))
    fsspec.get_filesystem_class("gs").clear_instance_cache()

    def put(name: str, data: bytes) -> None:
        target = f"{address}/upload/storage/v1/b/models/o?uploadType=media&name={quote(name, safe='')}"
        urlopen(Request(target, data, {"Content-Type": "application/octet-stream"})).close()

    yield put
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    server.stop()


@pytest.fixture
def files(upload: Upload, tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(ARRAYS))
    torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, tmp_path / "model.pt")
    tp.convert(ARRAYS, f"{tmp_path}/index/", max_shard_size=2 << 20).run()
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            upload(f"net/{path.relative_to(tmp_path)}", path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "index", "index/"])
def test_the_same_as_of_the_local_file(name: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"gs://models/net/{name}"
    for verb in ("ls", "stats", "digest"):
        here, there = command(capsys, verb, files / name), command(capsys, verb, url)
        assert (here.status, there.status) == (0, 0), there.err
        assert there.out.splitlines()[1:] == here.out.splitlines()[1:]
        assert there.err.splitlines()[-1].startswith("transferred ")
    assert tp.diff(url, files / name).same


@pytest.mark.parametrize(("name", "most"), [("model.safetensors", 2), ("model.pt", 8)])
def test_what_a_listing_and_statistics_transfer(name: str, most: int, files: Path) -> None:
    figures = transfer.transferred
    figures.summary()
    params = tp.of(f"gs://models/net/{name}")
    assert 1 <= figures.requests <= most and figures.nbytes <= 2 << 20
    tp.stats(params)
    assert figures.nbytes <= 1.02 * (files / name).stat().st_size + (512 << 10)
    figures.summary()


def test_an_object_that_changes(upload: Upload, files: Path) -> None:
    params = tp.of("gs://models/net/model.safetensors")
    changed = {name: array + 1 for name, array in ARRAYS.items()}
    upload("net/model.safetensors", safetensors_bytes(changed))
    with pytest.raises(RemoteError, match="changed after it was listed"):
        tp.stats(params)
    assert tp.diff("gs://models/net/model.safetensors", changed).same


def test_what_is_not_there(upload: Upload, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("models/none.pt", "no-such-bucket/none.pt", "models/none/"):
        ran = command(capsys, "ls", f"gs://{name}")
        assert ran.status == 2 and ran.out == ""
        assert ran.err.splitlines()[-1] == f"torchparams: gs://{name}: 404 Not Found: no such file"
