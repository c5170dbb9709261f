"""Generate the documentation pages that come from the code.

    python scripts/generate_docs.py            write them
    python scripts/generate_docs.py --check    fail where one is not what it would be written as

A page is a function in `PAGES`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from audit_docs import audit_page
from schema_docs import schema_page

ROOT = Path(__file__).resolve().parents[1]


def command_reference() -> str:
    """`docs/cli.md`: the help of every command."""
    from torchparams.cli import COMMANDS, SUBCOMMANDS
    from torchparams.cli.app import run

    os.environ["COLUMNS"] = "100"  # help is as wide as the terminal
    pages = [
        "# The command line\n",
        "Each command mirrors a function of the same name: `torchparams stats` is `torchparams.stats`. What is "
        "written below is what `--help` prints.\n",
        "Exit statuses: 0 fine, 1 a difference or a finding, 2 an error, 130 interrupted.\n",
        "A line in the startup file of a shell completes commands, options, files and names of tensors:\n\n"
        "```sh\n"
        'eval "$(_TORCHPARAMS_COMPLETE=bash_source torchparams)"    # ~/.bashrc\n'
        'eval "$(_TORCHPARAMS_COMPLETE=zsh_source torchparams)"     # ~/.zshrc\n'
        "_TORCHPARAMS_COMPLETE=fish_source torchparams | source    # ~/.config/fish/config.fish\n"
        "```\n",
    ]
    every = [[name, *more] for name in COMMANDS for more in ([], *([sub] for sub in SUBCOMMANDS.get(name, ())))]
    for arguments in ([], *every):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            run([*arguments, "--help"])
        title = " ".join(["torchparams", *arguments])
        text = "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())
        pages.append(f"## {title}\n\n```text\n{text}\n```\n")
    return "\n".join(pages)


PAGES = {"docs/cli.md": command_reference, "docs/audit.md": audit_page, "docs/schemas.md": schema_page}


def main(arguments: list[str]) -> int:
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if path.exists() and path.read_text() == text:
            continue
        if "--check" in arguments:
            stale.append(name)
        else:
            path.write_text(text)
            print(f"wrote {name}")
    for name in stale:
        print(f"{name} is not what the code says. Run make docs")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
