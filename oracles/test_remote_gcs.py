"""Checkpoints in a bucket of Google Cloud Storage, as a local emulator has them, through gcsfs."""

from __future__ import annotations

import socketserver
from typing import TYPE_CHECKING
from urllib.parse import quote
from urllib.request import Request, urlopen

import fsspec
import pytest
from gcp_storage_emulator.server import create_server
from oracles.bucket_tests import BucketTests, Upload

from command import command
from torchparams.io.remote import transfer

if TYPE_CHECKING:
    from collections.abc import Iterator


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


class TestGoogle(BucketTests):
    bucket = "gs://models"
    talks = True


def test_what_is_not_there(upload: Upload, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("models/none.pt", "no-such-bucket/none.pt", "models/none/"):
        ran = command(capsys, "ls", f"gs://{name}")
        assert ran.status == 2 and ran.out == ""
        assert ran.err.splitlines()[-1] == f"torchparams: gs://{name}: 404 Not Found: no such file"
