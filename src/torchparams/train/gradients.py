"""Gradients by name: a table over `.grad`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchparams.errors import NotReadable, UnknownName
from torchparams.io.live import read_only_copy
from torchparams.parameters import Parameters
from torchparams.sources.base import Source
from torchparams.sources.live.flat import RESHARD, unsharded
from torchparams.sources.live.tensors import LiveReading
from torchparams.sources.live.traverse import Traversal
from torchparams.sources.snapshot import SnapshotSource
from torchparams.train._live import live_table

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    import torch
    from torch import nn

    from torchparams.info import ParameterInfo
    from torchparams.reading import Lone, Reading
    from torchparams.sources.live.module import ModuleSource


def gradients(model: object) -> Parameters:
    """Gradients of a model as a table with the names of the parameters; every verb works on it.

    The table is live: it shows the current `.grad`. Parameters without a gradient are not in it. An info describes the
    gradient (its shape, dtype, memory), with the owner and `requires_grad` of its parameter, so that `:norm` selects as
    usual, and `:frozen` finds left-over gradients. `params[name]` returns a sparse gradient unchanged; functions that
    read values convert it to dense. The table of sharded gradients needs no communication; verbs on it do.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one.

    Raises:
        UnsupportedSource: `model` is not a live model.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    >>> grads = tp.gradients(model)
    >>> grads.names
    []
    >>> _ = model[0](torch.ones(1, 3)).sum().backward()
    >>> grads.names
    ['0.weight', '0.bias']
    >>> grads["0.bias"]
    tensor([1., 1.])
    """
    source, params = live_table(model, "torchparams.gradients")
    return Parameters(GradientSource(source), params.selector)


class GradientSource(Source):
    """Gradients of a live model, looked up at each use.

    Args:
        model: The model's parameters.

    >>> from torch import nn
    >>> from torchparams.sources.live.module import ModuleSource
    >>> GradientSource(ModuleSource(nn.Linear(3, 2))).label
    'gradients of Linear'
    """

    format = "gradients"
    live = True

    def __init__(self, model: ModuleSource) -> None:
        self.model = model
        self.label = f"gradients of {model.label}"

    def __eq__(self, other: object) -> bool:
        return self.model == other.model if isinstance(other, GradientSource) else NotImplemented

    def __hash__(self) -> int:
        return hash((GradientSource, self.model))

    # --- listing ---------------------------------------------------------------------------

    def keys(self) -> Mapping[str, Any]:
        """Canonical name → gradient; makes no infos."""
        if "torch.distributed.fsdp" in sys.modules:
            return self.reading().tensors
        return {name: grad for name, p in self.model.keys().items() if (grad := p.grad) is not None}

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
        """Canonical name and current gradient of every parameter that has one, or of `names`."""
        grads = self.keys()
        return iter(grads.items()) if names is None else ((name, grads[name]) for name in names)

    def infos(self) -> Mapping[str, ParameterInfo]:
        """Canonical name → info at the time of the call."""
        reading = self.reading()
        return dict(zip(reading.names, reading.infos, strict=True))

    def reading(self) -> GradientRecords:
        """One reading; fields are looked up when needed."""
        return GradientRecords.of_parameters(self.model.held_reading())

    def alone(self, name: str) -> Lone | None:
        """The gradient of the parameter `name`, found by visiting only the modules on its path."""
        lone = self.model.alone(name)
        if lone is None or lone.passed[-1].grad is None:
            return None
        assert isinstance(lone.reading, LiveReading)  # a model's are
        return replace(lone, reading=GradientRecords.of_parameters(lone.reading))

    def snapshot(self, reading: Reading) -> Source:
        """A source of the gradients in `reading`, a reading of this source."""
        return GradientSnapshot(self, reading)

    def walk(self, *, recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, str, Any]]:
        """Name, canonical name and gradient, with the semantics of `nn.Module.named_parameters`."""
        for given, name, parameter in self.model.walk(recurse=recurse, remove_duplicate=remove_duplicate):
            if parameter.grad is not None:
                yield given, name, parameter.grad

    def why_empty(self) -> list[str]:
        """Reasons why there are no gradients, as sentences."""
        parameters = self.model.keys()
        if not parameters:
            return self.model.why_empty()
        if not any(parameter.requires_grad for parameter in parameters.values()):
            return ["Every parameter is frozen: backward() computes no gradients."]
        return ["No parameter has a gradient: backward() computes them, zero_grad() removes them."]

    # --- values ----------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """The gradient object itself, for any spelling of the parameter's name.

        Raises:
            UnknownName: There is no such parameter, or it has no gradient.
        """
        grad = self.model.value(name).grad
        if grad is None:
            grad = self.keys().get(self.model.resolve(name))
        if grad is None:
            raise self._without(name)
        return grad

    def tensor(self, name: str) -> torch.Tensor:
        """The gradient, detached; sparse gradients are converted to dense.

        Raises:
            NotReadable: It is a part of a gradient, by FSDP.
        """
        self.model.refuse_part(name, self.model.value(name))
        return _with_zeros(self.value(name))

    def numpy(self, name: str) -> np.ndarray[Any, Any]:
        """The values as a read-only array: a view of the gradient's memory if it is on the CPU.

        Raises:
            NotReadable: It has no values (meta), or its class does not expose them (distributed).
        """
        from torchparams.sources.mapping import MappingSource

        return MappingSource({name: self.tensor(name)}, self.label).numpy(name)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of the values, which the next step does not overwrite.

        Raises:
            NotReadable: See `numpy`.
        """
        return read_only_copy(self.numpy(name))

    # --- names -----------------------------------------------------------------------------

    def takes(self, name: str) -> bool:
        """True if `name`, as spelled, leads to a parameter with a gradient."""
        return self.model.takes(name) and self.model.value(name).grad is not None

    def find(self, name: str) -> str | None:
        """The canonical name of a parameter with a gradient, for any spelling of it."""
        found = self.model.find(name)
        return found if found is not None and self.model.value(found).grad is not None else None

    def resolve(self, name: str) -> str:
        """Like `find`, but raises an error if the parameter or its gradient is missing.

        Raises:
            UnknownName: There is no such parameter, or it has no gradient.
        """
        found = self.model.resolve(name)
        if self.model.value(found).grad is None and found not in self.keys():
            raise self._without(name)
        return found

    def _without(self, name: str) -> UnknownName:
        frozen = not self.model.value(name).requires_grad
        return UnknownName(
            f"{name!r} has no gradient",
            where=self.model.label,
            exists="it is frozen" if frozen else None,
            hint=None if frozen else "backward() of a result that depends on it computes one",
        )


