"""Imports torchvision where its binary does not load beside this build of torch."""

from __future__ import annotations

from typing import Any

import torch


def import_torchvision() -> None:
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
