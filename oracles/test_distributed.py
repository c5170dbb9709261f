"""Models that other libraries train on two ranks: Lightning, accelerate, transformers.

What runs on CPUs is DDP; Lightning's FSDP strategy wants a GPU, and is not run. FSDP itself is tested in tests/sharded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ranks import on_ranks

import trainers


@pytest.mark.parametrize("training", ["lightning_ddp", "accelerate_ddp", "transformers_trainer"])
def test_a_training_on_two_ranks(training: str) -> None:
    found = on_ranks(2, getattr(trainers, training))
    assert found["moved"]
    assert len(found["digest"]) == 64
