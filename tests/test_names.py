from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    ActivationWrapper,
    CheckpointWrapper,
    OffloadWrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from torchparams.names import WRAPPERS, strip_wrappers, wrapper_component


class Mine(nn.DataParallel[nn.Module]):
    pass


class Lookalike(nn.Module):
    """Has a submodule of the right name and is nobody's wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(1, 1)


Lookalike.__name__ = Lookalike.__qualname__ = "DataParallel"
OptimizedModule: Any = type(torch.compile(nn.Identity()))


@pytest.mark.parametrize(
    ("cls", "component"),
    [
        (nn.DataParallel, "module"),
        (DistributedDataParallel, "module"),
        (OptimizedModule, "_orig_mod"),
        (FullyShardedDataParallel, "_fsdp_wrapped_module"),
        (ActivationWrapper, "_checkpoint_wrapped_module"),
        (CheckpointWrapper, "_checkpoint_wrapped_module"),
        (OffloadWrapper, "_checkpoint_wrapped_module"),
        (Mine, "module"),
        (Lookalike, None),
        (nn.Sequential, None),
        (nn.Module, None),
    ],
)
def test_a_wrapper_is_known_by_its_type(cls: type, component: str | None) -> None:
    assert wrapper_component(cls) == component
    assert wrapper_component(cls) == component  # and from the cache


def test_every_wrapper_of_the_table_exists_in_this_torch() -> None:
    for module, name, component in WRAPPERS:
        assert wrapper_component(getattr(sys.modules[module], name)) == component


def test_asking_imports_nothing() -> None:
    code = (
        "import sys, torchparams.names as n\n"
        "class A: pass\n"
        "assert n.wrapper_component(A) is None\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})


def test_classes_are_not_kept_alive() -> None:
    import gc
    import weakref

    def passing() -> weakref.ref[type]:
        cls = type("Passing", (nn.Linear,), {})
        assert wrapper_component(cls) is None
        return weakref.ref(cls)

    gone = passing()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "stripped"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("module.module.fc.weight", "fc.weight"),
        ("_orig_mod.module.fc.weight", "fc.weight"),
        ("module._orig_mod.fc.weight", "fc.weight"),
        ("layers.0._checkpoint_wrapped_module.fc.weight", "layers.0.fc.weight"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.fc.weight", "layers.0.fc.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("module", "module"),
        ("module.module", "module"),
        ("_orig_mod", "_orig_mod"),
        ("modules.fc.weight", "modules.fc.weight"),
        ("", ""),
    ],
)
def test_stripping(name: str, stripped: str) -> None:
    assert strip_wrappers(name) == stripped


components = st.sampled_from(["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "fc", "0"])


@given(st.lists(components, min_size=1))
def test_stripping_twice_is_stripping_once(parts: list[str]) -> None:
    once = strip_wrappers(".".join(parts))
    assert strip_wrappers(once) == once
    assert once.split(".")[-1] == parts[-1]
