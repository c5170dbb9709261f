"""Running statistics: which layers of a network have them, and how they are kept still while the rest is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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
    if buffers.get("running_mean") is not None or buffers.get("running_var") is not None:
        return True
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.nn.utils.spectral_norm import SpectralNorm

    return isinstance(module, _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
    )


class Layers:
    """The layers with running statistics, and what is frozen in and around them.

    Asked only after the flags have been set.
    """

    def __init__(self, chosen: Chosen) -> None:
        from torchparams.sources._traverse import holders

        self.root = chosen.source.module
        self.selected = {id(chosen.tensors[name]) for name in chosen.names}
        self.by_name: dict[str, nn.Module] = {}
        met: set[int] = set()
        for prefix, _, module in holders(self.root, buffers=True):
            if module._buffers and id(module) not in met and has_running_statistics(module):
                met.add(id(module))
                self.by_name[prefix[:-1]] = module
        self._around: dict[int, tuple[bool, bool, bool]] | None = None
        self._parents: dict[int, nn.Module] = {}

    def held(self) -> list[tuple[str, nn.Module]]:
        """Those that are held, and that the selection touches."""
        return [(n, layer) for n, layer in self.by_name.items() if hold_on(layer) is not None and self.touched(layer)]

    def owns(self, layer: nn.Module) -> bool:
        """Whether the layer has parameters of its own."""
        return next(layer.parameters(), None) is not None

    def touched(self, layer: nn.Module) -> bool:
        """Whether something that the layer goes with is selected."""
        return any(id(buffer) in self.selected for buffer in layer._buffers.values()) or self._anchor(layer)[2]

    def wholly_frozen(self, layer: nn.Module) -> bool:
        """Whether nothing that the layer goes with is trainable."""
        return not self._anchor(layer)[1]

    def _anchor(self, layer: nn.Module) -> tuple[bool, bool, bool]:
        """Of the nearest module with parameters: whether it has any, any trainable, any selected."""
        own = self._ask(layer.parameters())
        if own[0]:
            return own
        around = self._all()
        here: nn.Module | None = layer
        while here is not None:
            if around[id(here)][0]:
                return around[id(here)]
            here = self._parents.get(id(here))
        return own

    def _ask(self, parameters: Iterator[Any]) -> tuple[bool, bool, bool]:
        found = trainable = selected = False
        for parameter in parameters:
            found = True
            trainable = trainable or parameter.requires_grad
            selected = selected or id(parameter) in self.selected
        return found, trainable, selected

    def _all(self) -> Mapping[int, tuple[bool, bool, bool]]:
        """The same for every module with all that is below it, each module looked at once."""
        if self._around is None:
            self._around = {}
            stack: list[tuple[nn.Module, Iterator[nn.Module | None]]] = [(self.root, iter(self.root._modules.values()))]
            entered = {id(self.root)}
            while stack:
                module, children = stack[-1]
                for child in children:
                    if child is not None and id(child) not in entered:
                        entered.add(id(child))
                        self._parents[id(child)] = module
                        stack.append((child, iter(child._modules.values())))
                        break
                else:
                    stack.pop()
                    parts = [self._ask(module.parameters(recurse=False))]
                    # A module that is its own ancestor is not finished yet, and adds nothing to itself.
                    parts += [self._around[id(c)] for c in module._modules.values() if c and id(c) in self._around]
                    found, trainable, selected = (any(column) for column in zip(*parts, strict=True))
                    self._around[id(module)] = found, trainable, selected
        return self._around
