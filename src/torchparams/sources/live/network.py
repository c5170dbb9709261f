"""A live network as a whole: modules by path, parameters and buffers with owners, and hidden tensors.

Each property is computed on first use and cached. The code of the network never runs.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from torchparams.names import wrapper_component
from torchparams.sources.live.hidden import Found, find_hidden
from torchparams.sources.live.reach import wrapped_key
from torchparams.sources.live.traverse import list_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn


class Member(NamedTuple):
    """A parameter or buffer of the network.

    Attributes:
        name: Canonical name.
        tensor: The tensor.
        owner: The module that registers it.
    """

    name: str
    tensor: torch.Tensor
    owner: nn.Module

    @property
    def path(self) -> str:
        """Path of the owner; empty for the network itself."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """Name within the owner."""
        return self.name.rpartition(".")[2]


class Network:
    """One reading of a live network.

    Args:
        model: The network.

    >>> from torch import nn
    >>> [path for path, _ in Network(nn.Sequential(nn.ReLU())).named_modules()]
    ['', '0']
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield path and module, in the order of `nn.Module.named_modules`, without the components of wrappers."""
        return zip(*self._modules, strict=True)

    @cached_property
    def _modules(self) -> tuple[list[str], list[nn.Module]]:
        # Two lists: a tuple for each module would be many objects for the garbage collector.
        paths, modules = [""], [self.model]
        met = {id(self.model)}
        plain: set[type] = set()
        stack = [("", wrapped_key(self.model), iter(self.model._modules.items()))]
        while stack:
            prefix, skip, children = stack[-1]
            for key, child in children:
                if child is None or id(child) in met:
                    continue
                met.add(id(child))
                path = prefix[:-1] if key == skip else f"{prefix}{key}"
                paths.append(path)
                modules.append(child)
                if below := child._modules:
                    inside = None
                    if type(child) not in plain:
                        inside = wrapped_key(child)
                        if wrapper_component(type(child)) is None:
                            plain.add(type(child))
                    stack.append((f"{path}." if path else "", inside, iter(below.items())))
                    break
            else:
                stack.pop()
        return paths, modules

    @property
    def modules(self) -> list[nn.Module]:
        """The modules, each once."""
        return self._modules[1]

    @cached_property
    def _listed(self) -> tuple[list[Member], list[Member]]:
        listing = list_tensors(self.model, True)
        entries = list(map(Member, listing.tensors, listing.tensors.values(), listing.owners))
        if not listing.buffers:
            return entries, []
        parameters = [entry for entry in entries if entry.name not in listing.buffers]
        return parameters, [entry for entry in entries if entry.name in listing.buffers]

    @cached_property
    def parameters(self) -> list[Member]:
        """The parameters; a tied parameter once."""
        return self._listed[0]

    @cached_property
    def buffers(self) -> list[Member]:
        """The buffers; a buffer that is also a parameter is omitted."""
        return self._listed[1]

    @cached_property
    def by_id(self) -> dict[int, Member]:
        """The parameters by the id of the tensor."""
        return {id(entry.tensor): entry for entry in self.parameters}

    @cached_property
    def hidden(self) -> list[Found]:
        """Tensors and modules that `nn.Module` does not see."""
        tensors = [entry.tensor for entry in (*self.parameters, *self.buffers)]
        return find_hidden(list(self.named_modules()), tensors)
