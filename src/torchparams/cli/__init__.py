"""The command line: one module a command, and none of them with logic of its own."""

from __future__ import annotations

COMMANDS = ("ls", "show")
"""The modules that hold a command each, in the order in which `--help` lists them."""


def main() -> None:
    """What the installed `torchparams` runs."""
    import sys

    from torchparams.cli.app import run

    sys.exit(run(sys.argv[1:]))
