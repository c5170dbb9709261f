"""Search for tensors that `nn.Module` does not see: in lists, dicts, tuples, sets and dataclasses.

Only stored objects are examined, through the C functions of the containers and the `__dict__` of modules. No property,
`__getattr__` or `__iter__` of the network runs.
"""

from __future__ import annotations

import collections
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any

from torchparams.errors import SourceError
from torchparams.sources.live.tensors import is_leaf
from torchparams.sources.live.traverse import list_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch
    from torch import nn


DEPTH = 4
"""Maximum depth of nested containers."""

ITEMS = 10_000
"""Maximum number of items per container: a vocabulary of a million words has no modules."""

_SIMPLE = frozenset({int, float, str, bytes, bool, complex, type(None), type, slice, range})


@dataclass(slots=True)
class Found:
    """Hidden contents of one attribute of a module.

    Attributes:
        owner: Path of the module.
        attribute: Name of the attribute.
        container: Kind of container: `list`, `dict`, `set`, …; `attribute` if the attribute itself is a tensor.
        trainable: Names of parameters with `requires_grad` that are not registered.
        frozen: Names of other parameters and of buffers that are not registered.
        switched: Names of modules without these that `train()` and `eval()` would switch, such as dropout.
        leaves: Names of tensors that are not `nn.Parameter`s but receive gradients.
        plain: Names of other tensors that are neither parameters nor buffers.
        computed: Names of tensors that are results of operations recorded by autograd.
        aside: Names of parameters and modules that were set without `nn.Module.__setattr__`.
        modules: Number of modules in it that are not registered.
        parameters: Number of such parameters, without those of the modules.
    """

    owner: str
    attribute: str
    container: str
    trainable: list[str]
    frozen: list[str]
    switched: list[str]
    leaves: list[str]
    plain: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    modules: int = 0
    parameters: int = 0

    def holds(self) -> bool:
        """Whether anything was found."""
        unregistered = self.trainable or self.frozen or self.switched
        return bool(unregistered or self.leaves or self.plain or self.computed or self.aside)

    @property
    def name(self) -> str:
        """Name of the attribute with the path of its module."""
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute

    @property
    def cure(self) -> str:
        """The line of `__init__` that registers the hidden contents."""
        here = f"self.{self.attribute}"
        kind = "Parameter" if not self.modules else "Module"
        if self.container == "dict":
            return f"{here} = nn.{kind}Dict({here})"
        if self.container == "dataclass":
            inside = [name.removeprefix(f"{self.owner}.") for name in (*self.trainable, *self.frozen, *self.switched)]
            part = inside[0].split(".")[1] if inside and "." in inside[0] else "…"
            return f"self.{part} = {here}.{part}  # an attribute of the module itself is registered"
        return f"{here} = nn.{kind}List({here})"


def find_hidden(named: Sequence[tuple[str, nn.Module]], tensors: Iterable[torch.Tensor]) -> list[Found]:
    """Find attributes with hidden contents.

    Args:
        named: Path and module of all modules of a network, the network first.
        tensors: Its parameters and buffers.
    """
    search = _Search([module for _, module in named], list(tensors))
    found: list[Found] = []
    for path, module in chain(named, search.modules):
        if attributes := search.attributes(module):
            found += search.hidden_in(path, module, attributes)
    return found


