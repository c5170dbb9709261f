"""Fixtures and settings for all tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# No timing decides a test: a busy machine is slow.
settings.register_profile("torchparams", deadline=None)
settings.load_profile("torchparams")


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of training checkpoints: what `training_files.py` writes with 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("training")
    script = Path(__file__).with_name("training_files.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder
