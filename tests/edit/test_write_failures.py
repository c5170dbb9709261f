"""Failures while writing: a clear error, an unchanged target, no temporary files, and unchanged sources."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import crash_runs
import torchparams as tp
from torchparams.edit.write import directory, execute
from torchparams.errors import PlanError, SourceError, TruncatedFile, WriteError
from torchparams.io import system as _system
from torchparams.io import write
from torchparams.io.attributes import _attributes
from torchparams.testing import safetensors_bytes, sample

if TYPE_CHECKING:
    from collections.abc import Callable

TENSORS = {f"t{i}": sample("float32", (50, 3), seed=i) for i in range(4)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS))
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "target.safetensors"
    path.write_bytes(safetensors_bytes({"old": sample("float32", (3,))}))
    return path


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, where: object = _system, nth: int = 1) -> None:
    """Let the nth call of a function fail with an error of the system."""
    real = getattr(where, name)
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(where, name, call)


def refused(error: type[Exception], run: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        run()
    return str(caught.value)


def convert(source: object, target: Path, **options: Any) -> Callable[[], object]:
    return lambda: tp.convert(source, target, overwrite=True, **options).run()


def is_as_it_was(source: Path, target: Path) -> None:
    assert tp.of(target).names == ["old"]
    assert os.listdir(target.parent) == [target.name]
    assert source.read_bytes() == safetensors_bytes(TENSORS)


# --- the disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["create", "resize", "reserve", "write", "copy", "sync", "rename"])
def test_a_full_disk(name: str, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, name, errno.ENOSPC)
    assert refused(WriteError, convert(source, target)) == (
        f"{target}: Writing failed: no space left on device. The target is unchanged, and temporary "
        "files were removed. Free some space, or write elsewhere."
    )
    is_as_it_was(source, target)


def test_a_full_disk_while_something_is_computed(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "write", errno.ENOSPC)
    assert "no space left on device" in refused(WriteError, convert(source, target, dtype="f64"))
    is_as_it_was(source, target)


def test_a_disk_with_too_little_room_is_known_before(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tp.convert(source, target, overwrite=True)
    monkeypatch.setattr(write, "free_bytes", lambda folder: 1000)
    expected = (
        f"{target}: It needs {plan.file_bytes / 1024:.2f} KiB; the disk has 0.98 KiB free. "
        "Free some space, or write elsewhere."
    )
    assert refused(PlanError, plan.run) == expected
    assert refused(PlanError, convert(source, target)) == expected
    is_as_it_was(source, target)


def test_a_limit_on_the_size_of_files(source: Path, target: Path) -> None:
    code = (
        "import resource, signal, sys; import torchparams as tp;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]));"
        "sys.exit(__import__('torchparams.cli.app', fromlist=['run']).run(['convert', '-f', *sys.argv[1:]]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(source), str(target)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f"torchparams: {target}: Writing failed: file too large. The target is unchanged, and "
        "temporary files were removed. Split it (max_shard_size), or raise the limit (ulimit -f).\n"
    )
    is_as_it_was(source, target)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_no_permission(number: int, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "create", number)
    reason = os.strerror(number)
    assert refused(WriteError, convert(source, target)) == (
        f"{target}: Writing failed: {reason[0].lower()}{reason[1:]}. The target is unchanged, and "
        "temporary files were removed. Choose a directory with write permission."
    )
    is_as_it_was(source, target)


def test_a_directory_that_is_not_there(source: Path, tmp_path: Path) -> None:
    assert refused(PlanError, convert(source, tmp_path / "no" / "x.safetensors")) == (
        f"{tmp_path}/no: Directory not found. Make it first: mkdir -p {tmp_path}/no."
    )


@pytest.mark.parametrize("scenario", [name for name in crash_runs.SCENARIOS if name != "two threads"])
def test_any_call_may_fail(scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    name, before, options = crash_runs.SCENARIOS[scenario]
    source = tmp_path / "source.safetensors"
    source.write_bytes(safetensors_bytes(crash_runs.weights(2)))
    pristine, place = tmp_path / "pristine", tmp_path / "place"
    pristine.mkdir()
    before(pristine / name)
    old, files = crash_runs.state(pristine / name), crash_runs.listing(pristine)
    count = 0
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    real = {call: getattr(_system, call) for call in crash_runs.CALLS if call != "lock"}

    def counted(call: str) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real[call](*arguments)

        return counting

    for call in real:
        monkeypatch.setattr(_system, call, counted(call))
    moment, failed = 0, True
    while failed:
        moment, count = moment + 1, -1000
        if place.exists():
            shutil.rmtree(place)
        shutil.copytree(pristine, place)
        plan = tp.convert(source, f"{place / name}", overwrite=True, **options)
        count = 0
        try:
            plan.run()
            failed = count >= moment  # a call that only cleans up may fail unnoticed
        except WriteError as error:
            found = crash_runs.state(place / name)
            if "The target is unchanged" in str(error):
                assert found == old, f"moment {moment}"
                # Shards that had no index may have one now.
                left = [path for path in crash_runs.listing(place) if "index" not in path]
                assert left == [path for path in files if "index" not in path], f"moment {moment}"
            else:
                assert "The new target is in place, but a power failure may revert it" in str(error)
                assert found != old
        count = -1000
        assert source.read_bytes() == safetensors_bytes(crash_runs.weights(2))
    assert moment > 8


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    crash_runs.shards(folder, 1)
    old, files = crash_runs.state(folder), crash_runs.listing(folder)
    failing(monkeypatch, "link", errno.EPERM)
    message = refused(WriteError, lambda: tp.convert(
        crash_runs.weights(2), folder, max_shard_size=640, overwrite=True
    ).run())  # fmt: skip
    assert "operation not permitted" in message
    assert crash_runs.state(folder) == old
    assert crash_runs.listing(folder) == files


def test_a_file_system_without_locks(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_system, "lock", lambda fd: None)
    convert(source, target)()
    assert tp.of(target).names == list(TENSORS)
    folder = target.parent / "shards"
    for _ in range(2):
        convert(source, folder, max_shard_size=700)()
        assert tp.of(folder).names == list(TENSORS)
    assert not [name for _, _, names in os.walk(target.parent) for name in names if name.startswith(".")]


# --- the source ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "f64"}])
def test_a_disk_that_cannot_be_read(
    options: dict[str, Any], source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("copy_file_range", "pread", "preadv"):
        plan = tp.convert(source, target, overwrite=True, **options)
        with monkeypatch.context() as patch:

            def broken(*_: Any) -> int:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            patch.setattr(os, name, broken)
            if name == "copy_file_range":
                patch.setattr(os, "pread", broken)
            if name == "pread" or (name == "copy_file_range" and options) or (name == "preadv" and not options):
                continue  # not what this way reads by
            assert refused(SourceError, plan.run) == f"{source}: The file cannot be read: Input/output error"
        is_as_it_was(source, target)


def test_a_torch_file_from_a_disk_that_cannot_be_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tp.convert(source, tmp_path / "x.pt")

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    assert refused(SourceError, plan.run) == f"{source}: The file cannot be read: Input/output error"
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_a_source_that_changes_before(source: Path, target: Path) -> None:
    plan = tp.convert(source, target, overwrite=True)
    os.utime(source, ns=(1, 1))
    assert refused(SourceError, plan.run) == (
        f"{source}: The file changed after the plan was made. Open the file again, and make a new plan."
    )
    is_as_it_was(source, target)


@pytest.mark.parametrize("options", [{}, {"dtype": "f64"}])
def test_a_source_that_changes_while_it_is_read(
    options: dict[str, Any], source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _system.sync

    def touching(fd: int) -> None:
        os.utime(source, ns=(1, 1))
        real(fd)

    monkeypatch.setattr(_system, "sync", touching)
    message = refused(SourceError, convert(source, target, **options))
    assert message.startswith(f"{source}: The file changed ")
    is_as_it_was(source, target)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_source_that_is_cut_while_it_is_read(
    suffix: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _system.reserve

    def cutting(fd: int, size: int) -> None:
        os.truncate(source, 700)
        real(fd, size)

    monkeypatch.setattr(_system, "reserve", cutting)
    path = tmp_path / f"x{suffix}"
    message = refused(SourceError, convert(source, path))
    assert message.startswith(f"{source}: The file ")
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_a_source_that_ends_too_soon_says_where(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_system, "copy", lambda *_: 0)
    start = tp.of(source).info("t0").location
    assert start is not None
    assert refused(TruncatedFile, convert(source, target)) == (
        f"{source}: The file ends at byte {start.start}; it was longer when it was listed"
    )
    is_as_it_was(source, target)


def test_a_target_that_is_a_source(source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    for path in (source, link):
        assert refused(PlanError, lambda path=path: tp.convert(source, path)) == (  # type: ignore[misc]
            f"{path}: The target is a source. Write elsewhere; or, to replace it once the new one is complete, pass "
            "overwrite=True (--force)."
        )
    tp.convert(source, source, dtype="bf16", overwrite=True, allow_overflow=True).run()
    assert {str(info.dtype) for info in tp.of(source).infos.values()} == {"bfloat16"}
    folder = tmp_path / "shards"
    tp.convert(source, folder, max_shard_size=400).run()
    assert refused(PlanError, lambda: tp.convert(folder, folder)) == (
        f"{folder}: The target directory contains a source. Write elsewhere; or, to replace it once the new one is "
        "complete, pass overwrite=True (--force)."
    )
    before = crash_runs.state(folder)
    tp.convert(folder, folder, max_shard_size=1000, overwrite=True).run()
    assert crash_runs.state(folder) == before
    assert sum("-of-" in name for name in os.listdir(folder)) == 2


# --- the target ------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced_unasked(source: Path, target: Path, tmp_path: Path) -> None:
    assert refused(PlanError, lambda: tp.convert(source, target)) == (
        f"{target}: It exists already. To replace it once the new one is complete, pass overwrite=True (--force)."
    )
    (tmp_path / "file").write_text("")
    assert refused(PlanError, lambda: tp.convert(source, f"{tmp_path}/file/")) == (
        f"{tmp_path}/file: It is a file, but the plan writes a directory. Choose another target."
    )
    (tmp_path / "folder.safetensors").mkdir()
    plan = tp.convert(source, tmp_path / "folder.safetensors")  # a directory, whatever its name
    assert plan.is_directory
    folder = tmp_path / "shards"
    tp.convert(source, folder, max_shard_size=700).run()
    assert refused(PlanError, lambda: tp.convert(TENSORS, folder)) == (
        f"{folder}: The directory already holds a checkpoint: model-00001-of-00004.safetensors, "
        "model-00002-of-00004.safetensors, model-00003-of-00004.safetensors, …. "
        "To replace it once the new one is complete, pass overwrite=True (--force)."
    )
    (folder / "pytorch_model.bin").write_text("")
    assert refused(PlanError, lambda: tp.convert(TENSORS, folder, overwrite=True)) == (
        f"{folder}: The directory already holds a checkpoint under other names: pytorch_model.bin. Write to "
        "another directory."
    )


def test_a_link_is_replaced_and_not_what_it_leads_to(source: Path, target: Path, tmp_path: Path) -> None:
    link, nowhere = tmp_path / "link.safetensors", tmp_path / "nowhere.safetensors"
    for end in (target, nowhere):
        link.unlink(missing_ok=True)
        link.symlink_to(end)
        assert refused(PlanError, lambda: tp.convert(source, link)) == (
            f"{link}: It exists already. To replace it once the new one is complete, pass overwrite=True (--force)."
        )
        convert(source, link)()
        assert not link.is_symlink()
        assert crash_runs.state(link) == crash_runs.state(source)
    is_as_it_was(source, target)
    assert not nowhere.exists()


def test_a_device_is_no_target(source: Path) -> None:
    assert refused(PlanError, lambda: tp.convert(source, os.devnull, format="torch", overwrite=True)) == (
        f"{os.devnull}: It is neither a file nor a directory. Choose another target."
    )


def test_what_appears_after_the_plan_was_made_is_not_replaced(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    plan = tp.convert(source, path)
    path.write_text("mine")
    assert "It exists already" in refused(PlanError, plan.run)
    assert path.read_text() == "mine"


def test_a_target_on_another_file_system(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        convert(source, Path(folder) / "x.safetensors")()
        assert tp.of(f"{folder}/x.safetensors").names == list(TENSORS)
    for number in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        with monkeypatch.context() as patch:
            failing(patch, "copy_file_range", number, where=os)
            convert(source, tmp_path / "y.safetensors")()
        assert crash_runs.state(tmp_path / "y.safetensors") == crash_runs.state(source)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    convert(source, tmp_path / "z.safetensors")()
    assert crash_runs.state(tmp_path / "z.safetensors") == crash_runs.state(source)


def test_two_writers_at_once(source: Path, target: Path) -> None:
    folder = target.parent / "shards"
    for path, kind in ((target, write.OneFile), (folder, directory.Directory)):
        with kind(str(path)):
            assert refused(WriteError, convert(source, path, max_shard_size=700 if path is folder else None)) == (
                f"{path}: Another process is writing to it. Wait until it finishes."
            )
    is_as_it_was(source, target)
    convert(source, folder, max_shard_size=700)()
    with directory.Directory(str(folder)):
        assert "Another process is writing to it" in refused(WriteError, convert(source, folder))
    assert tp.of(folder).names == list(TENSORS)


def test_what_killed_runs_left_is_removed_and_what_is_in_use_is_not(source: Path, target: Path) -> None:
    left = target.parent / ".other.safetensors.torchparams-partial"
    left.write_text("half")
    folder = target.parent / ".gone.torchparams-partial"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_text("half")
    (target.parent / ".mine").write_text("kept")
    busy = target.parent / "busy.safetensors"
    with write.OneFile(str(busy)):
        convert(source, target)()
        assert sorted(os.listdir(target.parent)) == [".busy.safetensors.torchparams-partial", ".mine", target.name]


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(source: Path, target: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link = target.parent / f".{target.name}.torchparams-partial"
    link.symlink_to(victim)
    assert "too many levels of symbolic links" in refused(WriteError, convert(source, target))
    assert victim.read_text() == "mine"
    assert link.is_symlink()


def test_what_a_new_file_takes_over(
    source: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule of `io/attributes.py`, for every writer of files."""
    manifest = tmp_path / "manifest.json"
    digests = tp.digest(source)
    digests.write(manifest)
    folder = tmp_path / "shards"
    tp.convert(TENSORS, f"{folder}/", max_shard_size=40).run()
    shard, index = folder / "model-00001-of-00004.safetensors", folder / "model.safetensors.index.json"
    runs: dict[Path, Callable[[], object]] = {
        target: convert(source, target),
        manifest: lambda: digests.write(manifest),
        shard: lambda: tp.convert(TENSORS, f"{folder}/", max_shard_size=40, overwrite=True).run(),
        index: lambda: tp.convert(TENSORS, f"{folder}/", max_shard_size=40, overwrite=True).run(),
    }
    for path, run in runs.items():
        with suppress(PermissionError):  # only root gives files away
            os.chown(path, 1234, 5678)
        with suppress(OSError, AttributeError):  # a file system, or a system, without attributes
            os.setxattr(path, "user.note", b"kept")
        path.chmod(0o6754)
        before, attributes = path.stat(), _attributes(str(path))
        run()
        after = path.stat()
        assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
        assert after.st_mode & 0o7777 == 0o754
        assert _attributes(str(path)) == attributes


