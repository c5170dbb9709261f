"""Names without what wrappers add to them.

`DistributedDataParallel`, `torch.compile` and their like hold the network as a submodule, and so put a component into
the name of everything below: `module.fc.weight`, `_orig_mod.fc.weight`. The **canonical** name has none of these.
Of a live network they are known by the wrapper's type, so that a submodule which somebody called `module` stays.
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
    # module that defines it, class, name of the submodule that it wraps
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",  # the base class of CheckpointWrapper and OffloadWrapper
        "_checkpoint_wrapped_module",
    ),
)
"""The wrappers, and the component that each adds to a name."""

_known: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()


def wrapper_component(cls: type) -> str | None:
    """The component that a wrapper of this class adds to the names below it; None where it is no wrapper.

    Args:
        cls: A module's class.

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
    # A class that is not in sys.modules has no instances: nothing needs to be imported to ask.
    for module, name, key in WRAPPERS:
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type):
            yield base, key


def strip_wrappers(name: str) -> str:
    """`name` without the components that wrappers usually add: what it was before the model was wrapped.

    A checkpoint does not say which components wrappers added, so this is a proposal. Names that begin with an
    underscore are nobody else's, and go wherever they stand; `module` is a word that people use, and goes only from
    the front. The last component always stays.

    Args:
        name: The name of a tensor, as a checkpoint spells it.

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
    """The path of the innermost module that all `paths` are in.

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
"""The group of the tensors whose names have no module in them."""


def module_of(name: str) -> str:
    """The name without its last component.

    >>> module_of("layers.0.fc.weight"), module_of("weight")
    ('layers.0.fc', '(top level)')
    """
    return name.rpartition(".")[0] or TOP


def layer_of(name: str) -> str:
    """The name up to and including the first component that is a number; without one, the module.

    >>> layer_of("model.layers.10.mlp.up.weight"), layer_of("lm_head.weight")
    ('model.layers.10', 'lm_head')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return module_of(name) if number is None else ".".join(parts[: number + 1])


_PRIVATE = frozenset(key for _, _, key in WRAPPERS if key.startswith("_"))


_MANGLED = re.compile(r"^__torch__\.|___torch_mangle_\d+\.")


def script_class(name: str) -> str:
    """The name of a class without what TorchScript adds to it.

    >>> script_class("__torch__.torch.nn.modules.linear.___torch_mangle_13.Linear")
    'torch.nn.modules.linear.Linear'
    """
    return _MANGLED.sub("", name)
