"""Context of the rules: a network, its optimizers, and cached facts about them.

Each fact is computed once, when a rule first needs it. The network's own code never runs: attributes are read
from the modules' storage, without calling properties, `__getattr__` or `forward`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable
from torchparams.lint.memory import Sharing, sharing
from torchparams.lint.values import Extremes, extremes_of, read_extremes
from torchparams.selectors import Selector
from torchparams.sources.live.flat import stand_ins
from torchparams.sources.live.module import ModuleSource
from torchparams.sources.live.network import Member as Member
from torchparams.sources.live.network import Network
from torchparams.sources.live.tensors import class_names, is_leaf

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from torchparams.info import ParameterInfo
    from torchparams.lint.across import Across


@dataclass(frozen=True, slots=True)
class Group:
    """Parameter group of an optimizer.

    Attributes:
        optimizer: The optimizer.
        place: Path of the group: `param_groups.0`, or `optimizers.1.param_groups.0` with several optimizers.
        options: The group's dict.
        tensors: The tensors in it.
    """

    optimizer: Any
    place: str
    options: dict[str, Any]
    tensors: list[Any]

    def name(self, place: int) -> str:
        """Name of a tensor outside the network: from the group's `param_names`, or by its position."""
        given = self.options.get("param_names")
        name = given[place] if isinstance(given, list | tuple) and place < len(given) else None
        return name if isinstance(name, str) else f"{self.place}.params.{place}"