def test_what_a_new_file_cannot_take_over_is_said(
    source: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "operation not permitted")

    manifest = tmp_path / "manifest.json"
    tp.digest(source).write(manifest)
    monkeypatch.setattr(_system, "change_owner", refuse)
    monkeypatch.setattr(_system, "set_attribute", refuse)
    monkeypatch.setattr(os, "listxattr", lambda path: ["user.note"], raising=False)
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"kept", raising=False)
    real = os.stat

    def other(at: Any, *arguments: Any, **options: Any) -> os.stat_result:
        about = real(at, *arguments, **options)
        if str(at) not in (str(target), str(manifest)):
            return about
        return os.stat_result((*about[:4], 1234, 5678, *about[6:]), {"st_mtime_ns": about.st_mtime_ns})

    for path in (target, manifest):
        path.chmod(0o664)
    monkeypatch.setattr(os, "stat", other)
    said = "not kept from the replaced file: the group 5678, the owner 1234, the attribute user.note"
    assert tp.convert(source, target, overwrite=True).run().notes == (said,)
    assert tp.digest(source).write(manifest) == (said,)
    monkeypatch.setattr(os, "stat", real)
    for path in (target, manifest):
        # The file has another group now, which may do no more than everybody may.
        assert path.stat().st_mode & 0o777 == 0o644


