"""Gradients by name: a table over `.grad`, and all their norms in one pass."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.errors import OptionError, UnknownName
from torchparams.io.live import read_only_copy
from torchparams.names import layer_of
from torchparams.parameters import Parameters, of
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tabular import Tabular
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    json_number,
    listed,
    plural,
)
from torchparams.selectors import Selector
from torchparams.sources.base import Source
from torchparams.sources.live.flat import all_modules, shardings
from torchparams.sources.live.sharding import is_dtensor
from torchparams.sources.live.tensors import LiveReading
from torchparams.sources.live.traverse import Traversal
from torchparams.sources.snapshot import SnapshotSource
from torchparams.train._live import live_table, refuse_path
from torchparams.train._norms import combined, norms_of, norms_of_shards, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, KeysView, Mapping, Sequence

    import numpy as np
    import torch
    from torch import nn

    from torchparams.info import ParameterInfo, Sharding
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


# --- norms ----------------------------------------------------------------------------------


def grad_norms(model: object, by: object = None, *, p: float = 2) -> GradNorms:
    """Norms of each gradient, of groups, and of all gradients, by one `torch._foreach_norm` and one transfer.

    Half-precision gradients are summed in float32. The norms of groups and of all gradients are combined from those of
    the parameters in float64 as `(Σ normᵖ)^(1/p)`, as in `torch.nn.utils.get_total_norm`. A gradient whose powers
    overflow or underflow in its dtype is first scaled by its largest element.

    Of sharded gradients (DTensors, or parts of FSDP1's flat gradient), each rank takes the norms of its parts. All of
    their ranks make the call: they meet, and gather once (one collective, for any number of parameters), and
    every rank gets the norms of the whole. Gradients of which ranks keep summands (`Partial`) take one collective more
    for each mesh and dtype.

    Args:
        model: A live `nn.Module`, a `Parameters` of one, or a table from `gradients`.
        by: How to group: by `"module"`, by `"layer"` (the name up to and including its first number), by `"dtype"`; by
            a selector, a list of selectors, or a mapping of labels to selectors, each of them strict and on its own, so
            that groups may overlap; or the parameter groups of an optimizer (`optimizer.param_groups`, or what `groups`
            gave), which are called by their places. None gives no groups.
        p: Order of the norm: a positive number or `math.inf`.

    Returns:
        The norms, by name.

    Raises:
        NoMatch: A part of a selector matches no parameter.
        OptionError: `p` is not positive.
        NotReadable: A gradient has no values: it is on the meta device.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    >>> with torch.no_grad():
    ...     for parameter in model.parameters():
    ...         parameter.grad = torch.ones_like(parameter)
    >>> norms = tp.grad_norms(model, by="module")
    >>> round(norms.total ** 2), round(norms.norms["0.weight"] ** 2)
    (11, 6)
    >>> print(norms)
    Sequential: gradient norms, p = 2
    group  tensors   norm
    0            2  2.828
    1            2  1.732
    ─────────────────────
    total        4  3.317
    """
    if not isinstance(p, int | float) or not p > 0:
        raise OptionError(f"`p` must be a positive number or math.inf, not {p!r}")
    names, grads, without = [], [], []
    source, parameters = _read(model)
    kept = _flat(source, parameters)
    for name, parameter in parameters.items():
        grad = parameter.grad
        if grad is None and name in kept and kept[name].part is not None:
            grad = kept[name].part.gradient(parameter)
        if grad is not None:
            names.append(name)
            grads.append(grad)
        elif parameter.requires_grad:
            without.append(name)
    if kept or any(map(is_dtensor, grads)):
        values, nonfinite = norms_of_shards(names, grads, float(p), source.label, kept)
    else:
        values = norms_of(names, grads, float(p), source.label)
        nonfinite = settle(values, grads, float(p))
    norms = dict(zip(names, values, strict=True))
    members = {} if by is None else _members(source, parameters, norms, by)
    return GradNorms(source.label, norms, float(p), members, tuple(without), tuple(names[i] for i in nonfinite))


def _flat(source: ModuleSource, parameters: Mapping[str, Any]) -> dict[str, Sharding]:
    """How parameters are kept that FSDP has in a flat parameter, or gathered for a forward pass."""
    found = shardings(all_modules(source.module), parameters.values())
    if found is None:
        return {}
    return {name: sharding for name, sharding in zip(parameters, found, strict=True) if sharding is not None}


def _read(model: object) -> tuple[ModuleSource, Mapping[str, Any]]:
    """The model and its selected parameters."""
    refuse_path(model, "torchparams.grad_norms")
    params = of(model)
    if isinstance(params.source, GradientSource):
        every = params.source.model.keys()
        return params.source.model, {name: every[name] for name in params}
    source, params = live_table(params, "torchparams.grad_norms")
    if params.selector is None:
        return source, source.keys()
    reading = source.reading()
    return source, reading.only(params.selector.names(reading)).tensors


_WORDS: dict[str, Callable[[str, Any], str]] = {
    "module": lambda name, _: name.rpartition(".")[0],
    "layer": lambda name, _: layer_of(name) if "." in name else "",
    "dtype": lambda _, parameter: str(parameter.dtype).removeprefix("torch."),
}
"""Words that name a way to group, and the group of a parameter; that at the top level has no name."""


def _members(
    source: ModuleSource, parameters: Mapping[str, Any], norms: Mapping[str, float], by: object
) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    if isinstance(by, list | tuple) and len(by) == 1 and by[0] in _WORDS:
        by = by[0]
    if isinstance(by, str) and by in _WORDS:
        for name in norms:
            groups.setdefault(_WORDS[by](name, parameters[name]), []).append(name)
        return {label: tuple(names) for label, names in groups.items()}
    if isinstance(by, list) and by and all(isinstance(group, dict) and "params" in group for group in by):
        of_id = {id(parameters[name]): name for name in norms}
        return {
            f"group {place}": tuple(of_id[id(p)] for p in group["params"] if id(p) in of_id)
            for place, group in enumerate(by)
        }
    reading = source.reading().only(parameters)
    if isinstance(by, dict):
        wanted = {str(label): Selector.of(what) for label, what in by.items()}
    else:
        selectors = [Selector.of(what) for what in (by if isinstance(by, list | tuple) else [by])]
        wanted = {}
        for selector in selectors:
            # Selectors of modules of one class print alike, so number them.
            alike = sum(label.partition(" (")[0] == str(selector) for label in wanted)
            wanted[f"{selector} ({alike + 1})" if alike else str(selector)] = selector
    found = {label: what.names(reading, strict=True, where=source.label) for label, what in wanted.items()}
    return {label: tuple(name for name in norms if name in hits) for label, hits in found.items()}


class NormRow(NamedTuple):
    """The norm of one gradient, or of all gradients of a group together.

    Attributes:
        name: The parameter's name, or the label of the group.
        tensors: How many gradients there are.
        norm: Their norm.
    """

    name: str
    tensors: int
    norm: float


NORM_COLUMNS = {"name": str, "tensors": int, "norm": float}
"""Attributes of `NormRow` → their types, for tables handed to other libraries."""


class GradNorms(Result, Tabular):
    """Norms of gradients; prints as a table.

    Attributes:
        label: The model.
        p: Order of the norm.
        norms: Parameter name → norm of its gradient, in the model's order.
        members: Group label → names of its parameters with a gradient.
        without: Names of trainable parameters without a gradient.
        nonfinite: Names of parameters whose gradient holds NaN or infinite values, in the model's order.
    """

    columns = NORM_COLUMNS

    def __init__(
        self,
        label: str,
        norms: dict[str, float],
        p: float,
        members: dict[str, tuple[str, ...]],
        without: tuple[str, ...],
        nonfinite: tuple[str, ...] = (),
    ) -> None:
        self.label = label
        self.norms = norms
        self.p = p
        self.members = members
        self.without = without
        self.nonfinite = nonfinite

    @cached_property
    def total(self) -> float:
        """Norm of all gradients together."""
        return combined(self.norms.values(), self.p)

    @cached_property
    def groups(self) -> dict[str, float]:
        """Group label → norm of all its gradients together."""
        return {label: combined(map(self.norms.__getitem__, names), self.p) for label, names in self.members.items()}

    def table_rows(self) -> list[NormRow]:
        """A row for each group where there are any, else for each parameter."""
        if self.members:
            return [NormRow(label, len(self.members[label]), norm) for label, norm in self.groups.items()]
        return [NormRow(name, 1, norm) for name, norm in self.norms.items()]

    def keys(self) -> KeysView[str]:
        """The labels of the groups where there are any, else the names: `dict(norms)` has their norms."""
        return (self.groups if self.members else self.norms).keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __getitem__(self, name: str) -> float:
        """The norm of a group, or of a parameter."""
        if name in self.members:
            return self.groups[name]
        try:
            return self.norms[name]
        except KeyError:
            raise UnknownName.among(name, [*self.members, *self.norms], self.label) from None

    def tree(self, *, limit: int | None = ROWS_SHOWN) -> Tree:
        """Tree of the norms, by group if there are groups, otherwise by parameter; non-finite values first.

        Args:
            limit: Maximum number of rows; None for all.
        """
        grouped = bool(self.members)
        values = self.groups if grouped else self.norms
        counts = {label: len(names) for label, names in self.members.items()}

        bad = set(self.nonfinite)
        wrong = {label for label, names in self.members.items() if bad.intersection(names)} if grouped else bad

        def row(label: str, value: float, tensors: int, wrong: bool, total: bool = False) -> Row:
            shown = Cell(_number(value), "error" if wrong else "")
            count = (f"{tensors:,}",) if grouped else ()
            return Row((label, *count, shown), total=total)

        ordered = sorted(values, key=lambda label: label not in wrong)
        rows = [row(label or "(top level)", values[label], counts.get(label, 1), label in wrong) for label in ordered]
        columns = (
            Column("group" if grouped else "name", style="name", shrink=True),
            *([Column("tensors", right=True)] if grouped else []),
            Column("norm", right=True, style="number"),
        )
        total = row("total", self.total, len(self.norms), bool(bad), total=True)
        parts: list[Text | Table] = [
            Text(f"{self.label}: gradient norms, p = {_number(self.p)}", "title"),
            Table(columns, (*cut(rows, limit, "groups" if grouped else "parameters"), total)),
        ]
        if self.nonfinite:
            text = f"not finite: {listed(self.nonfinite)}"
            parts.append(Text(text, "error"))
        if self.without:
            what = plural(len(self.without), "trainable parameter has", "trainable parameters have")
            parts.append(Text(f"{what} no gradient: {listed(self.without)}", "warn"))
        return Tree(tuple(parts))

    def to_json(self) -> dict[str, Any]:
        """The norms as JSON data."""
        return {
            "p": json_number(self.p),
            "total": json_number(self.total),
            "norms": {name: json_number(norm) for name, norm in self.norms.items()},
            "groups": {
                label: {"norm": json_number(self.groups[label]), "names": list(names)}
                for label, names in self.members.items()
            },
            "nonfinite": list(self.nonfinite),
            "without": list(self.without),
        }


def _number(value: float) -> str:
    return f"{value:.4g}"
