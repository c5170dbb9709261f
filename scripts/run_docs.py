"""Run the Python examples and commands in the documentation, and compare their output.

    python scripts/run_docs.py README.md docs/how_it_works.md

In a block of `python`, lines after `>>>` are run as doctest runs them; a block without them is run as a program. In a
block of `console`, each line after `$ ` is a command, and what follows is what it prints, `...` standing for anything.
All blocks of a page share one namespace and one directory, in which a copy of the demo's checkpoint lies.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "demo" / "silero_vad_16k.safetensors"
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    kind: str
    text: str


def blocks(path: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = path.read_text()
    return [
        Block(path.name, text.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in _BLOCK.finditer(text)
    ]


def run_page(path: Path) -> list[str]:
    """Errors of a page: a text for each block whose output differs."""
    found: list[str] = []
    namespace: dict[str, Any] = {"__name__": "docs"}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(CHECKPOINT, folder)
        os.chdir(folder)
        try:
            for block in blocks(path):
                wrong = _python(block, namespace) if block.kind == "python" else _console(block)
                if wrong:
                    found.append(f"{block.page}, line {block.line}:\n{wrong}")
        finally:
            os.chdir(here)
    return found


def _python(block: Block, namespace: dict[str, Any]) -> str:
    if ">>>" not in block.text:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), namespace)
        except Exception as error:  # an example of the page: whatever it raises is what is wrong with it
            return f"{type(error).__name__}: {error}"
        return ""
    test = doctest.DocTestParser().get_doctest(block.text, namespace, block.page, block.page, block.line - 1)
    runner = doctest.DocTestRunner(optionflags=_FLAGS, verbose=False)
    told = io.StringIO()
    runner.run(test, out=told.write, clear_globs=False)
    namespace.update(test.globs)
    return told.getvalue()


def _console(block: Block) -> str:
    from torchparams.cli.app import run

    wrong = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, expected = part.partition("\n")
        program, *arguments = shlex.split(line, comments=True)
        if program != "torchparams":
            continue  # how to install it, or make: those are tried by hand and by the Makefile
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = run(arguments)
        got = "\n".join(text.rstrip() for text in printed.getvalue().splitlines()) + "\n"
        if status == 2 and "torchparams: " not in expected:  # an error, which `...` would let pass
            wrong.append(f"$ {line}\nfails with\n{got}")
        elif not doctest.OutputChecker().check_output(expected.rstrip() + "\n", got, doctest.ELLIPSIS):
            wrong.append(f"$ {line}\nshould print\n{expected}\nprints\n{got}")
    return "\n".join(wrong)


def main(pages: list[str]) -> int:
    found = [text for page in pages for text in run_page(Path(page).resolve())]
    print("\n".join(found) or f"{len(pages)} pages do what they show")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
