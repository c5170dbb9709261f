"""From a name to its tensor: only the modules on its path are examined."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.errors import HalfBuilt, SourceError
from torchparams.names import wrapper_component

if TYPE_CHECKING:
    from torch import nn


def wrapped_key(module: nn.Module) -> str | None:
    """The component below `module` that names may omit; None if it wraps nothing.

    Also None if the wrapper and the wrapped module use the same name: without the component, two tensors would have one
    name.
    """
    key = inside = wrapper_component(type(module))
    if key is None or module._modules.get(key) is None:
        return None
    own = _keys(module) - {key}
    inner = module
    while own and inside is not None:
        inner = inner._modules[inside]  # type: ignore[assignment]  # wrapped_key has seen that it is there
        inside = wrapped_key(inner)
        if own & (_keys(inner) - {inside}):
            return None
    return key


def _keys(module: nn.Module) -> set[str | None]:
    return {*module._modules, *module._parameters, *module._buffers}


def reach(root: nn.Module, name: str, buffers: bool) -> Any | None:
    """The tensor `name`, or None; the name may include or omit the components of wrappers.

    Examines only the modules on the path.

    Raises:
        HalfBuilt: A module on the path was never initialised.
    """
    *path, last = name.split(".")
    module: nn.Module | None = root
    try:
        for component in path:
            if module is None:
                return None
            if wrapper_component(type(module)) is None:
                if component not in module._modules:  # TorchScript modules use mappings without `get`
                    return None
                module = module._modules[component]
            else:
                steps = _steps(module, component)
                module = steps[-1][1] if steps else None
        while module is not None:
            for held in (module._parameters, module._buffers) if buffers else (module._parameters,):
                if last in held and held[last] is not None:
                    return held[last]
            key = wrapped_key(module)
            module = None if key is None else module._modules[key]
    except AttributeError as error:
        raise explained(error) from None
    except (RuntimeError, KeyError) as error:
        raise changed(error, root) from None
    return None


@dataclass(frozen=True, slots=True)
class Spot:
    """One of the places of a tensor in a network.

    Attributes:
        name: Canonical name for this place.
        raw: The name with the components of wrappers.
        tensor: The tensor.
        modules: The modules on the path, from the network to the owner.
        persistent: Whether a buffer is saved; None for a parameter.
    """

    name: str
    raw: str
    tensor: Any
    modules: tuple[nn.Module, ...]
    persistent: bool | None


def spot_of(root: nn.Module, name: str, buffers: bool) -> Spot | None:
    """The place that `name` leads to; None if `reach` returns None.

    Raises:
        HalfBuilt: A module on the path was never initialised.
    """
    *path, last = name.split(".")
    modules: list[nn.Module] = [root]
    raws: list[str] = []
    names: list[str] = []
    try:
        for component in path:
            steps = _steps(modules[-1], component)
            if not steps:
                return None
            for key, module in steps:
                raws.append(key)
                if key != wrapped_key(modules[-1]):
                    names.append(key)
                modules.append(module)
        while True:
            owner = modules[-1]
            if last in owner._parameters and owner._parameters[last] is not None:
                tensor: Any = owner._parameters[last]
                kept = None
            elif buffers and last in owner._buffers:
                tensor, kept = owner._buffers[last], last not in owner._non_persistent_buffers_set
            else:
                tensor = None
            if tensor is not None:
                return Spot(".".join([*names, last]), ".".join([*raws, last]), tensor, tuple(modules), kept)
            inside = wrapped_key(owner)
            if inside is None:
                return None
            raws.append(inside)
            modules.append(owner._modules[inside])  # type: ignore[arg-type]  # wrapped_key has seen that it is there
    except AttributeError as error:
        raise explained(error) from None
    except (RuntimeError, KeyError) as error:
        raise changed(error, root) from None


def _child(module: nn.Module, component: str) -> nn.Module | None:
    steps = _steps(module, component)
    return steps[-1][1] if steps else None


def _steps(module: nn.Module, component: str) -> list[tuple[str, nn.Module]]:
    """Keys and modules on the path from `module` to `component`, in it or in a module that it wraps."""
    # The wrapped module comes first, because the canonical name is always unambiguous.
    spelled: list[tuple[str, nn.Module]] = []
    steps: list[tuple[str, nn.Module]] = []
    here = module
    while True:
        key = wrapped_key(here)
        if component in here._modules and (child := here._modules[component]) is not None:
            if component != key:
                return [*steps, (component, child)]
            spelled = spelled or [*steps, (component, child)]
        if key is None:
            return spelled
        here = here._modules[key]  # type: ignore[assignment]  # as above
        steps.append((key, here))


_INDEX = re.compile(r"\[(['\"]?)([^\[\]'\"]+)\1\]")


def plain_name(name: str) -> str:
    """Convert Python brackets in a name to dots.

    >>> plain_name("[0].layers[3].weight")
    '0.layers.3.weight'
    """
    path = _INDEX.sub(r".\2", name)
    return path[1:] if name.startswith("[") else path


def attribute(root: nn.Module, name: str) -> Any | None:
    """The object at the end of a path of attributes, keys and indexes; None if the path ends earlier.

    Only stored objects are followed and no property runs, because some change the network. For example, a spectral norm
    in training mode changes its buffers.
    """
    here: Any = root
    for component in plain_name(name).split("."):
        if isinstance(here, list | tuple):
            here = here[int(component)] if component.isdecimal() and int(component) < len(here) else None
        elif isinstance(here, dict):
            here = here.get(component)
        elif hasattr(type(here), "named_modules"):
            found = reach(here, component, True)
            if found is None:
                found = _child(here, component)
            here = vars(here).get(component) if found is None else found
        else:
            return None
    return here


def explained(error: AttributeError) -> AttributeError:
    """A clear error if a module was never initialised; otherwise the same error."""
    if error.name not in ("_modules", "_parameters", "_buffers") or error.name in vars(error.obj):
        return error
    return HalfBuilt(
        f"the __init__ of {type(error.obj).__qualname__} has not called nn.Module.__init__, so it cannot hold "
        "parameters yet",
        hint="call super().__init__() first",
    )


def changed(error: Exception, root: nn.Module) -> Exception:
    """The error to raise if modules or tensors changed while they were read; any other error unchanged.

    Args:
        error: What Python raised: a KeyError if a tensor was not found again, or a RuntimeError.
        root: The network.
    """
    if isinstance(error, RuntimeError) and "during iteration" not in str(error):
        return error
    return SourceError(
        "the model changed while it was read, perhaps by another thread",
        where=type(root).__name__,
        hint="read it when no other thread changes it, or use a lock",
    )
