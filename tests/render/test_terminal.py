"""Reports in a terminal, and as JSON."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest

from torchparams.render import terminal
from torchparams.render.json import print_json
from torchparams.render.terminal import has_colour, print_tree, width_for
from torchparams.render.tree import Column, Row, Table, Text, Tree

REPORT = Tree(
    (
        Text("m.pt", "title"),
        Table(
            (Column("name", style="name", shrink=True), Column("dtype", style="dtype")), (Row(("a" * 40, "float32")),)
        ),
    )
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((30, 24)))


def test_a_pipe_gets_all_of_it_without_colour() -> None:
    file = io.StringIO()
    print_tree(REPORT, file)
    assert file.getvalue() == f"m.pt\n{'name':40}  dtype\n{'a' * 40}  float32\n"


def test_a_terminal_gets_what_fits_with_colour() -> None:
    file = Terminal()
    print_tree(REPORT, file)
    assert "\x1b[38;5;133mfloat32\x1b[0m" in file.getvalue()
    assert "aaaaaaaaaa…aaaaaaaaaa  " in file.getvalue()
    assert "a" * 22 not in file.getvalue()


@pytest.mark.parametrize(
    ("environment", "terminal", "colour"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_when_there_is_colour(
    environment: dict[str, str], terminal: bool, colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_colour(Terminal() if terminal else io.StringIO()) is colour


def test_json_that_every_reader_takes() -> None:
    file = io.StringIO()
    print_json({"名": [1, "nan", None]}, file)
    assert json.loads(file.getvalue()) == {"名": [1, "nan", None]}
    assert "名" in file.getvalue()
    with pytest.raises(ValueError, match="JSON"):
        print_json({"x": float("nan")}, io.StringIO())


def test_a_pager_is_as_wide_as_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in `FORCE_COLOR=1 torchparams ls … | less -R`
    size = os.terminal_size((50, 24))
    seen = []

    def of_descriptor(descriptor: int) -> os.terminal_size:
        seen.append(descriptor)
        return size

    monkeypatch.setattr(os, "get_terminal_size", of_descriptor)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # has no descriptor, as where it is caught
    monkeypatch.setattr(sys, "stdin", sys.__stdout__)
    assert width_for(io.StringIO()) == 50
    assert len(seen) == 1
    monkeypatch.setenv("COLUMNS", "60")
    assert width_for(io.StringIO()) == 60


def test_colour_without_any_terminal_has_full_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in the log of a build

    def no_terminal(descriptor: int) -> os.terminal_size:
        raise OSError("not a terminal")

    monkeypatch.setattr(os, "get_terminal_size", no_terminal)
    assert width_for(io.StringIO()) is None
    file = io.StringIO()
    print_tree(REPORT, file)
    assert "a" * 40 in file.getvalue()


def _luminance(code: int) -> float:
    """Relative luminance of a colour of the 256, as WCAG 2 defines it."""
    steps = (0, 95, 135, 175, 215, 255)
    channels = [8 + 10 * (code - 232)] * 3 if code >= 232 else [steps[(code - 16) // n % 6] for n in (36, 6, 1)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (each / 255 for each in channels)]
    return sum(share * each for share, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("style", terminal._LOOKS)
def test_every_colour_is_legible_on_black_and_on_white(style: str) -> None:
    parts = terminal._LOOKS[style].split(";")
    if parts[:2] != ["38", "5"]:
        assert parts[0] in ("", "1", "2"), "bold and dim are the terminal's own colour"
        return
    light = _luminance(int(parts[2]))
    assert int(parts[2]) >= 16, "the first 16 are the theme's"
    assert min((light + 0.05) / 0.05, 1.05 / (light + 0.05)) > 3.5


def test_yellow_would_be_found() -> None:
    assert 1.05 / (_luminance(226) + 0.05) < 1.5
    assert _luminance(16) == 0
    assert round(_luminance(231), 6) == 1
