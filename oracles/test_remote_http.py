"""Checkpoints over HTTP: bytes transferred, results equal to those of local files, and messages of failures."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import torchparams as tp
from command import command
from common import process
from range_server import RangeServer, Request, endless, serving
from torchparams.engines import ThreadEngine
from torchparams.errors import LimitExceeded, RemoteError, SizeMismatch, SourceError
from torchparams.io.remote import transfer
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
FILES = ("model.safetensors", "model.pt", "old.pt", "index/", "index/model.safetensors.index.json", "set/", "plain.pkl")


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for i in range(6):
        found[f"layers.{i}.weight"] = rng.normal(size=(512, 700)).astype(np.float32)
        found[f"layers.{i}.bias"] = rng.normal(size=700).astype(np.float16)
    found["head"] = rng.normal(size=(3, 5))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    arrays = tensors()
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(arrays))
    torch.save(state, folder / "model.pt")
    torch.save({"model": state | {"transposed": state["head"].T}, "step": 3}, folder / "nested.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.pkl").write_bytes(pickle.dumps(arrays))
    tp.convert(arrays, f"{folder}/index/", max_shard_size=4 * MIB).run()
    (folder / "index" / "config.json").write_text("{}")
    for number, names in enumerate((list(arrays)[:7], list(arrays)[7:])):
        part = safetensors_bytes({name: arrays[name] for name in names})
        (folder / "set").mkdir(exist_ok=True)
        (folder / "set" / f"model-{number + 1:05}-of-00002.safetensors").write_bytes(part)
    return folder


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(transfer, "DELAYS", (0.0, 0.01, 0.02))
    with serving(root) as served:
        yield served


def same_but_the_first_line(here: str, there: str, path: str, url: str) -> None:
    """The outputs are equal line by line; a path within them is the URL."""
    assert there.replace(url, path).splitlines()[1:] == here.splitlines()[1:]


# --- the same as of a local file -----------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "verb", [("ls",), ("stats",), ("stats", "--by", "layer"), ("digest",), ("show", "layers.3.bias"), ("verify",)]
)
def test_output_equals_that_of_the_local_file(
    name: str, verb: tuple[str, ...], server: RangeServer, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, path = f"{server.url}/{name}", f"{root}/{name}"
    here = command(capsys, verb[0], path, *verb[1:])
    there = command(capsys, verb[0], url, *verb[1:])
    assert (here.status, there.status) == (0, 0), there.err
    same_but_the_first_line(here.out, there.out, str(root), server.url)
    assert here.err == ""
    assert there.err.startswith("transferred ") and there.err.count("\n") == 1


@pytest.mark.parametrize("name", FILES)
def test_the_values_are_those_of_the_file(name: str, server: RangeServer, root: Path) -> None:
    there, here = tp.of(f"{server.url}/{name}"), tp.of(f"{root}/{name}")
    assert there.names == here.names
    for tensor in here.names:
        assert there.numpy(tensor).tobytes() == here.numpy(tensor).tobytes()
        assert torch.equal(there[tensor], here[tensor])
        there[tensor].zero_()  # it is the reader's own
    assert tp.diff(there, here).same


def test_a_mapping_within_a_checkpoint(server: RangeServer, root: Path) -> None:
    there, here = tp.of(f"{server.url}/nested.pt#model"), tp.of(f"{root}/nested.pt#model")
    assert there.names == here.names and tp.diff(there, here).same
    assert there.source.label == f"{server.url}/nested.pt#model"


def test_json_lists_no_place_in_a_zip_until_it_was_read(server: RangeServer, root: Path) -> None:
    there, here = tp.of(f"{server.url}/model.pt"), tp.of(f"{root}/model.pt")
    assert all(info.location is None for info in there.infos.values())
    there.numpy("head")
    found, expected = there.info("head").location, here.info("head").location
    assert found is not None and expected is not None
    assert (found.start, found.stop) == (expected.start, expected.stop)
    listed = [tp.ls(each).to_json() for each in (f"{server.url}/model.safetensors", f"{root}/model.safetensors")]
    places = [[(row["location"]["start"], row["location"]["stop"]) for row in each["parameters"]] for each in listed]
    assert places[0] == places[1]


def test_a_source_is_pickled_by_its_url(server: RangeServer) -> None:
    there = tp.of(f"{server.url}/model.safetensors?token=abc")
    copy = pickle.loads(pickle.dumps(there.source))
    assert copy.label == there.source.label == f"{server.url}/model.safetensors?…"
    assert server.requests[-1].query == "token=abc"


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most", "nbytes"), [("model.safetensors", 2, 2 * MIB), ("model.pt", 8, 4 * MIB)])
def test_what_a_listing_transfers(name: str, most: int, nbytes: int, server: RangeServer) -> None:
    tp.ls(f"{server.url}/{name}")
    assert 1 <= len(server.requests) <= most
    assert 0 < server.sent <= nbytes


def test_a_long_header_takes_one_request_more(tmp_path: Path) -> None:
    arrays = {f"a.rather.long.name.of.a.tensor.{i}": np.zeros(1, np.float32) for i in range(9000)}
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes(arrays))
    with serving(tmp_path) as server:
        assert len(tp.of(f"{server.url}/m.safetensors")) == 9000
        assert len(server.requests) == 2
        assert server.sent <= (tmp_path / "m.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "old.pt"])
def test_statistics_transfer_the_file_once(name: str, server: RangeServer, root: Path) -> None:
    size = (root / name).stat().st_size
    tp.stats(f"{server.url}/{name}")
    assert server.sent <= 1.02 * size + 512 * 1024  # the first and the last part, which a larger file does not notice
    assert len(server.requests) <= 400 * size / 750e6 + 8


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_one_small_tensor(name: str, server: RangeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "show", f"{server.url}/{name}", "layers.5.bias").status == 0
    assert len(server.requests) <= 4 and server.sent <= 2 * MIB


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "index/"])
def test_a_part_is_converted_alone(
    name: str, server: RangeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "part.safetensors"
    ran = command(capsys, "convert", f"{server.url}/{name}", target, "-s", "layers.{2..3}.**")
    assert ran.status == 0, ran.err
    arrays = {key: array for key, array in tensors().items() if key.startswith(("layers.2.", "layers.3."))}
    written = load_file(target)
    assert sorted(written) == sorted(arrays)
    assert all(np.array_equal(written[key], array) for key, array in arrays.items())
    wanted = sum(array.nbytes for array in arrays.values())
    listing = 256 * 1024 * (6 if name == "index/" else 2)
    assert server.sent <= wanted + listing + 64 * 1024


def test_requests_are_merged_and_of_at_least_two_mebibytes(server: RangeServer) -> None:
    params = tp.of(f"{server.url}/model.safetensors")
    server.reset()
    tp.stats(params)
    sizes = sorted(stop - start for start, stop in server.asked)
    assert all(size >= 2 * MIB for size in sizes) and all(size <= 4 * MIB for size in sizes)


def test_requests_run_at_the_same_time(server: RangeServer) -> None:
    params = tp.of(f"{server.url}/model.safetensors")
    together = threading.Barrier(2)
    met: list[bool] = []

    def wait(handler: Any, request: Request) -> bool:
        if not met:
            together.wait(10)
            met.append(True)
        return False

    server.answer = wait
    tp.stats(params, engine=ThreadEngine(1))
    assert met


def test_what_waits_is_bounded(server: RangeServer, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    from torchparams.io.remote import file

    monkeypatch.setattr("torchparams.limits.REMOTE_CACHE_BYTES", 5 * MIB)
    most = 0

    def look(done: int, total: int) -> None:
        nonlocal most
        most = max(most, file._window._nbytes)

    found = tp.stats(f"{server.url}/model.safetensors", progress=look)
    assert found.to_json() | {"source": ""} == tp.stats(root / "model.safetensors").to_json() | {"source": ""}
    assert 0 < most <= 10 * MIB


def test_a_run_that_is_left_early_transfers_no_more(server: RangeServer) -> None:
    from torchparams.engines import Folding, jobs_of

    class Sum:
        def update(self, block: Any) -> None:
            pass

        def finish(self) -> int:
            return 0

    params = tp.of(f"{server.url}/model.safetensors")
    task = Folding(lambda job: Sum(), lambda job, parts: 0)
    run = ThreadEngine(2).run(jobs_of(params.source), task)
    next(iter(run))
    run.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("torchparams-")]


# --- failures ------------------------------------------------------------------------------------


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command fails with."""
    ran = command(capsys, *arguments)
    assert ran.status == 2, ran
    assert ran.out == ""
    assert ran.err.count("\n") == 1 and ran.err.startswith("torchparams: ")
    return ran.err.removeprefix("torchparams: ").rstrip("\n")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, "The server responded 403 Forbidden. Set credentials for fsspec: in its configuration, "
              "the environment, or the URL."),
        (404, "The server responded 404 Not Found"),
        (401, "The server responded 401 Unauthorized. Set credentials for fsspec: in its configuration, "
              "the environment, or the URL."),
        (410, "The server responded 410 Gone"),
        (429, "The server responded 429 Too Many Requests, after 4 tries"),
        (503, "The server responded 503 Service Unavailable, after 4 tries"),
    ],
)  # fmt: skip
def test_a_status(status: int, said: str, server: RangeServer, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(handler: Any, request: Request) -> bool:
        handler.say(status, b"no")
        return True

    server.answer = refuse
    url = f"{server.url}/model.safetensors"
    assert failing(capsys, "ls", url) == f"{url}: {said}"
    assert len(server.requests) == (4 if status in (429, 503) else 1)


def test_a_status_in_the_middle(server: RangeServer, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(handler: Any, request: Request) -> bool:
        if request.start:
            handler.say(403)
        return bool(request.start)

    server.answer = refuse
    url = f"{server.url}/model.safetensors"
    assert failing(capsys, "stats", url).startswith(f"{url}: The server responded 403 Forbidden")


def test_too_many_requests_is_tried_again(server: RangeServer) -> None:
    refused: list[str] = []

    def refuse(handler: Any, request: Request) -> bool:
        if len(refused) < 3:
            refused.append(request.path)
            handler.say(429, b"", {"Retry-After": "0"})
            return True
        return False

    server.answer = refuse
    assert len(tp.of(f"{server.url}/model.safetensors")) == 13


def test_a_server_without_ranges(server: RangeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.ranges = False
    url = f"{server.url}/model.safetensors"
    assert failing(capsys, "ls", url) == (
        f"{url}: The server does not support ranges: it responded 200 OK to a range request. "
        "Download the file, and pass its path."
    )


def test_a_file_that_changes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((root / "model.safetensors").read_bytes())
    with serving(tmp_path) as server:
        url = f"{server.url}/model.safetensors"
        params = tp.of(url)
        path.write_bytes(path.read_bytes())  # the same bytes, at another time
        with pytest.raises(RemoteError, match=r"changed after it was listed \(status 412\)"):
            tp.stats(params)
        server.answer = lambda handler, request: request.headers.pop("if-match", None) is None and False
        with pytest.raises(RemoteError, match=r"changed after it was listed \(status 206\)"):
            params.numpy("layers.5.weight")
        again = tp.of(url)
        assert tp.stats(again)["head"].numel == 15
        with pytest.raises(SourceError, match="changed after it was listed"):
            tp.stats(params)

        server.etags = False
        params = tp.of(url)
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(RemoteError, match="changed after it was listed"):
            tp.stats(params)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: RangeServer, root: Path) -> None:
    broken: list[int] = []

    def breaking(handler: Any, request: Request) -> bool:
        if len(broken) % 2 == 0 and request.start:
            broken.append(1)
            size = (root / "model.safetensors").stat().st_size
            data = (root / "model.safetensors").read_bytes()[request.start : request.stop]
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {request.start}-{request.start + len(data) - 1}/{size}")
            handler.send_header("Content-Length", str(len(data)))
            handler.send_header("ETag", handler.etag(root / "model.safetensors"))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2])
            server.sent += len(data) // 2
            handler.close_connection = True
            return True
        broken.append(0)
        return False

    server.answer = breaking
    there, here = tp.stats(f"{server.url}/model.safetensors"), tp.stats(root / "model.safetensors")
    assert there.to_json() | {"source": ""} == here.to_json() | {"source": ""}
    assert 1 in broken
    assert server.sent <= (root / "model.safetensors").stat().st_size * 1.05 + 512 * 1024