def test_nobody_reads_a_private_file_while_it_is_replaced(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.chmod(0o600)
    modes = set()
    write_bytes = _system.write

    def looking(fd: int, data: Any, offset: int) -> None:
        modes.add(os.fstat(fd).st_mode & 0o777)
        write_bytes(fd, data, offset)

    monkeypatch.setattr(_system, "write", looking)
    convert(source, target)()
    assert modes == {0o600}


def test_a_link_as_target_takes_the_attributes_of_what_it_leads_to(source: Path, tmp_path: Path) -> None:
    private, link = tmp_path / "private.safetensors", tmp_path / "link.safetensors"
    private.write_bytes(b"mine")
    private.chmod(0o600)
    link.symlink_to(private)
    convert(source, link)()
    assert not link.is_symlink()
    assert link.stat().st_mode & 0o777 == 0o600
    assert private.read_bytes() == b"mine"


@pytest.mark.parametrize("length", [200, 232, 233, 255])
def test_names_of_any_length_can_be_written(length: int, source: Path, tmp_path: Path) -> None:
    target = tmp_path / ("é" * 20 + "n" * (length - 52) + ".safetensors")
    assert len(os.fsencode(target.name)) == length
    for _ in range(2):
        convert(source, target)()
    assert crash_runs.state(target) == crash_runs.state(source)
    manifest = tmp_path / ("m" * length)
    tp.digest(source).write(manifest)
    assert tp.verify(source, manifest).ok
    folder = tmp_path / ("d" * length)
    tp.convert(source, f"{folder}/").run()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {source.name, target.name, manifest.name, folder.name} | {p.name for p in tmp_path.iterdir() if p.is_dir()}
    )


