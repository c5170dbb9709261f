"""Norms of gradients by name and by group, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.errors import NotReadable, OptionError, UnknownName
from torchparams.names import layer_of
from torchparams.parameters import of
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
from torchparams.sources.live.flat import RESHARD, all_modules, shardings, unsharded
from torchparams.sources.live.sharding import is_dtensor
from torchparams.train._live import live_table, refuse_path
from torchparams.train._norms import combined, norms_of, norms_of_shards, settle
from torchparams.train.gradients import GradientSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, KeysView, Mapping

    from torchparams.info import Sharding
    from torchparams.sources.live.module import ModuleSource


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
        NotReadable: A gradient has no values: it is on the meta device. Or a parameter is a copy that FSDP gathered for
            a forward pass, which has none.

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
        if grad is None and name in kept and kept[name].kind == "unsharded":
            raise NotReadable(unsharded(name), where=source.label, hint=RESHARD)  # its gradient is elsewhere
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


@dataclass(frozen=True, repr=False, eq=False)
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

    label: str
    norms: dict[str, float]
    p: float
    members: dict[str, tuple[str, ...]]
    without: tuple[str, ...]
    nonfinite: tuple[str, ...] = ()

    columns = NORM_COLUMNS

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
