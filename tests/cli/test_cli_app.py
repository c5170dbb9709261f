"""Behaviour common to all commands: errors in one line, exit statuses, help, version."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from command import command
from torchparams import __version__
from torchparams.cli import COMMANDS
from torchparams.cli.complete import columns, tensor_names
from torchparams.cli.show import show
from torchparams.testing import safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes({"fc.weight": sample("float32", (2, 3)), "fc.bias": sample("float32", (2,))}))
    return file


def test_the_version_says_which_kernels_run(capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "--version")
    assert ran.status == 0
    assert ran.out.startswith(f"torchparams {__version__} (Python 3.")
    assert "kernels: " in ran.out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_help_lists_every_command_with_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, *arguments)
    assert (ran.status, ran.err) == (0, "")
    assert "    torchparams ls model.safetensors  " in ran.out
    listed = ran.out[ran.out.index("Commands:") :].split()
    assert next(word for word in listed if word in COMMANDS) == COMMANDS[0]
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_by_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, name, "--help")
    assert ran.status == 0
    assert "  Examples:\n    torchparams " + name + " " in ran.out
    assert "\x08" not in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lss"], "torchparams: No such command 'lss'. Did you mean 'ls'? See torchparams --help"),
        (["ls"], "torchparams: Missing argument 'TARGET...'. See torchparams ls --help"),
        (["ls", "x", "--colour"], "torchparams: No such option '--colour'. See torchparams ls --help"),
        (["ls", "nothing.pt"], "torchparams: nothing.pt: No such file or directory"),
        (["ls", ""], "torchparams: '' names no file. Pass the path of a checkpoint, or path#inner."),
        (["ls", "#model"], "torchparams: '#model' names no file. Pass the path of a checkpoint, or path#inner."),
        (["ls", "nothing.pt", "--debug"], "torchparams.errors.SourceError: nothing.pt: No such file or directory"),
    ],
)
def test_an_error_is_one_line_and_exits_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command(capsys, *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.splitlines()[-1] == message
    assert ("Traceback" in ran.err) == ("--debug" in arguments)
    assert "--debug" in arguments or len(ran.err.splitlines()) == 1


def test_a_selector_error_points_at_the_column(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "ls", model, "-s", "fc.* |")
    assert ran.status == 2
    first, text, caret = ran.err.splitlines()
    assert first.startswith("torchparams: Selector 'fc.* |', column 7: Expected ")
    assert text == "    fc.* |"
    assert caret.index("^") == len("    fc.* |")


def test_repeated_selectors_are_a_union(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "ls", model, "--json", "-s", "fc.bias", "-s", "fc.weight & [ndim=2]")
    assert [row["name"] for row in ran.json["parameters"]] == ["fc.weight", "fc.bias"]
    assert command(capsys, "ls", model, "-s", "").status == 2


def test_a_defect_is_told_in_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("inner")

    monkeypatch.setattr("torchparams.cli.ls.table", broken)
    ran = command(capsys, "ls", model)
    assert (ran.status, ran.err) == (2, "torchparams: Internal error: KeyError: 'inner'. --debug shows where\n")


def test_ctrl_c_is_no_traceback(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchparams.cli.ls.table", interrupted)
    ran = command(capsys, "ls", model)
    assert (ran.status, ran.err) == (130, "")


def test_a_reader_that_stops_early_is_no_error(model: Path) -> None:
    nobody, pipe = os.pipe()
    os.close(nobody)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "torchparams", "ls", str(model)], stdout=pipe, stderr=subprocess.PIPE
        )
    finally:
        os.close(pipe)
    assert (process.returncode, process.stderr) == (141, b"")


def test_what_a_pipe_gets_is_plain_and_whole(model: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "torchparams", "ls", str(model)],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "20"},
    )  # fmt: skip
    assert "\x1b" not in run.stdout
    assert "fc.weight  [2, 3]  float32" in run.stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])  # bash is started for its version
def test_completion_scripts_are_there(shell: str) -> None:
    env = {**os.environ, "_TORCHPARAMS_COMPLETE": f"{shell}_source"}
    arguments = [sys.executable, "-m", "torchparams"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, env=env)
    assert f"_TORCHPARAMS_COMPLETE={shell}_complete" in run.stdout


def completed(words: str, model: Path) -> list[str]:
    """What bash proposes for The last of `words`."""
    env = {
        **os.environ,
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "_TORCHPARAMS_COMPLETE": "bash_complete",
    }
    run = subprocess.run(
        [sys.executable, "-c", "import sys; from torchparams.cli.app import main; sys.argv = ['torchparams']; main()"],
        capture_output=True, text=True, env=env, cwd=model.parent,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.split()


def test_completion_knows_commands_files_and_what_is_in_them(model: Path) -> None:
    assert completed("torchparams d", model) == ["plain,diff", "plain,digest", "plain,diagnose", "plain,delta"]
    assert completed("torchparams ls --t", model) == ["plain,--tree"]
    assert completed("torchparams ls m", model) == ["file,m"]
    assert completed(f"torchparams show {model.name} fc.", model) == ["plain,fc.weight", "plain,fc.bias"]
    assert completed("torchparams show absent.pt fc.", model) == []
    assert completed("torchparams ls m.pt --sort n", model) == ["plain,name", "plain,numel", "plain,nbytes"]


def test_what_is_proposed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = click.Context(show)
    name = show.params[1]
    context.params = {"target": str(model)}
    assert tensor_names(context, name, "") == ["fc.weight", "fc.bias"]
    monkeypatch.setattr("torchparams.cli.complete.PROPOSALS", 1)
    assert tensor_names(context, name, "fc") == ["fc.weight"]
    context.params = {"target": "antigravity:build"}
    assert tensor_names(context, name, "") == []
    assert "antigravity" not in sys.modules
    assert tensor_names(click.Context(show), name, "") == []
    assert columns(context, name, "-n") == ["-name", "-numel", "-nbytes"]


@pytest.mark.parametrize(("arguments", "status"), [("ls", 0), ("show", 2)])
def test_started_without_streams(arguments: str, status: int, model: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m torchparams "$1" "$2" >&- 2>&-', sys.executable, arguments, str(model)], check=False
    )
    assert done.returncode == status


@pytest.mark.parametrize("arguments", ["ls nope", "ls nope --debug", "ls --nope", "nope"])
def test_an_error_that_nobody_can_be_told_still_exits_2(arguments: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as closed:
        done = subprocess.run([sys.executable, "-m", "torchparams", *arguments.split()], stderr=closed)
    assert done.returncode == 2