def test_a_connection_that_goes_on_breaking(server: RangeServer, capsys: pytest.CaptureFixture[str]) -> None:
    def breaking(handler: Any, request: Request) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Range", "bytes 0-99999/100000")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.close_connection = True
        return True

    server.answer = breaking
    url = f"{server.url}/model.safetensors"
    assert failing(capsys, "ls", url) == (
        f"{url}: The server responded 206 Partial Content, then the connection broke, after 4 tries"
    )


def test_nobody_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "DELAYS", (0.0,))
    with serving(tmp_path) as server:
        url = f"{server.url}/model.safetensors"
    assert failing(capsys, "ls", url) == f"{url}: Cannot connect: Connection refused, after 4 tries"
    unknown = "http://nobody.invalid/model.safetensors"
    assert failing(capsys, "ls", unknown) == f"{unknown}: Host not found, after 4 tries"


def test_a_server_that_never_ends(server: RangeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = endless
    url = f"{server.url}/model.safetensors"
    assert failing(capsys, "ls", url) == (f"{url}: The server sent more than the requested 262,144 bytes (status 206)")


def test_a_server_that_falls_silent(
    server: RangeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchparams.limits.REMOTE_SECONDS", 0.1)

    def silent(handler: Any, request: Request) -> bool:
        time.sleep(0.5)
        return True

    server.answer = silent
    url = f"{server.url}/model.safetensors"
    assert failing(capsys, "ls", url) == f"{url}: Timed out, after 4 tries"


@pytest.mark.parametrize(
    ("headers", "length", "said"),
    [
        ({"Content-Range": "bytes 0-99/1000"}, 5000, "announced 5,000 bytes for a range of 100 (status 206)"),
        ({"Content-Range": "bytes 5-99/1000"}, 95, "sent bytes 5 to 100 of 1,000 for bytes 0 to 262,144 "
                                                  "(status 206)"),
        ({"Content-Range": "bytes 0-999999/1000"}, 9, "sent bytes 0 to 1,000,000 of 1,000 for bytes 0 to 262,144 "
                                                      "(status 206)"),
        ({"Content-Range": "bytes 0-99/*"}, 100, "sent no size in Content-Range 'bytes 0-99/*' (status 206)"),
        ({}, 100, "sent no size in Content-Range '' (status 206)"),
        ({"Content-Range": "bytes 0-99/1000", "Content-Encoding": "gzip"}, 100, "sent the bytes in the encoding "
                                                                               "'gzip' (status 206)"),
    ],
)  # fmt: skip
def test_a_server_that_lies(
    headers: dict[str, str], length: int, said: str, server: RangeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def lie(handler: Any, request: Request) -> bool:
        handler.say(206, b"\0" * length, headers)
        return True

    server.answer = lie
    url = f"{server.url}/model.safetensors"
    assert failing(capsys, "ls", url) == f"{url}: The server {said}"


def test_a_size_that_is_a_lie(server: RangeServer, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lie(handler: Any, request: Request) -> bool:
        data = (root / "model.safetensors").read_bytes()[request.start : request.stop]
        end = (request.start or 0) + len(data) - 1
        handler.say(206, data, {"Content-Range": f"bytes {request.start}-{end}/{10**15}"})
        return True

    server.answer = lie
    said = failing(capsys, "stats", f"{server.url}/model.safetensors")
    assert said.startswith(f"{server.url}/model.safetensors: The tensors end at byte"), said
    said = failing(capsys, "ls", f"{server.url}/model.pt")
    assert said.startswith(f"{server.url}/model.pt: "), said


def test_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"")
    with serving(tmp_path) as server:
        assert "The file is empty" in failing(capsys, "ls", f"{server.url}/m.safetensors")


def test_an_unknown_kind_of_url(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(capsys, "ls", "nowhere://a/b.pt") == (
        "nowhere://a/b.pt: Protocol not known: nowhere. Pass the URL of a checkpoint."
    )
    assert "Install adlfs" in failing(capsys, "ls", "abfs://container/model.pt")


def test_a_shard_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )
    with serving(tmp_path) as server:
        url = f"{server.url}/model.safetensors.index.json"
        shard = f"{server.url}/model-00001-of-00001.safetensors"
        assert failing(capsys, "ls", url) == f"{shard}: The server responded 404 Not Found"


# --- credentials ---------------------------------------------------------------------------------


def test_passwords_and_signatures_are_sent_and_never_shown(
    server: RangeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    host = server.url.removeprefix("http://")
    url = f"http://me:s3cret@{host}/index/model.safetensors.index.json?X-Amz-Signature=s3cret"
    for arguments in (
        ("ls", url), ("ls", url, "--json"), ("stats", url, "--json"), ("show", url, "head"), ("digest", url),
        ("convert", url, tmp_path / "a.safetensors"), ("verify", url), ("ls", url + ".no"), ("ls", url, "-s", "absent"),
        ("ls", f"http://me:s3cret@{host}/none.pt?sig=s3cret#model"), ("ls", f"{server.url}/m.pt?a=s3cret", "--bad"),
    ):  # fmt: skip
        ran = command(capsys, *arguments)
        assert "s3cret" not in ran.out + ran.err
        assert ran.status in (0, 2)
    assert all(
        request.headers["authorization"].startswith("Basic ") and request.query == "X-Amz-Signature=s3cret"
        for request in server.requests
        if "/index/" in request.path and request.path.endswith(".safetensors")
    )


def test_a_redirect_is_followed_once_and_anew_when_it_has_expired(server: RangeServer, root: Path) -> None:
    signature = [1]

    def redirect(handler: Any, request: Request) -> bool:
        if request.path == "/resolve":
            handler.say(302, b"", {"Location": f"/model.safetensors?signature={signature[0]}"})
            return True
        if request.query != f"signature={signature[0]}":
            handler.say(403)
            return True
        return False

    server.answer = redirect
    params = tp.of(f"{server.url}/resolve")
    assert [request.path for request in server.requests] == ["/resolve", "/model.safetensors"]
    server.reset()
    tp.stats(params, "layers.{0..2}.**")
    assert {request.path for request in server.requests} == {"/model.safetensors"}
    signature[0] = 2
    assert np.array_equal(params.numpy("layers.5.weight"), tensors()["layers.5.weight"])


# --- zips and pickles ----------------------------------------------------------------------------


def test_a_zip_that_is_not_aligned_as_torch_does(tmp_path: Path) -> None:
    import zipfile

    torch.save({"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.int16)}, tmp_path / "torch.pt")
    with zipfile.ZipFile(tmp_path / "torch.pt") as old, zipfile.ZipFile(tmp_path / "re.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with serving(tmp_path) as server:
        assert tp.diff(f"{server.url}/re.pt", tmp_path / "torch.pt").same


@pytest.mark.parametrize("alignment", [64, 4096])
def test_other_alignments(alignment: int, tmp_path: Path) -> None:
    from torch.utils.serialization import config

    config.save.storage_alignment = alignment
    try:
        torch.save({str(i): torch.full((i * 100 + 1,), float(i)) for i in range(40)}, tmp_path / "m.pt")
    finally:
        config.save.storage_alignment = 64
    with serving(tmp_path) as server:
        params = tp.of(f"{server.url}/m.pt")
        assert len(server.requests) <= 8
        assert tp.diff(params, tmp_path / "m.pt").same


def test_a_local_header_that_contradicts_is_found_with_the_values(root: Path, tmp_path: Path) -> None:
    data = bytearray((root / "model.pt").read_bytes())
    location = tp.of(root / "model.pt").info("layers.4.weight").location
    assert location is not None
    header = data.rindex(b"PK\3\4", 0, location.start)
    data[header + 14] ^= 1  # its CRC
    data[header + 15] ^= 1
    (tmp_path / "m.pt").write_bytes(data)
    with serving(tmp_path) as server:
        params = tp.of(f"{server.url}/m.pt")
        assert params.numpy("layers.3.weight").shape == (512, 700)
        for read in (lambda: params.numpy("layers.4.weight"), lambda: tp.stats(params), lambda: tp.digest(params)):
            with pytest.raises(SourceError, match="has the CRC-32"):
                read()


def test_a_count_of_a_legacy_file_is_found_with_the_values(root: Path, tmp_path: Path) -> None:
    data = bytearray((root / "old.pt").read_bytes())
    location = tp.of(root / "old.pt").info("layers.4.weight").location
    assert location is not None
    data[location.start - 8] ^= 1
    (tmp_path / "m.pt").write_bytes(data)
    with serving(tmp_path) as server:
        params = tp.of(f"{server.url}/m.pt")
        assert params.numpy("layers.3.weight").shape == (512, 700)
        for read in (lambda: params.numpy("layers.4.weight"), lambda: tp.stats(params)):
            with pytest.raises(SizeMismatch, match="elements by its own header"):
                read()


def test_a_large_plain_pickle_is_refused(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchparams.limits.REMOTE_WHOLE_BYTES", MIB)
    with pytest.raises(LimitExceeded, match=r"(?i)a plain pickle of .* download the file"):
        tp.of(f"{server.url}/plain.pkl")
    assert len(server.requests) == 1


def test_a_compressed_zip(tmp_path: Path) -> None:
    import zipfile

    torch.save({"a": torch.arange(300_000), "b": torch.ones(3)}, tmp_path / "torch.pt")
    deflated = zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "torch.pt") as old, deflated as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with serving(tmp_path) as server:
        assert tp.diff(f"{server.url}/deflated.pt", tmp_path / "torch.pt").same


# --- other layouts, other processes --------------------------------------------------------------


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that several processes wrote."""
    folder = tmp_path_factory.mktemp("training")
    program = Path(__file__).parents[1] / "tests" / "training_files.py"
    subprocess.run([sys.executable, program, folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", ["dcp-4/", "dcp-1/.metadata", "files-2/", "shards-2/", "dcp-4/#model"])
def test_distributed_checkpoints(name: str, training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(training) as server:
        for verb in ("ls", "stats"):
            here = command(capsys, verb, f"{training}/{name}")
            there = command(capsys, verb, f"{server.url}/{name}")
            assert there.status == 0, there.err
            assert there.out.replace(server.url, str(training)).splitlines()[1:] == here.out.splitlines()[1:]
        assert tp.digest(f"{server.url}/{name}").digest == tp.digest(f"{training}/{name}").digest


@pytest.mark.parametrize("name", ["model.safetensors", "index/"])
def test_ctrl_c_ends_a_transfer(name: str, root: Path) -> None:
    with serving(root) as server:

        def slow(handler: Any, request: Request) -> bool:
            if request.start or "-of-" in request.path:
                time.sleep(60)
            return False

        server.answer = slow
        child = subprocess.Popen(
            [sys.executable, "-m", "torchparams", "stats", f"{server.url}/{name}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while len(server.asked) < 2:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=10)
        assert (child.returncode, out) == (130, "")
        assert "Traceback" not in err


def test_only_a_url_imports_fsspec(root: Path) -> None:
    program = (
        "import sys, torchparams as tp; tp.stats(sys.argv[1]); "
        "print([name for name in ('fsspec', 'aiohttp', 's3fs', 'huggingface_hub') if name in sys.modules])"
    )
    for path, expected in ((str(root / "model.safetensors"), "[]"), ("", "['fsspec', 'aiohttp']")):
        with serving(root) as server:
            ran = subprocess.run(
                [sys.executable, "-c", program, path or f"{server.url}/model.safetensors"],
                capture_output=True,
                text=True,
                check=True,
            )
        assert ran.stdout.strip() == expected


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    each, count = 50_000_000, 40
    header = {
        f"layers.{i}.w": {"dtype": "F32", "shape": [each // 4], "data_offsets": [i * each, (i + 1) * each]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * each)
    with serving(tmp_path) as server:
        _, peak = process([sys.executable, "-m", "torchparams", "stats", f"{server.url}/m.safetensors"])
        assert peak < 300e6
        assert server.sent <= 1.02 * count * each
        assert len(server.requests) <= 400 * count * each / 750e6