def test_a_name_that_is_too_long_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    target = tmp_path / ("n" * 245 + ".safetensors")
    message = f"{target}: The file name has 257 bytes; the limit of the file system is 255. Choose a shorter name."
    assert refused(WriteError, lambda: tp.convert(source, target)) == message
    assert "the limit of the file system is 255" in refused(
        WriteError, lambda: tp.digest(source).write(tmp_path / ("n" * 256))
    )


def test_links_of_the_system_are_not_replaced(source: Path) -> None:
    if os.path.islink("/dev/stdout"):
        assert refused(WriteError, lambda: tp.digest(source).write("/dev/stdout")).startswith(
            "/dev/stdout: Not a regular"
        )
        assert os.path.islink("/dev/stdout")


def test_permissions_are_kept_and_others_are_those_of_new_files(source: Path, target: Path, tmp_path: Path) -> None:
    target.chmod(0o640)
    convert(source, target)()
    assert target.stat().st_mode & 0o777 == 0o640
    mask = os.umask(0o022)
    try:
        convert(source, tmp_path / "new.safetensors")()
    finally:
        os.umask(mask)
    assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o644


def test_other_files_of_a_directory_stay(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    number = folder.stat().st_ino
    for size in (700, 700, 1000, None, 700):
        convert(source, folder, max_shard_size=size)()
        assert tp.of(folder).names == list(TENSORS)
        assert (folder / "config.json").read_text() == "{}"
    assert folder.stat().st_ino == number
    assert sorted(os.listdir(folder)) == [
        *("config.json", *(f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)), "model.safetensors.index.json"),
    ]


