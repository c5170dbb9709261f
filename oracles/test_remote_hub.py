"""Checkpoints on the hub, of which a server stands in for it; each command runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import torchparams as tp
from range_server import RangeServer, Request, serving
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMITS = {"main": "a" * 40, "refs/pr/1": "b" * 40, "v1.0": "c" * 40}
ARRAYS = {f"layers.{i}.w": np.random.default_rng(i).normal(size=(300, 500)).astype(np.float32) for i in range(4)}


@dataclass
class Hub:
    """The stand-in: one repository, `owner/net`, of which each commit is a directory.

    Attributes:
        server: Serves it.
        home: The directory of the local cache.
        commits: The commit of each branch and tag.
        offline: Whether HF_HUB_OFFLINE is set.
    """

    server: RangeServer
    home: Path
    commits: dict[str, str] = field(default_factory=lambda: dict(COMMITS))
    offline: bool = False

    def answer(self, handler: Any, request: Request) -> bool:
        """Answer as the hub does; large files are redirected to a signed URL of another server."""
        if request.path.startswith("/cdn/"):
            if request.query != "Signature=s3cret" or "authorization" in request.headers:
                handler.say(403)
                return True
            request.path = request.path.removeprefix("/cdn")
            handler.serve(request)
            return True
        if request.headers.get("authorization") != "Bearer hf_s3cret":
            handler.say(401)
            return True
        if request.path.startswith("/api/models/owner/net/tree/"):
            return self.tree(handler, request.path.removeprefix("/api/models/owner/net/tree/"))
        if not request.path.startswith("/owner/net/resolve/"):
            handler.say(404, b"", {"X-Error-Code": "RepoNotFound"})
            return True
        commit, path = self.found(request.path.removeprefix("/owner/net/resolve/"))
        file = self.server.root / commit / path
        if not file.is_file():
            handler.say(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return True
        etag = f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"'
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(file.stat().st_size),
            "X-Linked-ETag": etag,
            "ETag": etag,
        }
        host = self.server.url.replace("127.0.0.1", "localhost")
        handler.say(302, b"", headers | {"Location": f"{host}/cdn/{commit}/{path}?Signature=s3cret"})
        return True

    def found(self, rest: str) -> tuple[str, str]:
        """The commit and the path that an address names."""
        rest = rest.replace("%2F", "/")
        for name, commit in (*self.commits.items(), *((commit, commit) for commit in COMMITS.values())):
            if rest == name or rest.startswith(f"{name}/"):
                return commit, rest.removeprefix(name).strip("/")
        return "0" * 40, rest

    def tree(self, handler: Any, rest: str) -> bool:
        commit, path = self.found(rest)
        folder = self.server.root / commit / path
        if not folder.is_dir():
            handler.say(404, b'{"error": "no"}', {"X-Error-Code": "EntryNotFound"})
            return True
        rows = [
            {"type": "directory" if each.is_dir() else "file", "path": str(each.relative_to(self.server.root / commit)),
             "oid": "1" * 40, "size": each.stat().st_size}
            for each in sorted(folder.iterdir())
        ]  # fmt: skip
        handler.say(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
        return True

    def run(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command line in a process that knows this hub alone."""
        environment = os.environ | {
            "HF_ENDPOINT": self.server.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": "hf_s3cret",
            "HF_HUB_OFFLINE": str(int(self.offline)),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }
        ran = subprocess.run(
            [sys.executable, "-m", "torchparams", *arguments],
            capture_output=True, text=True, env=environment, timeout=120,
        )  # fmt: skip
        assert ran.returncode == status, ran
        assert "s3cret" not in ran.stdout + ran.stderr
        return ran

    def cache(self, commit: str, path: str, ref: str | None = None) -> Path:
        """Put a file into the local cache, as a download does."""
        repo = self.home / "hub" / "models--owner--net"
        contents = (self.server.root / commit / path).read_bytes()
        blob = repo / "blobs" / hashlib.sha256(contents).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(contents)
        link = repo / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if ref is not None:
            (repo / "refs").mkdir(exist_ok=True)
            (repo / "refs" / ref).write_text(commit)
        return link


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root = tmp_path / "served"
    for number, commit in enumerate(COMMITS.values()):
        arrays = {name: array + number for name, array in ARRAYS.items()}
        (root / commit / "sub").mkdir(parents=True)
        (root / commit / "sub" / "model.safetensors").write_bytes(safetensors_bytes(arrays))
        tp.convert(arrays, f"{root / commit}/", max_shard_size=1 << 20).run()
        (root / commit / "config.json").write_text("{}")
    with serving(root) as server:
        made = Hub(server, tmp_path / "home")
        server.answer = made.answer
        yield made