class _Search:
    def __init__(self, modules: Sequence[nn.Module], tensors: Sequence[torch.Tensor]) -> None:
        import torch
        from torch import nn

        self.modules: list[tuple[str, nn.Module]] = []  # hidden modules, which may hide more
        self._root = modules[0]
        self._met = set(map(id, modules))
        self._registered = tensors
        self._tensors = set(map(id, tensors))
        self._places: set[int] | None = None
        # Attributes of every module, and copies that torch itself keeps of its parameters.
        self._known = frozenset({*vars(nn.Module()), "_flat_weights", "_flat_weight_refs", "_all_weights"})
        self._others: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._module_class, self._tensor_class = nn.Module, torch.Tensor

    def attributes(self, module: nn.Module) -> list[str]:
        """Attributes that could hide something."""
        own = vars(module)
        names = tuple(own)  # equal for many modules of few classes
        others = self._others.get(names)
        if others is None:
            others = self._others[names] = tuple(name for name in names if name not in self._known)
        return [name for name in others if type(own[name]) not in _SIMPLE]

    def hidden_in(self, path: str, module: nn.Module, attributes: list[str]) -> Iterator[Found]:
        """What the attributes hide."""
        for attribute in attributes:
            value = vars(module)[attribute]
            found = Found(path, attribute, _container(type(value)) or "attribute", [], [], [], [])
            self._look(value, f"{path}.{attribute}" if path else attribute, 0, module, found, set())
            if found.holds():
                yield found

    def _look(
        self,
        value: Any,
        name: str,
        depth: int,
        owner: nn.Module,
        found: Found,
        met: set[int],
    ) -> None:
        kind = type(value)
        if kind in _SIMPLE:
            return
        if issubclass(kind, self._tensor_class):
            self._tensor(value, name, depth, found)
            return
        if issubclass(kind, self._module_class):
            if id(value) not in self._met:
                # A module that is set directly as an attribute was set without nn.Module.__setattr__ on purpose.
                if depth:
                    self._module(value, name, owner, found)
                else:
                    found.aside.append(name)
            return
        if depth >= DEPTH or id(value) in met:
            return
        met.add(id(value))
        for key, item in _items(value, kind):
            if type(item) not in _SIMPLE:
                self._look(item, f"{name}.{key}", depth + 1, owner, found, met)

    def _tensor(self, tensor: torch.Tensor, name: str, depth: int, found: Found) -> None:
        from torch import nn

        if id(tensor) in self._tensors or self._known_memory(tensor):
            return
        if isinstance(tensor, nn.Parameter):
            if not depth:  # set without nn.Module.__setattr__ on purpose, like a module
                found.aside.append(name)
                return
            found.parameters += 1
            (found.trainable if tensor.requires_grad else found.frozen).append(name)
        elif not is_leaf(tensor):
            found.computed.append(name)
        else:
            (found.leaves if tensor.requires_grad else found.plain).append(name)
        self._tensors.add(id(tensor))

    def _module(self, module: nn.Module, name: str, owner: nn.Module, found: Found) -> None:
        from torch.nn.modules.dropout import _DropoutNd

        parts = _modules(module, name)
        # A list that contains the parent of the module is a reference back, not a part of the network.
        if any(part is owner or part is self._root for _, part in parts):
            return
        try:
            listing = list_tensors(module, True)
        except (SourceError, AttributeError):  # under construction
            return
        new = False
        for key, tensor in listing.tensors.items():
            if id(tensor) in self._tensors or self._known_memory(tensor):
                continue
            new = True
            self._tensors.add(id(tensor))
            trains = tensor.requires_grad and key not in listing.buffers
            (found.trainable if trains else found.frozen).append(f"{name}.{key}")
        parts = [(path, part) for path, part in parts if id(part) not in self._met]
        if not new:
            found.switched += [path for path, part in parts if isinstance(part, _DropoutNd)]
        found.modules += 1
        self._met.update(id(part) for _, part in parts)
        self.modules += parts

    def _known_memory(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor shares memory with a registered tensor: another object for the same values."""
        if self._places is None:
            self._places = {place for tensor in self._registered if (place := _place(tensor))}
        return _place(tensor) in self._places


def _place(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except Exception:  # lazy, sparse or wrapped: such a tensor may raise any error
        return 0


def _modules(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Path and module of a module and everything below it, each once."""
    found = [(name, module)]
    met = {id(module)}
    for path, parent in found:  # grows during the loop
        for key, child in vars(parent).get("_modules", {}).items():
            if child is not None and id(child) not in met:
                met.add(id(child))
                found.append((f"{path}.{key}", child))
    return found


def _container(kind: type) -> str:
    base = next((base for base in kind.__mro__ if base in _CONTAINERS), None)
    return base.__name__ if base is not None else "dataclass" if _fields(kind) else ""


def _fields(kind: type) -> dict[str, Any]:
    found = (vars(base).get("__dataclass_fields__") for base in kind.__mro__)
    return next((fields for fields in found if isinstance(fields, dict)), {})


def _items(value: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """Keys and items of a container, read with the functions of its base class; otherwise empty."""
    base: Any = next((base for base in kind.__mro__ if base in _CONTAINERS), None)
    if base is dict:
        for place, (key, item) in enumerate(islice(dict.items(value), ITEMS)):
            yield (str(key) if type(key) in (str, int) else str(place)), item
    elif base is not None:
        for place, item in enumerate(islice(base.__iter__(value), ITEMS)):
            yield str(place), item
    for part in _fields(kind):
        with suppress(AttributeError):  # an empty slot
            try:
                yield part, object.__getattribute__(value, "__dict__")[part]
            except (AttributeError, KeyError):
                slot = next((vars(base)[part] for base in kind.__mro__ if part in vars(base)), None)
                if isinstance(slot, MemberDescriptorType):
                    yield part, slot.__get__(value, kind)


_CONTAINERS = (list, dict, tuple, set, frozenset, collections.deque)
