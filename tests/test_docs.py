"""The documentation is correct: its examples run, and it matches the source tree."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
from check_imports import modules
from generate_docs import PAGES
from run_docs import CHECKPOINT, Block, _console, _python, run_page

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


# oracles/test_remote_docs.py and oracles/test_catalog.py run these, with a server and the extras that they need.
ELSEWHERE = ("catalog.md", "remote.md")


@pytest.mark.parametrize("path", [each for each in DOCS if each.name not in ELSEWHERE], ids=lambda path: path.name)
def test_a_page_does_what_it_shows(path: Path) -> None:
    assert CHECKPOINT.exists(), f"{CHECKPOINT} is what the pages show: make test obtains it"
    assert run_page(path) == []


def test_a_page_that_shows_what_is_not_so_is_found() -> None:
    assert "1 + 1" in _python(Block("page", 3, "python", ">>> 1 + 1\n3\n"), {})
    assert _python(Block("page", 3, "python", "raise ValueError('no')\n"), {}) == "ValueError: no"
    assert "prints\ntorchparams: nothing: No such" in _console(
        Block("page", 3, "console", "$ torchparams ls nothing\ntorchparams: it\n")
    )
    assert "fails with\ntorchparams: nothing" in _console(
        Block("page", 3, "console", "$ torchparams ls nothing\n...\n")
    )


def test_there_are_forty_tasks_each_as_a_command_and_in_python() -> None:
    tasks = re.split(r"^### \d+\. ", (ROOT / "docs" / "how_to.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(tasks) == 40
    for task in tasks:
        assert "```python\n" in task, task
        assert "```console\n$ torchparams " in task, task


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert (ROOT / name).read_text() == PAGES[name](), "run make docs"


# Examples that need a window of their own: they start processes or print to the real standard output.
# Callbacks import the library that they are for: oracles/ tests them.
NAMES = sorted(
    name
    for name in modules()
    if not name.endswith(("__main__", "._kernels", "._sums", "._compare")) and not name.startswith("record.callbacks.")
)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_module_run(name: str) -> None:
    module = importlib.import_module(f"torchparams.{name}" if name else "torchparams")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## The tree") :]
    tree = tree[tree.index("```text\n") + 8 : tree.index("\n```\n")]
    shown: list[str] = []
    stack: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[:depth], line.split()[0].rstrip("/")]
        shown.append("/".join(stack))
    for path in shown:
        assert (ROOT / path).exists(), path
    package = ROOT / "src" / "torchparams"
    parts = {
        str(path.relative_to(ROOT))
        for path in package.iterdir()
        if (path.is_dir() or path.suffix == ".py") and path.name not in ("__pycache__", "__main__.py")
    }
    assert parts <= set(shown), sorted(parts - set(shown))


def test_the_readme_is_short_and_its_figures_name_their_script() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    for page in (
        text,
        (ROOT / "docs" / "how_fast.md").read_text(),
        (ROOT / "docs" / "beside_other_tools.md").read_text(),
    ):
        for row in re.findall(r"^\|.*\d (?:m?s|[GM]B/s|[GM]B)\b.*\|$", page, flags=re.MULTILINE):
            script = re.search(r"`(bench_\w+\.py)` \|$", row)
            assert script, row
            assert (ROOT / "bench" / script[1]).exists(), row


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_to_a_heading_lead_to_one() -> None:
    for page in DOCS:
        text = page.read_text()
        for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            target = (page.parent / path).read_text() if path else text
            # As GitHub makes them: without punctuation, a hyphen for each space.
            anchors = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.+)$", target, flags=re.MULTILINE)
            }
            assert anchor in anchors, f"{page.name}: {path}#{anchor}"


def test_the_page_on_parameters_lists_every_sentence_with_its_verdict() -> None:
    text = (ROOT / "docs" / "parameters.md").read_text()
    judged = re.findall(r'^### "(.*?)\.?"\n\n\*\*(True|False)', text, flags=re.MULTILINE)
    assert len(judged) == len(re.findall(r'^### "', text, flags=re.MULTILINE)) >= 15
    assert re.findall(r"^\| \[(.*)\]\(#.*\) \| (\w+) \|$", text, flags=re.MULTILINE) == [
        (sentence, verdict.lower()) for sentence, verdict in judged
    ]