class Context(Network):
    """Network and optimizers of one audit.

    Args:
        model: The network.
        optimizers: Objects with `param_groups`, and usually `state` and `defaults`.
        together: Exchange facts with the ranks that share the model; None where several do.
    """

    def __init__(self, model: nn.Module, optimizers: tuple[Any, ...] = (), *, together: bool | None = None) -> None:
        super().__init__(model)
        self._together = together
        self.optimizers = optimizers
        self.source = ModuleSource(model, buffers=True)
        self.unread: dict[str, None] = {}

    @cached_property
    def infos(self) -> dict[str, ParameterInfo]:
        """Infos of all parameters and buffers, by canonical name."""
        return {info.name: info for info in self._reading.infos}

    @cached_property
    def lazy(self) -> list[Member]:
        """Parameters and buffers without a shape."""
        from torch.nn.parameter import is_lazy

        classes: dict[type, bool] = {}
        found = []
        for entry in (*self.parameters, *self.buffers):
            kind = type(entry.tensor)
            if kind not in classes:
                classes[kind] = is_lazy(entry.tensor)
            if classes[kind]:
                found.append(entry)
        return found

    @cached_property
    def _norms(self) -> dict[type, bool]:
        return {}

    def is_norm(self, module: nn.Module) -> bool:
        """True if the selector `:norm` matches the module's parameters."""
        known = self._norms.get(type(module))
        if known is None:
            from torchparams.dtypes import DType
            from torchparams.info import live_tensor

            # Evaluated once per class, for one parameter.
            any_of = live_tensor(
                "x", (1,), DType.of("F32"), 1, "cpu", "parameter", True, class_names(module), "x", (), None, True
            )
            known = self._norms[type(module)] = bool(_NORM.names([any_of]))
        return known

    @cached_property
    def sharing(self) -> Sharing:
        """Parameters that share memory."""
        return sharing(self.parameters)

    # --- values ----------------------------------------------------------------------------

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks that share the model; none where it is this process's own."""
        if "torch.distributed" not in sys.modules or not sys.modules["torch.distributed"].is_initialized():
            return ()
        from torchparams.lint.across import ranks_of

        found = ranks_of(self.modules, list(self.infos.values()))
        return found if len(found) > 1 else ()

    @cached_property
    def across(self) -> Across | None:
        """What the ranks that share the model know together; None where no other does, or was asked."""
        if not self.ranks or self._together is False:
            return None
        from torchparams.lint.across import Across

        entries = (*self.parameters, *self.buffers)
        found = Across(self.ranks, entries, self.infos, self.gradients, self.source.label)
        self.unread.update(dict.fromkeys(found.unread))
        return found

    def _is_part(self, entry: Member) -> bool:
        """Whether the tensor is only a part of the parameter, whose values are another's too."""
        return self.infos[entry.name].sharding is not None

    @cached_property
    def extremes(self) -> Extremes:
        """Minimum and maximum of every readable floating-point parameter and buffer."""
        if self.across is not None:
            return self.across.extremes
        entries = (*self.parameters, *self.buffers)
        parts = {entry.name: None for entry in entries if self._is_part(entry)} if self.ranks else {}
        self.unread.update(parts)
        entries = tuple(entry for entry in entries if entry.name not in parts and entry.name not in self._codes)
        found, unread = read_extremes([entry.tensor for entry in entries])
        self.unread.update((entry.name, None) for entry in entries if unread and id(entry.tensor) in unread)
        return found

    @cached_property
    def _reading(self) -> Any:
        return self.source.reading()

    @cached_property
    def _codes(self) -> set[str]:
        """Names of tensors that hold codes, whose elements are not values."""
        codes = (name for name, each in self.source.coded(self._reading).items() if each.codes)
        return {*codes, *self._reading.quantised}

    @cached_property
    def decoded(self) -> dict[str, tuple[float, float]]:
        """Minimum and maximum of every quantised parameter that can be decoded, by canonical name.

        Rows of packed weights, which no module holds, are included. Other codes are noted as unread.
        """
        sources: Mapping[str, Any] = self._reading.quantised
        self.unread.update((name, None) for name in self._codes if name not in sources)
        outside = self._reading.packed - sources.keys()
        packed = {name: tensor for name, tensor in self._reading.tensors.items() if name in outside}
        self.unread.update((name, None) for name, tensor in packed.items() if tensor.is_quantized)
        pairs, _ = read_extremes(tensor for tensor in packed.values() if not tensor.is_quantized)
        found = {name: pairs[id(tensor)] for name, tensor in packed.items() if id(tensor) in pairs}
        for name, source in sources.items():
            try:
                found[name] = extremes_of(source.row(name))
            except NotReadable:
                self.unread[name] = None
        return found

    def extremes_of(self, entry: Member) -> tuple[float, float] | None:
        """Minimum and maximum of a parameter or buffer; None if unknown."""
        return self.extremes.get(id(entry.tensor)) or self.decoded.get(entry.name)

    @cached_property
    def gradients(self) -> list[tuple[Member, torch.Tensor]]:
        """Parameters with a gradient, each with its gradient."""
        # PyTorch warns if `.grad` of a non-leaf is read.
        leaves = (entry for entry in self.parameters if is_leaf(entry.tensor))
        return [(entry, grad) for entry in leaves if (grad := self._gradient(entry)) is not None]

    def _gradient(self, entry: Member) -> Any:
        if not self.ranks:
            return entry.tensor.grad
        sharding = self.infos[entry.name].sharding
        return entry.tensor.grad if sharding is None or sharding.part is None else sharding.part.gradient(entry.tensor)

    @cached_property
    def gradient_extremes(self) -> Extremes:
        """Minimum and maximum of every gradient, by the gradient's `id`."""
        if self.across is not None:
            return self.across.gradient_extremes
        gradients = self.gradients
        if self.ranks:
            self.unread.update((entry.name, None) for entry, _ in gradients if self._is_part(entry))
            gradients = [(entry, gradient) for entry, gradient in gradients if not self._is_part(entry)]
        found, unread = read_extremes([gradient for _, gradient in gradients])
        self.unread.update((entry.name, None) for entry, gradient in gradients if id(gradient) in unread)
        return found

    # --- optimizers ------------------------------------------------------------------------

    @cached_property
    def groups(self) -> list[Group]:
        """Groups of all optimizers."""
        found = []
        for which, optimizer in enumerate(self.optimizers):
            before = f"optimizers.{which}." if len(self.optimizers) > 1 else ""
            for place, group in enumerate(optimizer.param_groups):
                tensors = group.get("params", ())
                given = list(tensors) if isinstance(tensors, list | tuple) else [tensors]
                listed = [tensor for each in given for tensor in self.meant(each)]
                found.append(Group(optimizer, f"{before}param_groups.{place}", group, listed))
        return found

    def meant(self, tensor: Any) -> list[Any]:
        """The model's tensors that an optimizer trains by a tensor: others than it in a model of FSDP."""
        return self._stand_ins.get(id(tensor), [tensor])

    @cached_property
    def _stand_ins(self) -> dict[int, list[Any]]:
        if "torch.distributed.fsdp" not in sys.modules:
            return {}
        return stand_ins(self.modules, [entry.tensor for entry in self.parameters])

    @cached_property
    def held(self) -> set[int]:
        """`id`s of all tensors in the groups."""
        return {id(tensor) for group in self.groups for tensor in group.tensors}

    def name_in(self, group: Group, place: int) -> str:
        """Name of a tensor in a group: the network's name if it has one."""
        entry = self.by_id.get(id(group.tensors[place]))
        return group.name(place) if entry is None else entry.name


_NORM = Selector(":norm")
