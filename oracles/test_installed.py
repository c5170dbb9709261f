"""The other libraries are installed in the versions that these tests were written for."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import pytest


@pytest.mark.parametrize("name", ["accelerate", "bitsandbytes", "lightning", "peft", "timm", "transformers"])
def test_a_library_imports(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_peft_is_the_version_that_adapters_are_compared_with() -> None:
    assert version("peft").startswith("0.21.")