class GradientSnapshot(SnapshotSource):
    """Snapshot of the gradients."""

    def tensor(self, name: str) -> torch.Tensor:
        """The gradient, detached; sparse gradients are converted to dense."""
        return _with_zeros(self.value(name))


def _with_zeros(grad: torch.Tensor) -> torch.Tensor:
    grad = grad.detach()
    return grad if str(grad.layout) == "torch.strided" else grad.to_dense()


class GradientRecords(LiveReading):
    """One reading of the gradients; `requires_grad` is that of the parameters."""

    def __init__(
        self,
        listing: Traversal,
        aliases: Callable[[], Mapping[str, list[str]]],
        root: nn.Module,
        parameters: Mapping[str, Any],
    ) -> None:
        super().__init__(listing, aliases, root)
        self._parameters = parameters

    @classmethod
    def of_parameters(cls, reading: LiveReading) -> GradientRecords:
        """Gradients of the parameters in a reading of the model."""
        grads: dict[str, Any] = {}
        owners = []
        columns = reading.tensors.items(), reading.owners, reading.column("sharding")
        for (name, parameter), owner, sharding in zip(*columns, strict=True):
            grad = parameter.grad
            if grad is None and sharding is not None and sharding.part is not None:
                grad = sharding.part.gradient(parameter)
            if grad is None and sharding is not None and sharding.kind == "unsharded":
                raise NotReadable(unsharded(name), hint=RESHARD)  # its gradient is elsewhere
            if grad is not None:
                grads[name] = grad
                owners.append(owner)
        read = reading._listing
        listing = Traversal(grads, owners, read.raws, read.buffers, read.tied, read.shared)
        return cls(listing, lambda: reading._tied, reading.root, reading.tensors)

    @property
    def held(self) -> Mapping[str, Any]:
        """Canonical name → parameter with a gradient."""
        return {name: self._parameters[name] for name in self.tensors}

    @property
    def kept(self) -> Iterable[Any]:
        """The parameters, which say how their gradients are sharded."""
        return self.held.values()

    def one(self, name: str) -> ParameterInfo:
        """The info of one canonical name; makes no others."""
        (info,) = self.only({name}).infos
        return info

    def only(self, names: Container[str]) -> GradientRecords:
        """The reading limited to `names`, in the same order."""
        part = super().only(names)
        return GradientRecords(part._listing, part._find_aliases, self.root, self._parameters)

    def _find(self, field: str) -> Sequence[Any]:
        if field == "requires_grad":
            return [self._parameters[name].requires_grad for name in self.tensors]
        return super()._find(field)
