"""Checkpoints in an S3 bucket, as moto's server has them, and in other file systems of fsspec."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import boto3
import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from oracles.bucket_tests import ARRAYS, BucketTests, Upload

import torchparams as tp
from command import command
from torchparams.errors import RemoteError
from torchparams.io.remote import transfer
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(transfer, "DELAYS", (0.0,))
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    fsspec.filesystem("s3").clear_instance_cache()
    yield client
    for each in client.list_objects_v2(Bucket="models").get("Contents", []):
        client.delete_object(Bucket="models", Key=each["Key"])


@pytest.fixture
def upload(bucket: Any) -> Upload:
    """A function that puts an object into the bucket."""
    return lambda name, data: bucket.put_object(Bucket="models", Key=name, Body=data)


class TestAmazon(BucketTests):
    bucket = "s3://models"

    def test_a_part_is_converted(self, files: Path, tmp_path: Path) -> None:
        figures = transfer.transferred
        params = tp.of("s3://models/net/model.safetensors")
        figures.summary()
        tp.convert(params, tmp_path / "part.safetensors", "layers.1.**").run()
        assert tp.diff(tmp_path / "part.safetensors", {k: v for k, v in ARRAYS.items() if ".1." in k}).same
        assert figures.nbytes <= 400 * 900 * 4 + 4096


def failing(capsys: pytest.CaptureFixture[str], url: str) -> str:
    ran = command(capsys, "ls", url)
    assert ran.status == 2 and ran.out == "" and ran.err.count("\n") == 1
    assert "s3cret" not in ran.err and "the-key" not in ran.err
    return ran.err.removeprefix(f"torchparams: {url}: ").rstrip("\n")


def test_what_is_not_there(bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(capsys, "s3://models/none.pt") == "404 Not Found: no such file"
    assert failing(capsys, "s3://no-such-bucket/none.pt") == "404 Not Found: no such file"
    assert failing(capsys, "s3://models/none/") == "404 Not Found: no such file"
    bucket.put_object(Bucket="models", Key="empty.pt", Body=b"")
    assert failing(capsys, "s3://models/empty.pt").startswith("The file is empty")


def test_what_may_not_be_read(bucket: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from botocore.exceptions import ClientError, NoCredentialsError

    async def refuse(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        answer = {"Error": {"Code": "403", "Message": "Forbidden"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise PermissionError("Forbidden") from ClientError(answer, "GetObject")

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", refuse)
    assert failing(capsys, "s3://models/m.pt") == (
        "403 Forbidden: Forbidden. Set credentials for fsspec: in its configuration, the environment, or the URL."
    )

    async def without(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        raise NoCredentialsError

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", without)
    assert failing(capsys, "s3://models/m.pt").startswith("Unable to locate credentials. Set credentials for fsspec")


def test_any_file_system_of_fsspec(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/net/m.safetensors", safetensors_bytes(ARRAYS))
    assert tp.diff("memory://net/m.safetensors", ARRAYS).same
    assert tp.diff("memory://net", ARRAYS).same
    params = tp.of("memory://net/m.safetensors")
    copy = pickle.loads(pickle.dumps(params.source))
    assert list(copy.keys()) == params.names
    assert command(capsys, "ls", "memory://net/none.pt").err.startswith(
        "torchparams: memory://net/none.pt: 404 Not Found: no such file"
    )
    original = fs.cat_file

    def changing(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        fs.pipe_file("/net/m.safetensors", safetensors_bytes({"w": np.ones(3)}))
        return found

    monkeypatch.setattr(type(fs), "cat_file", lambda self, *arguments, **options: changing(*arguments, **options))
    with pytest.raises(RemoteError, match=r"changed after it was listed|bytes came for a range"):
        tp.stats(params)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a b.safetensors").write_bytes(safetensors_bytes(ARRAYS))
    assert tp.of(f"file://{tmp_path}/a%20b.safetensors").source.label == f"{tmp_path}/a b.safetensors"
