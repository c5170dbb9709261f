"""After a kill at any moment, the target is the old or the complete new one, and the next run cleans up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import crash_runs

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a journalling file system takes three times as long."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_killed_at_every_moment(quick_folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, crash_runs.__file__, str(quick_folder)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    counts = json.loads(ran.stdout)
    assert set(counts) == set(crash_runs.SCENARIOS)
    assert min(counts.values()) >= 15
    assert sum(counts.values()) >= 200
