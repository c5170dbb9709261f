"""The session of `make demo-file`: the checkpoint of a pretrained network, without torch."""

from __future__ import annotations

import shlex
import sys

from torchparams.cli.app import run

COMMANDS = (
    "ls {file}",
    "ls {file} --tree",
    "ls {file} -s '**.bias | **.bias_*'",
    "stats {file}",
    "show {file} conv1.weight",
)


def main(file: str) -> None:
    for command in COMMANDS:
        line = command.format(file=shlex.quote(file))
        print(f"\n$ torchparams {line}", flush=True)
        if run(shlex.split(line)):
            raise SystemExit(1)
    print(f"\ntorch was not imported: {'torch' not in sys.modules}. Next: torchparams --help")


if __name__ == "__main__":
    main(sys.argv[1])
