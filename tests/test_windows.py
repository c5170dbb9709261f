"""What Windows lacks or forbids, imitated here: no test of this file ran on a real one."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

import torchparams as tp
from torchparams.io import system

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LACKS = (
    *("pread", "preadv", "pwrite", "pwritev", "copy_file_range", "posix_fadvise", "posix_fallocate"),
    *("fchmod", "fchown", "getxattr", "listxattr", "setxattr", "sched_getaffinity", "O_NOFOLLOW", "O_CLOEXEC"),
    *("O_NONBLOCK", "O_DIRECTORY", "getuid", "geteuid", "getgid", "mkfifo", "fork", "sendfile"),
)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LACKS:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(system, "_functions", {"fallocate64": None, "fallocate": None, "sync_file_range": None})
    monkeypatch.setattr(system, "NO_LINK", 0)
    opened = os.open

    def open_files_alone(path: str, *arguments: int, **more: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "open", open_files_alone)


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(64, 300), (7,), (), (0, 3), (1000, 33)]
    return {f"layers.{i}.weight": rng.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}


def _all(folder: Path) -> dict[str, bytes]:
    """The files of a round of conversions, with many pieces written by several threads."""
    folder.mkdir()
    a, b = str(folder / "a.safetensors"), str(folder / "b.pt")
    tp.convert(_weights(), a).run()
    tp.convert(a, b, dtype="bf16").run()
    tp.convert(b, folder / "shards", max_shard_size="50KB").run()
    tp.convert(a, folder / "copy.safetensors", selector="layers.{0,4}.**").run()
    tp.merge([a, str(folder / "shards")], folder / "merged.safetensors").run()
    assert tp.verify(b).ok
    assert tp.diff(a, tp.of(a)).same
    assert len(tp.stats(folder / "shards").rows) == 5
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_are_the_same_without_what_windows_lacks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    before = _all(tmp_path / "here")
    request.getfixturevalue("windows")
    assert not hasattr(os, "pwrite")
    assert _all(tmp_path / "there") == before
    assert len(before) >= 7


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("target", ["a.safetensors", "b.pt", "new", "shards"])
def test_no_file_is_open_when_it_is_renamed_or_removed(
    target: str, fails: bool, windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to replace, rename or remove a file that is open or mapped, also within a directory."""
    source, path = str(tmp_path / "a.safetensors"), str(tmp_path / target)
    tp.save(_weights(), source)
    tp.convert(source, tmp_path / "b.pt").run()
    tp.convert(source, tmp_path / "shards", max_shard_size="50KB").run()
    before = sorted(str(each) for each in tmp_path.rglob("*"))
    done: list[str] = []

    def refuses_open(call: Callable[..., None]) -> Callable[..., None]:
        def checked(*paths: str) -> None:
            with open("/proc/self/maps") as maps:
                used = [line.rstrip().partition("/")[2] for line in maps if "/" in line]
            used += [os.path.realpath(f"/proc/self/fd/{fd}")[1:] for fd in os.listdir("/proc/self/fd")]
            for each in paths:
                inside = (each[1:], f"{each[1:]}{os.sep}")
                if any(one == inside[0] or one.startswith(inside[1]) for one in used):
                    raise PermissionError(13, "The process cannot access the file", each)
            done.append(call.__name__)
            call(*paths)

        return checked

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refuses_open(getattr(os, name)))
    size = None if "." in target else "50KB"
    plan = tp.convert(source, path, dtype="bf16", overwrite=True, max_shard_size=size)
    if fails:
        monkeypatch.setattr(system, "sync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(tp.errors.WriteError):
            plan.run()
        assert sorted(str(each) for each in tmp_path.rglob("*")) == before
        return
    plan.run()
    assert "replace" in done
    assert not [each for each in tmp_path.rglob("*") if each.name.startswith(".")]
    assert {str(info.dtype) for info in tp.of(path).infos.values()} == {"bfloat16"}


def test_a_target_that_another_program_has_open_is_one_error(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    tp.save(_weights(), path)
    before = path.read_bytes()

    def refused(old: str, new: str) -> None:
        raise PermissionError(13, "Access is denied", old, 5, new)

    monkeypatch.setattr(system, "rename", refused)
    with pytest.raises(tp.errors.WriteError, match=r"a\.safetensors: .*denied"):
        tp.convert(path, path, dtype="bf16", overwrite=True).run()
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
