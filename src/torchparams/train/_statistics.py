"""Running statistics: which layers of a network have them, and how they are kept still while the rest is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from torchparams.train._live import Chosen


class StatisticsHold:
    """Stands in a layer's own attributes as its `train`, and keeps the layer itself, alone, in evaluation mode.

    A layer's attributes are what copies and pickles take along, so a copy of a frozen model is frozen.

    Attributes:
        module: The layer.
        wanted: The mode that the layer would have without the hold.
        shadowed: A `train` that stood in the instance before; None where there was none.
    """

    __slots__ = ("module", "shadowed", "wanted")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.wanted = module.training
        self.shadowed: Callable[[bool], Any] | None = vars(module).get("train")

    def __call__(self, mode: bool = True) -> nn.Module:
        """What `nn.Module.train` does, for all but the layer itself."""
        # The class's own method, which knows what it has inside (an activation, a dropout) and refuses what is no bool.
        if self.shadowed is not None:
            self.shadowed(mode)
        else:
            type(self.module).train(self.module, mode)
        self.wanted = self.module.training
        self.module.training = False
        return self.module

    def place(self) -> None:
        """Begin to hold."""
        # nn.Module.__setattr__ is for parameters and submodules; a scripted module's refuses what it did not compile.
        vars(self.module)["train"] = self
        self.wanted = self.module.training
        self.module.training = False

    def release(self) -> None:
        """Let go, and give the layer the mode that it would have."""
        if self.shadowed is None:
            del vars(self.module)["train"]
        else:
            vars(self.module)["train"] = self.shadowed
        self.module.training = self.wanted


def hold_on(module: nn.Module) -> StatisticsHold | None:
    """What keeps the running statistics of `module` still; None where nothing does.

    >>> from torch import nn
    >>> layer = nn.BatchNorm1d(3)
    >>> hold_on(layer) is None
    True
    """
    held = vars(module).get("train")
    return held if isinstance(held, StatisticsHold) else None


def has_running_statistics(module: nn.Module) -> bool:
    """Whether the forward pass of `module` itself, in training mode, moves statistics that normalise.

    >>> from torch import nn
    >>> has_running_statistics(nn.BatchNorm1d(3)), has_running_statistics(nn.InstanceNorm1d(3))
    (True, False)
    """
    buffers = module._buffers
    if not buffers:
        return False
    # A scripted module's buffers are no dict, and have no `get`.
    if any(name in buffers and buffers[name] is not None for name in ("running_mean", "running_var")):
        return True
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.nn.utils.spectral_norm import SpectralNorm

    return isinstance(module, _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
    )


class Layers:
    """The layers with running statistics, and what is frozen in and around them.

    Asked only after the flags have been set.

    Attributes:
        by_name: The layers, by canonical name.
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
        """Whether something that the layer goes with is selected, whether all of that is frozen, whether it is its own.

        A layer goes with its own parameters, or, having none, with those in the nearest module around it that has some.
        """
        # Most layers hold their parameters and nothing inside, and need no look around.
        own = [] if layer._modules else [p for p in layer._parameters.values() if p is not None]
        if own:
            return not self._selected.isdisjoint(map(id, own)), not any(p.requires_grad for p in own), True
        around = self._around
        here = id(layer)
        while here not in around.bearing and here in around.parents:
            here = around.parents[here]
        return here in around.selected, here not in around.trainable, here == id(layer)

    def named(self, layer: nn.Module) -> bool:
        """Whether a buffer of the layer is selected itself."""
        return any(id(buffer) in self._selected for buffer in layer._buffers.values() if buffer is not None)

    @cached_property
    def _around(self) -> _Around:
        return _Around.of(self._root, self._selected)


@dataclass(slots=True)
class _Around:
    """Which modules have, in them or below, any parameter, a trainable one, a selected one; modules by their `id`.

    Attributes:
        bearing: Those with any.
        trainable: Those with a trainable one.
        selected: Those with a selected one.
        parents: Module → the one around it, at the first place where it is met.
    """

    bearing: set[int]
    trainable: set[int]
    selected: set[int]
    parents: dict[int, int]

    @classmethod
    def of(cls, root: nn.Module, chosen: set[int]) -> _Around:
        """Looks at each module once: those inside before the one around them."""
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
        """Note a module, when those in it are noted."""
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
