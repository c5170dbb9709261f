"""Output: messages, tables and JSON are complete and harmless for all names and paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import torchparams as tp
from command import command
from torchparams import limits
from torchparams.errors import FileFormatError, LimitExceeded, PlanError, TorchParamsError, WriteError
from torchparams.io import system
from torchparams.measure.digest import Digests
from torchparams.render.json import json_text
from torchparams.render.tree import Column, Gap, Row, Table, Text, Tree, to_html, to_text
from torchparams.testing import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOSTILE = "a\x1b[2J\x9b31m\n\r\x07\u202e\u2066\u2028\x7f\u200bz"
ESCAPED = "a\\x1b[2J\\x9b31m\\n\\r\\x07\\u202e\\u2066\\u2028\\x7f\\u200bz"
LONE = "w\ud800"


def harmless(text: str) -> bool:
    """Whether a terminal shows every character of a text as it is."""
    return all(line.isprintable() for line in text.split("\n"))


# --- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["what", "where", "exists", "hint"])
def test_every_part_of_a_message_is_escaped(part: str) -> None:
    parts: dict[str, Any] = {"what": "It broke", part: HOSTILE}
    message = str(TorchParamsError(parts.pop("what"), **parts))
    assert ESCAPED in message
    assert message.isprintable()


def test_every_part_of_a_report_is_escaped() -> None:
    table = Table((Column("name"),), (Row((HOSTILE,)), Gap(HOSTILE)))
    report = Tree((Text(HOSTILE.replace("\n", "")), table))
    assert harmless(to_text(report))
    assert harmless(to_html(report))
    assert to_html(Tree((Text("one\ntwo"),))) == "<p>one<br>two</p>"


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A directory whose path and names are hostile, with a checkpoint of hostile names."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    tensors = {f"{HOSTILE}.{i}.w": np.full((2, 2), i, np.float32) for i in range(3)}
    (folder / f"{HOSTILE}.safetensors").write_bytes(safetensors_bytes(tensors, {"k" + HOSTILE: HOSTILE}))
    torch.save({HOSTILE: {LONE: torch.ones(2), HOSTILE: HOSTILE}}, folder / f"{HOSTILE}.pt")
    (folder / f"{HOSTILE}-00001-of-00009.bin").write_bytes(b"PK\x03\x04")
    (folder / f"{HOSTILE}x.index.json").write_text(json.dumps({"weight_map": {HOSTILE: HOSTILE}}))
    yield folder


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "index.json", "directory", "missing"])
def test_no_command_prints_what_drives_a_terminal(
    kind: str, as_json: bool, hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = {"directory": hostile, "missing": hostile / f"{HOSTILE}.safetensor"}.get(kind, hostile / f"{HOSTILE}.{kind}")
    if kind == "index.json":
        file = hostile / f"{HOSTILE}x.index.json"
    out = hostile / f"{HOSTILE}out.pt"
    more = ["--json"] if as_json else []
    for arguments in (
        ["ls", file, *more],
        ["ls", file, "--tree", *more],
        ["ls", f"{file}#{HOSTILE}", *more],
        ["ls", file, "-s", HOSTILE, *more],
        ["stats", file, *more],
        ["digest", file, *more],
        ["digest", file, file, *more],
        ["verify", file, *more],
        ["verify", file, file, *more],
        ["diff", file, file, "--numeric", *more],
        ["show", file, HOSTILE, *more],
        ["show", file, f"{HOSTILE}.0.w", *more],
        ["convert", file, out, "--dtype", "bf16", "-f", *more],
        ["convert", file, out, "--dry-run", "-f", *more],
        ["merge", file, file, out, "-f", *more],
        ["explain", f"{file}:{HOSTILE}", *more],
        ["audit", f"{HOSTILE}:{HOSTILE}", *more],
        ["--debug", "ls", file, HOSTILE],
        [HOSTILE],
    ):
        ran = command(capsys, *arguments)
        assert harmless(ran.out), arguments
        assert harmless(ran.err), arguments
        assert "internal error" not in ran.err, arguments
        assert "--debug" in arguments or ran.err.count("\n") <= 4, arguments
        if as_json and ran.out:
            json.loads(ran.out)


# --- JSON --------------------------------------------------------------------------------------


def test_json_is_whole_or_absent(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = [LONE, HOSTILE, "é", "😀", "\U000e0001"]
    text = json_text(names)
    assert json.loads(text) == names
    assert harmless(text)
    assert "é" in text
    assert json_text(names, ascii_only=True).isascii()
    file = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2), LONE: torch.ones(3)}, file)
    ran = command(capsys, "ls", file, "--json")
    assert ran.status == 0
    assert [entry["name"] for entry in ran.json["parameters"]] == ["a", LONE]


def test_nothing_is_printed_of_json_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    from torchparams.render.json import print_json

    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"fine": list(range(100_000)), "wrong": float("nan")}, sys.stdout)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-16", "cp437:strict"])
def test_no_encoding_of_the_output_crashes_a_command(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "modèle-😀.safetensors"
    file.write_bytes(safetensors_bytes({"層.😀.w": np.arange(4, dtype=np.float32), LONE[:1]: np.ones(2, np.float32)}))
    program = (
        "import sys; from torchparams.cli.app import main; sys.argv[0] = 'torchparams'; main()"  # as the installed one
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}

    def run(*arguments: str) -> tuple[int, str, str]:
        ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, env=environment)
        codec = encoding.partition(":")[0]
        return ran.returncode, ran.stdout.decode(codec), ran.stderr.decode(codec)

    status, out, error = run("stats", str(file), "-s", "*.*.w")
    assert (status, error) == (0, "")
    assert "1 tensor" in out
    status, out, error = run("ls", str(file), "--json")
    assert (status, error) == (0, "")
    assert [entry["name"] for entry in json.loads(out)["parameters"]] == ["層.😀.w", "w"]
    status, out, error = run("ls", str(tmp_path / "modèle-😀.safetensor"))
    assert (status, out) == (2, "")
    assert "Did you mean" in error


# --- names -------------------------------------------------------------------------------------


def test_a_name_has_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "n" * (limits.NAME_LENGTH + 1)
    stored, pickled, nested, manifest = (tmp_path / name for name in ("a.safetensors", "b.pt", "c.pt", "d.json"))
    stored.write_bytes(safetensors_bytes({long: np.ones(2, np.float32)}))
    torch.save({long: torch.ones(2)}, pickled)
    torch.save({long: {"a": torch.ones(2)}}, nested)
    said = f"The name 'n{'n' * 78}…' has 4,097 characters; the limit is 4,096"
    for file in (stored, pickled, nested):
        with pytest.raises(LimitExceeded) as error:
            tp.of(file)
        assert said in str(error.value)
    torch.save({"a": torch.ones(2), "vocabulary": {long: 1}}, nested)  # what is no tensor may have any name
    assert tp.of(nested).names == ["a"]
    with pytest.raises(PlanError, match="has 4,097 characters; the limit is 4,096"):
        tp.convert({long: np.ones(2)}, tmp_path / "out.safetensors")
    with pytest.raises(PlanError, match="has 4,097 characters; the limit is 4,096"):
        tp.convert({long: np.ones(2)}, tmp_path / "out.pt")
    tp.digest({long: np.ones(2)}).write(manifest)
    with pytest.raises(LimitExceeded, match="has 4,097 characters"):
        Digests.read(manifest)
    monkeypatch.setattr(limits, "NAME_LENGTH", 5000)
    assert tp.of(stored).names == tp.of(pickled).names == [long]
    assert Digests.read(manifest).tensors.keys() == {long}


@pytest.mark.parametrize("target", ["out.safetensors", "out/"])
def test_half_of_a_surrogate_pair_is_refused_before_anything_is_written(target: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({LONE: torch.ones(2), "a": torch.ones(2)}, file)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(PlanError) as error:
        tp.convert(file, tmp_path / target, max_shard_size=8 if target == "out/" else None)
    assert str(error.value) == (
        "The name 'w\\ud800' contains the lone surrogate \\ud800, which UTF-8 cannot encode. Rename it."
    )
    with pytest.raises(PlanError, match=r"The metadata .* contains"):
        tp.convert({"a": np.ones(2)}, tmp_path / "out.safetensors", metadata={"k": LONE})
    module = torch.nn.Module()
    module.register_parameter(LONE, torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(PlanError, match="lone surrogate"):
        tp.save(module, tmp_path / "out.safetensors")
    with pytest.raises(WriteError, match="JSON cannot store a name"):
        tp.digest(file).write(tmp_path / "manifest.json")
    assert sorted(os.listdir(tmp_path)) == before
    written = tmp_path / "copy.pt"  # a pickle can hold it
    tp.convert(file, written).run()
    assert list(torch.load(written, weights_only=True)) == [LONE, "a"]
    assert tp.of(written).names == [LONE, "a"]


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out/"])
def test_what_was_written_is_read_before_it_takes_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / name
    weights = {"a.w": np.ones((2, 3), np.float32), "b.w": np.arange(3, dtype=np.float32)}
    options: dict[str, Any] = {"max_shard_size": 24} if name == "out/" else {}
    tp.convert(weights, f"{tmp_path}/{name}", **options).run()
    before = tp.digest(target).digest
    write = system.write

    def damaging(fd: int, data: Any, offset: int) -> None:
        write(fd, bytes(data).replace(b"a.w", b"c.w") if len(data) else data, offset)

    monkeypatch.setattr(system, "write", damaging)
    with pytest.raises(WriteError) as error:
        tp.convert({name: 2 * weight for name, weight in weights.items()}, target, overwrite=True, **options).run()
    assert "The new file does not match the plan: " in str(error.value)
    assert str(error.value).endswith("The target is unchanged, and temporary files were removed.")
    monkeypatch.undo()
    assert tp.digest(target).digest == before
    assert not [left for left in os.listdir(tmp_path) if left.startswith(".")]


def test_many_tensors_are_read_back(tmp_path: Path) -> None:
    weights = {f"layers.{i}.w": np.full(1, i, np.float32) for i in range(60_000)}
    tp.convert(weights, tmp_path / "out.pt").run()
    assert len(tp.of(tmp_path / "out.pt")) == 60_000


def test_a_manifest_with_a_hostile_name_reads_back(tmp_path: Path) -> None:
    made = tp.digest({HOSTILE: np.ones(2)})
    made.write(tmp_path / "manifest.json")
    assert Digests.read(tmp_path / "manifest.json").tensors.keys() == {HOSTILE}
    (tmp_path / "broken.json").write_text('{"format": "torchparams manifest"}')
    with pytest.raises(FileFormatError):
        Digests.read(tmp_path / "broken.json")