def test_interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for inline in (1 << 22, -1):
        monkeypatch.setattr(execute, "INLINE", inline)
        plan = tp.convert(source, target, dtype="f64", overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            plan.run(interrupt)
        is_as_it_was(source, target)


def test_an_error_in_a_thread_stops_the_others(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchparams.engines import threads

    monkeypatch.setattr(execute, "INLINE", -1)
    monkeypatch.setattr(execute, "PIECE", 100)
    monkeypatch.setattr(threads, "processors", lambda: 4)
    failing(monkeypatch, "copy", errno.ENOSPC, nth=3)
    assert "no space left on device" in refused(WriteError, convert(source, target))
    is_as_it_was(source, target)


def test_a_journal_that_is_nonsense_is_passed_over(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    convert(source, folder, max_shard_size=700)()
    (folder / write.JOURNAL).write_bytes(b'\xff\n[]\n{}\n{"index": ')
    convert(source, folder, max_shard_size=700)()
    assert tp.of(folder).names == list(TENSORS)
    assert np.array_equal(tp.of(folder).numpy("t1"), TENSORS["t1"], equal_nan=True)
    assert not (folder / write.JOURNAL).exists()


def test_a_broken_checkpoint_is_replaced(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    convert(source, folder, max_shard_size=700)()
    (folder / "model-00002-of-00004.safetensors").write_bytes(b"")
    convert(source, folder, max_shard_size=700)()
    assert tp.of(folder).names == list(TENSORS)
