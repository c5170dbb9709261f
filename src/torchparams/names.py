"""Canonical names: names without the components that wrappers add.

`DistributedDataParallel`, `torch.compile` and similar wrappers hold the network as a submodule, which adds a component
to every name: `module.fc.weight`, `_orig_mod.fc.weight`. The **canonical** name has none of these. In a live network,
wrappers are recognised by type, so a user's submodule called `module` keeps its name.
"""

from __future__ import annotations

import re
import sys
from itertools import takewhile
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WRAPPERS: tuple[tuple[str, str, str], ...] = (
    # defining module, class, attribute of the wrapped module
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",  # base class of CheckpointWrapper and OffloadWrapper
        "_checkpoint_wrapped_module",
    ),
)
"""Wrapper classes, with the component that each adds to names."""

_known: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()


def wrapper_component(cls: type) -> str | None:
    """Component that a wrapper class adds to names, or None for other classes.

    Args:
        cls: Class of a module.

    >>> from torch import nn
    >>> wrapper_component(nn.DataParallel), wrapper_component(nn.Sequential)
    ('module', None)
    """
    try:
        return _known[cls]
    except KeyError:
        found = _known[cls] = next((key for base, key in _loaded_wrappers() if issubclass(cls, base)), None)
        return found


def _loaded_wrappers() -> Iterator[tuple[type, str]]:
    # A class that is not in sys.modules has no instances, so nothing needs to be imported.
    for module, name, key in WRAPPERS:
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type):
            yield base, key


def strip_wrappers(name: str) -> str:
    """Remove the components that wrappers usually add to a name.

    A checkpoint does not record wrappers, so the result is a guess. Wrapper components with a leading underscore are
    unambiguous, and are removed anywhere; `module` is a common word, and is removed only at the front. The last
    component always stays.

    Args:
        name: Tensor name in a checkpoint.

    >>> strip_wrappers("module._orig_mod.encoder.module.weight")
    'encoder.module.weight'
    """
    *path, last = name.split(".")
    path = [component for component in path if component not in _PRIVATE]
    start = 0
    while start < len(path) and path[start] == "module":
        start += 1
    return ".".join([*path[start:], last])


def common(paths: Iterable[str]) -> str:
    """Path of the innermost module that contains all `paths`.

    >>> common(["encoder.0.fc", "encoder.1.fc"])
    'encoder'
    """
    split = [path.split(".") if path else [] for path in paths]
    if not split:
        return ""
    least, greatest = min(split), max(split)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(least, greatest, strict=False))
    return ".".join(part for part, _ in shared)


TOP = "(top level)"
"""Group of tensors whose names have no module."""


def module_of(name: str) -> str:
    """Name without its last component.

    >>> module_of("layers.0.fc.weight"), module_of("weight")
    ('layers.0.fc', '(top level)')
    """
    return name.rpartition(".")[0] or TOP


def layer_of(name: str) -> str:
    """Name up to its first numeric component; without one, the module.

    >>> layer_of("model.layers.10.mlp.up.weight"), layer_of("lm_head.weight")
    ('model.layers.10', 'lm_head')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return module_of(name) if number is None else ".".join(parts[: number + 1])


_PRIVATE = frozenset(key for _, _, key in WRAPPERS if key.startswith("_"))


_MANGLED = re.compile(r"^__torch__\.|___torch_mangle_\d+\.")


def script_class(name: str) -> str:
    """Class name without the additions of TorchScript.

    >>> script_class("__torch__.torch.nn.modules.linear.___torch_mangle_13.Linear")
    'torch.nn.modules.linear.Linear'
    """
    return _MANGLED.sub("", name)
