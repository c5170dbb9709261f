"""Running a command line in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.cli.app import run

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class Ran:
    """What a command line did: its exit status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output, read as JSON."""
        return json.loads(self.out)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run `torchparams` with arguments."""
    capsys.readouterr()
    status = run([str(argument) for argument in arguments])
    written = capsys.readouterr()
    return Ran(status, written.out, written.err)
