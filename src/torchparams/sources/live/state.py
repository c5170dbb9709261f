"""Modules of a live network that keep state outside their parameters and buffers.

No code of such a module is run, because some modules change the network when their state dict is requested. So this
finds out that a module has its own state and how it writes it, but not the state itself.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torchparams.left_out import LeftOut
from torchparams.sources.live.packed import keeps_output_scale, packed_classes
from torchparams.sources.live.reach import wrapped_key
from torchparams.sources.live.tensors import class_names
from torchparams.sources.live.traverse import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from torchparams.sources.live.tensors import LiveReading

_WRITERS = {
    "_save_to_state_dict": "writes state of its own to the state dict",
    "get_extra_state": "has extra state",
    "state_dict": "has a state_dict of its own",
}
"""Methods by which a module writes state, and what a class that overrides one does."""

_NOTHING_ELSE = (
    "torch.nn.modules.",  # nn.Module itself, and lazy modules
    "torch.jit.",
    "torch.ao.quantization.fake_quantize",
    "torch.ao.quantization.observer",
)
"""Modules whose versions of these methods write only parameters and buffers."""


def state_outside(root: nn.Module) -> tuple[LeftOut, ...]:
    """Modules with state outside their parameters and buffers, by canonical name, each once.

    >>> import torch
    >>> class Counter(torch.nn.Module):
    ...     def get_extra_state(self): return 3
    >>> [(found.name, found.reason) for found in state_outside(torch.nn.Sequential(Counter()))]
    [('0', 'has extra state')]
    """
    known: dict[type, str] = {}
    if not any(_candidates(root, known)):  # usually there are none, and names are not needed
        return ()
    return tuple(
        LeftOut(name, class_names(module)[0], how, live=True)
        for name, module in named_modules(root)
        if (how := _how(module, known))
    )


def within_table(root: nn.Module, found: tuple[LeftOut, ...], reading: LiveReading) -> tuple[LeftOut, ...]:
    """Keep the modules whose state is not already listed as quantised parameters.

    Args:
        root: The network.
        found: Result of `state_outside`.
        reading: A reading of all tensors of the network.
    """
    owners = {id(owner) for name, owner in zip(reading.tensors, reading.owners, strict=True)
              if name in reading.quantised or name in reading.packed}  # fmt: skip
    modules = dict(named_modules(root)) if owners else {}
    covered = {name for name, module in modules.items() if id(module) in owners}
    left: list[LeftOut] = []
    for each in found:
        module = modules.get(each.name)
        parent = each.name.rpartition(".")[0]
        if module is None or not _is_quantisers(module) or not (each.name in covered or parent in covered):
            left.append(each)
        elif each.name in covered and type(module) in packed_classes() and keeps_output_scale(module):
            left.append(replace(each, reason="keeps the scale and the zero point of its output"))
    return tuple(left)


def _is_quantisers(module: nn.Module) -> bool:
    """Whether only the code of a quantisation library writes the state of a module, without hooks."""
    methods = (getattr(type(module), method, None) for method in _WRITERS)
    return not _of_instance(module) and all(_is_harmless(method, (*_NOTHING_ELSE, *_QUANTISERS)) for method in methods)


_QUANTISERS = ("bitsandbytes.nn.", "torch.ao.nn.")


def _candidates(root: nn.Module, known: dict[type, str]) -> Iterator[bool]:
    """Whether each module with a new class, a class with state, or hooks has its own state."""
    for module in modules_of(root):
        own = module.__dict__
        if (
            known.get(type(module)) != ""
            or module._state_dict_hooks
            or module._state_dict_pre_hooks
            or "_save_to_state_dict" in own
            or "get_extra_state" in own
            or "state_dict" in own
        ):
            yield bool(_how(module, known))


def named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Canonical name and module, each once."""
    seen = {id(root)}
    found = [("", root)]
    for name, module in found:  # grows during the loop
        if not module._modules:
            continue
        skip = wrapped_key(module)
        for key, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append((name if key == skip else f"{name}.{key}".removeprefix("."), child))
    return found


def _how(module: nn.Module, known: dict[type, str]) -> str:
    """How a module writes its own state; empty if it has none."""
    cls = type(module)
    how = known.get(cls)
    if how is None:
        how = known[cls] = "; ".join(
            said for method, said in _WRITERS.items() if not _is_harmless(getattr(cls, method, None), _NOTHING_ELSE)
        )
    if module._state_dict_hooks or module._state_dict_pre_hooks or not _WRITERS.keys().isdisjoint(module.__dict__):
        return "; ".join(filter(None, (how, *_of_instance(module))))
    return how


def _of_instance(module: nn.Module) -> list[str]:
    said = [text for method, text in _WRITERS.items() if method in module.__dict__]
    for hook in (*module._state_dict_pre_hooks.values(), *module._state_dict_hooks.values()):
        function: Any = getattr(hook, "hook", hook)
        while isinstance(function, partial):
            function = function.func
        if not _is_harmless(function, ("torch.",)):
            named = getattr(function, "__qualname__", type(function).__qualname__)
            said.append(f"changes the state dict with a hook, {named}")
    return said


def _is_harmless(function: object, homes: tuple[str, ...]) -> bool:
    # A class may lack the method altogether, as in TorchScript.
    return function is None or (getattr(function, "__module__", None) or "").startswith(homes)
