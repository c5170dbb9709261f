"""Running statistics: find the layers that have them, and stop them while the rest of the model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from torchparams.train._live import Chosen


class StatisticsHold:
    """Replacement for a layer's `train` method that keeps this layer, but not its submodules, in evaluation mode.

    It is an attribute of the instance. Copies and pickles include attributes, so a copy of a frozen model is frozen.

    Attributes:
        module: The layer.
        wanted: Mode that the layer would have without the hold.
        shadowed: Previous `train` attribute of the instance, or None.
    """

    __slots__ = ("module", "shadowed", "wanted")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.wanted = module.training
        self.shadowed: Callable[[bool], Any] | None = vars(module).get("train")

    def __call__(self, mode: bool = True) -> nn.Module:
        """Act as `nn.Module.train` for the submodules, but not for the layer itself."""
        # The class's method also switches inner layers (activation, dropout) and refuses arguments that are not bool.
        if self.shadowed is not None:
            self.shadowed(mode)
        else:
            type(self.module).train(self.module, mode)
        self.wanted = self.module.training
        self.module.training = False
        return self.module

    def place(self) -> None:
        """Install the hold."""
        # Bypass nn.Module.__setattr__: that of a scripted module refuses attributes it did not compile.
        vars(self.module)["train"] = self
        self.wanted = self.module.training
        self.module.training = False

    def release(self) -> None:
        """Remove the hold, and give the layer the mode it would have without it."""
        if self.shadowed is None:
            del vars(self.module)["train"]
        else:
            vars(self.module)["train"] = self.shadowed
        self.module.training = self.wanted


def hold_on(module: nn.Module) -> StatisticsHold | None:
    """The hold that stops the running statistics of `module`, or None.

    >>> from torch import nn
    >>> layer = nn.BatchNorm1d(3)
    >>> hold_on(layer) is None
    True
    """
    held = vars(module).get("train")
    return held if isinstance(held, StatisticsHold) else None


def has_running_statistics(module: nn.Module) -> bool:
    """True if the forward pass of `module` itself updates normalisation statistics in training mode.

    >>> from torch import nn
    >>> has_running_statistics(nn.BatchNorm1d(3)), has_running_statistics(nn.InstanceNorm1d(3))
    (True, False)
    """
    buffers = module._buffers
    if not buffers:
        return False
    # The buffers of a scripted module are not a dict and have no `get`.
    if any(name in buffers and buffers[name] is not None for name in ("running_mean", "running_var")):
        return True
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.nn.utils.spectral_norm import SpectralNorm

    return isinstance(module, _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
    )


class Layers:
    """Layers with running statistics, and the frozen parameters in and around them.

    Use it only after `requires_grad` has been set.

    Attributes:
        by_name: Layers by canonical name.
    """

    def __init__(self, chosen: Chosen) -> None:
        from torchparams.sources.live.traverse import holders

        self._root = chosen.source.module
        self._selected = {id(chosen.tensors[name]) for name in chosen.names}
        self.by_name: dict[str, nn.Module] = {}
        met: set[int] = set()
        for prefix, _, module in holders(self._root, buffers=True):
            if module._buffers and id(module) not in met and has_running_statistics(module):
                met.add(id(module))
                self.by_name[prefix[:-1]] = module

    def state(self, layer: nn.Module) -> tuple[bool, bool, bool]:
        """Three flags about the layer's parameters: any is selected, all are frozen, they are the layer's own.

        For a layer without parameters, they are those of the nearest enclosing module that has some.
        """
        # Fast path: most layers have parameters and no submodules.
        own = [] if layer._modules else [p for p in layer._parameters.values() if p is not None]
        if own:
            return not self._selected.isdisjoint(map(id, own)), not any(p.requires_grad for p in own), True
        around = self._around
        here = id(layer)
        while here not in around.bearing and here in around.parents:
            here = around.parents[here]
        return here in around.selected, here not in around.trainable, here == id(layer)

    def named(self, layer: nn.Module) -> bool:
        """True if a buffer of the layer is selected."""
        return any(id(buffer) in self._selected for buffer in layer._buffers.values() if buffer is not None)

    @cached_property
    def _around(self) -> _Around:
        return _Around.of(self._root, self._selected)


@dataclass(slots=True)
class _Around:
    """Modules that contain any parameter, a trainable one, or a selected one, at any depth; by `id`.

    Attributes:
        bearing: Modules with any parameter.
        trainable: Modules with a trainable parameter.
        selected: Modules with a selected parameter.
        parents: Module → its parent, at its first occurrence.
    """

    bearing: set[int]
    trainable: set[int]
    selected: set[int]
    parents: dict[int, int]

    @classmethod
    def of(cls, root: nn.Module, chosen: set[int]) -> _Around:
        """Visit each module once, children before parents."""
        around = cls(set(), set(), set(), {})
        stack = [(root, iter(root._modules.values()))]
        entered = {id(root)}
        while stack:
            module, children = stack[-1]
            for child in children:
                if child is None or (here := id(child)) in entered:
                    continue
                entered.add(here)
                around.parents[here] = id(module)
                if child._modules:
                    stack.append((child, iter(child._modules.values())))
                    break
                if child._parameters:
                    around.add(child, chosen)
            else:
                stack.pop()
                around.add(module, chosen)
        return around

    def add(self, module: nn.Module, chosen: set[int]) -> None:
        """Add a module, after its children."""
        here = id(module)
        for parameter in module._parameters.values():
            if parameter is not None:
                self.bearing.add(here)
                if parameter.requires_grad:
                    self.trainable.add(here)
                if id(parameter) in chosen:
                    self.selected.add(here)
        if module._modules:
            inside = set(map(id, module._modules.values()))
            for noted in (self.bearing, self.trainable, self.selected):
                if not inside.isdisjoint(noted):
                    noted.add(here)
