"""Tests against the libraries that make the files and layers in question. `make oracles` installs and runs them."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import settings

# Nothing here may go and look for a model.
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("torchparams", deadline=None)
settings.load_profile("torchparams")


def _import_torchvision() -> None:
    """Import torchvision without its operators, whose binary does not load beside every build of torch.

    timm and transformers import its Python parts; none of these tests runs an operator.
    """
    real: Any = torch.library.register_fake

    def register_fake(op: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return real(op, *arguments, **options)

    torch.library.register_fake = register_fake
    try:
        import torchvision
    finally:
        torch.library.register_fake = real
    assert torchvision


_import_torchvision()