def paths(hub: Hub) -> list[str]:
    return [request.path for request in asked(hub)]


def asked(hub: Hub) -> list[Request]:
    """The requests for files: the hub's own library may ask for other things."""
    return [request for request in hub.server.requests if "/api/" not in request.path]


@pytest.mark.parametrize(
    ("url", "commit", "path"),
    [
        ("hf://owner/net/sub/model.safetensors", "a", "sub/model.safetensors"),
        ("hf://owner/net@main/sub/model.safetensors", "a", "sub/model.safetensors"),
        ("hf://models/owner/net@v1.0/sub", "c", "sub"),
        ("hf://owner/net@refs/pr/1", "b", ""),
        ("hf://owner/net", "a", ""),
        ("hf://owner/net/model.safetensors.index.json", "a", "model.safetensors.index.json"),
    ],
)
def test_the_same_as_of_the_local_file(url: str, commit: str, path: str, hub: Hub) -> None:
    here = str(hub.server.root / (commit * 40) / path)
    for verb in ("ls", "stats"):
        there = hub.run(verb, url)
        local = subprocess.run([sys.executable, "-m", "torchparams", verb, here], capture_output=True, text=True)
        assert there.stdout.splitlines()[1:] == local.stdout.splitlines()[1:]
        assert there.stdout.startswith(url)
        assert there.stderr.startswith("transferred ") and there.stderr.count("\n") == 1


def test_a_file_takes_one_request_and_its_redirection(hub: Hub) -> None:
    hub.run("ls", "hf://owner/net/sub/model.safetensors")
    assert paths(hub) == ["/owner/net/resolve/main/sub/model.safetensors", f"/{'a' * 40}/sub/model.safetensors"]


def test_the_shards_are_of_one_commit(hub: Hub) -> None:
    def moving(handler: Any, request: Request) -> bool:
        answered = hub.answer(handler, request)
        if "/resolve/" in request.path:
            hub.commits["main"] = "b" * 40  # somebody pushes after the first file
        return answered

    hub.server.answer = moving
    hub.run("stats", "hf://owner/net/model.safetensors.index.json")
    files = [path for path in paths(hub) if path.endswith(".safetensors")]
    assert files and all("a" * 40 in path for path in files)


def test_the_local_cache_is_used(hub: Hub) -> None:
    link = hub.cache("a" * 40, "sub/model.safetensors", ref="main")
    ran = hub.run("stats", "hf://owner/net/sub/model.safetensors")
    assert ran.stdout.startswith(str(link))
    assert [request.method for request in asked(hub)] == ["HEAD"]  # is it still the branch's?
    assert ran.stderr.startswith("transferred 0 B in 1 request")
    hub.server.reset()
    ran = hub.run("stats", f"hf://owner/net@{'a' * 40}/sub/model.safetensors")
    assert ran.stdout.startswith(str(link)) and not hub.server.requests and ran.stderr == ""


def test_a_cache_that_is_behind_is_not_used(hub: Hub) -> None:
    hub.cache("a" * 40, "sub/model.safetensors", ref="main")
    hub.commits["main"] = "b" * 40
    ran = hub.run("ls", "hf://owner/net/sub/model.safetensors")
    assert ran.stdout.startswith("hf://owner/net/sub/model.safetensors")
    assert hub.server.sent > 0


def test_offline(hub: Hub) -> None:
    link = hub.cache("a" * 40, "sub/model.safetensors", ref="main")
    hub.offline = True
    assert hub.run("ls", "hf://owner/net/sub/model.safetensors").stdout.startswith(str(link))
    assert hub.run("ls", "hf://owner/net@main/sub/").stdout.startswith(str(link))
    assert hub.run("ls", "hf://owner/net/none.safetensors", status=2).stderr == (
        "torchparams: hf://owner/net/none.safetensors: HF_HUB_OFFLINE is set, but the file is not in the local "
        "cache of the hub\n"
    )
    assert not hub.server.requests


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://owner/net/none.safetensors", "The server responded 404 Not Found"),
        ("hf://owner/other/model.safetensors", "The server responded 404 Not Found"),
        ("hf://owner/net@nowhere/model.safetensors", "The server responded 404 Not Found"),
        ("hf://owner", "The URL does not name a repository of the hub. Write hf://owner/repo[@revision]/path."),
    ],
)
def test_what_is_not_there(url: str, said: str, hub: Hub) -> None:
    assert hub.run("ls", url, status=2).stderr == f"torchparams: {url}: {said}\n"
