"""Optimizer state by parameter name; PyTorch identifies it by position only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, shorten
from torchparams.render.result import Result
from torchparams.render.rows import ROWS_SHOWN
from torchparams.render.tree import (
    Column,
    Row,
    Table,
    Text,
    Tree,
    cut,
    human_bytes,
    json_number,
    listed,
    plural,
    printable,
)
from torchparams.train._live import live_table
from torchparams.train._optimizers import NO_OPTIONS, Own
from torchparams.train._shards import refuse_flat_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

FLAT = ("d", "prev_flat_grad", "old_dirs", "old_stps")
"""LBFGS state over all parameters: vectors, or lists of vectors, of their concatenated elements."""


class OptimizerState(Result, Mapping[str, Any]):
    """Optimizer state by parameter name: a mapping `fc.weight.exp_avg` → tensor.

    The mapping holds the tensors, so `torchparams.of`, `stats` and `diff` accept it; `state` holds all values. The
    tensors are the optimizer's own, not copies. Made by `torchparams.optimizer_state`; `torchparams.save` writes all
    of it.

    Attributes:
        optimizer: Class of the optimizer, with its module; several are joined by commas. For a wrapper that returns
            the state of its inner optimizer, the inner class.
        state: Parameter name → key → value, as in the optimizer's `state_dict()`. LBFGS's vectors over all parameters
            are split by parameter.
        groups: Options of the groups, and state that some optimizers keep there, such as a step counter; `params`
            holds the parameter names of each.
        shapes: Name → shape of the parameter.
        shared: State of no single parameter: further state of LBFGS, and other keys of the state.
        extra: Keys of the optimizer's `state_dict()` besides state and groups.
        parts: For a list of optimizers, the state of each; otherwise empty.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> list(tp.optimizer_state(model, optimizer))
    ['weight.momentum_buffer', 'bias.momentum_buffer']
    """

    def __init__(
        self,
        optimizer: str,
        state: Mapping[str, Mapping[Any, Any]],
        groups: Sequence[Mapping[str, Any]],
        shapes: Mapping[str, tuple[int, ...]],
        shared: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        parts: Sequence[OptimizerState] = (),
    ) -> None:
        self.optimizer = optimizer
        self.state = {name: dict(values) for name, values in state.items()}
        self.groups = [dict(group) for group in groups]
        self.shapes = dict(shapes)
        self.shared = dict(shared or {})
        self.extra = dict(extra or {})
        self.parts = tuple(parts)

    @classmethod
    def of_parts(cls, parts: Sequence[OptimizerState]) -> OptimizerState:
        """Combine the states of several optimizers with disjoint parameters.

        Raises:
            MismatchError: A parameter is in two of them.
        """
        if len(parts) == 1:
            return parts[0]
        names = [name for part in parts for name in part.names]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise MismatchError(
                f"{plural(len(twice), 'parameter is', 'parameters are')} in two of the optimizers: {listed(twice)}",
                hint="pass each optimizer separately",
            )
        return cls(
            ", ".join(dict.fromkeys(part.optimizer for part in parts)),
            {name: values for part in parts for name, values in part.state.items()},
            [group for part in parts for group in part.groups],
            {name: shape for part in parts for name, shape in part.shapes.items()},
            {key: value for part in parts for key, value in part.shared.items()},
            {key: value for part in parts for key, value in part.extra.items()},
            parts,
        )

    def state_dict(self) -> dict[str, Any]:
        """All state as plain dicts, lists and tensors, for `torch.save`; `load_optimizer_state` accepts it.

        The keys `state` and `param_groups` have the layout of `torch.distributed.checkpoint` by name. For a list of
        optimizers, `optimizers` holds one such dict for each.
        """
        if self.parts:
            return {"optimizers": [part.state_dict() for part in self.parts]}
        return {
            "optimizer": self.optimizer,
            "state": self.state,
            "param_groups": self.groups,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "shared": self.shared,
            "extra": self.extra,
        }

    @property
    def names(self) -> list[str]:
        """Names of all parameters of the optimizer, with or without state, in the order of the groups."""
        return [name for group in self.groups for name in group["params"]]

    @property
    def label(self) -> str:
        """Class name of the optimizer without its module; several are joined by commas."""
        return ", ".join(name.rpartition(".")[2] for name in self.optimizer.split(", "))

    @property
    def nbytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(int(tensor.nbytes) for tensor in self._tensors().values())

    # --- a mapping of tensors --------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        import torch

        # Look the name up directly: building all tensors would make a loop over the items quadratic.
        owner, _, key = name.rpartition(".")
        value = self.state.get(owner, {}).get(key)
        if value is None and key.isdecimal():
            owner, _, key_of_list = owner.rpartition(".")
            several = self.state.get(owner, {}).get(key_of_list)
            value = several[int(key)] if isinstance(several, list | tuple) and int(key) < len(several) else None
        return value if isinstance(value, torch.Tensor) else self._tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())

    def _tensors(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, values in self.state.items():
            _collect(name, values, found)
        return found

    # `==` of two mappings of tensors would raise; use `diff` to compare values.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    # --- print -----------------------------------------------------------------------------------

    def tree(self, *, limit: int | None = ROWS_SHOWN) -> Tree:
        """Table of the parameters, the state of each, and the options of its group.

        Args:
            limit: Maximum number of parameters to show; None for all.
        """
        columns = (
            Column("parameter", style="name", shrink=True),
            Column("group", right=True, style="number"),
            Column("state", shrink=True, yields=True),
        )
        rows = [
            Row((name, str(i), ", ".join(_brief(key, value) for key, value in self.state.get(name, {}).items())))
            for i, group in enumerate(self.groups)
            for name in group["params"]
        ]
        parts: list[Text | Table] = [
            Text(printable(f"{self.label} ({plural(len(self.groups), 'group')})"), "title"),
            Table(columns, cut(rows, limit, "parameters")),
        ]
        for i, group in enumerate(self.groups):
            options = ", ".join(f"{key}={value!r}" for key, value in group.items() if key not in NO_OPTIONS)
            parts.append(Text(printable(f"group {i}: {options}"), "dim"))
        if self.shared:
            parts.append(Text(printable(f"of all together: {', '.join(map(str, self.shared))}"), "dim"))
        tensors = len(self)
        parts.append(
            Text(
                f"{plural(len(self.names), 'parameter')} · {plural(tensors, 'tensor')} · {human_bytes(self.nbytes)}",
                "dim",
            )
        )
        return Tree(tuple(parts))

    def to_json(self) -> dict[str, Any]:
        """The state as JSON data; tensors are described by shape and dtype, without values."""
        return {
            "optimizer": self.optimizer,
            "parameters": [
                {
                    "name": name,
                    "group": i,
                    "shape": list(self.shapes[name]),
                    "state": {str(key): _json(value) for key, value in self.state.get(name, {}).items()},
                }
                for i, group in enumerate(self.groups)
                for name in group["params"]
            ],
            "groups": [
                {key: _json(value) for key, value in group.items() if key not in NO_OPTIONS} for group in self.groups
            ],
            "shared": {str(key): _json(value) for key, value in self.shared.items()},
            "extra": {str(key): _json(value) for key, value in self.extra.items()},
        }


def optimizer_state(model: Any, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> OptimizerState:
    """Read an optimizer's state by the names of a model's parameters.

    The content is that of the optimizer's `state_dict()`. It includes the state inside wrappers (`accelerate`'s,
    `Lookahead`) and counters in the groups. A wrapper whose `state_dict()` leaves out state of its inner optimizer is
    refused.

    State of sharded parameters (DTensors) is sharded too, and has the shape of the whole; nothing is communicated.
    `torchparams.save` writes it whole: all ranks make that call. The state of an optimizer over FSDP1's flat parameter
    is refused.

    Args:
        model: The model whose parameters the optimizer trains, wrapped or not. A table means its whole model.
        optimizer: Any `torch.optim.Optimizer`, or a list of optimizers with disjoint parameters.

    Raises:
        MismatchError: The optimizer holds tensors that are not parameters of the model, or a parameter is in two
            optimizers.
        UnsupportedSource: The model is not live, `optimizer` is not an optimizer, or its `state_dict()` is incomplete.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> state = tp.optimizer_state(model, optimizer)
    >>> sorted(state.state["weight"]), state["weight.exp_avg"].shape
    (['exp_avg', 'exp_avg_sq', 'step'], torch.Size([2, 3]))
    >>> torch.save(state.state_dict(), "/dev/null")
    """
    source, _ = live_table(model, "torchparams.optimizer_state")
    refuse_flat_state(source)
    if isinstance(optimizer, list | tuple) and optimizer:
        return OptimizerState.of_parts([_state_of(Own(source, one)) for one in optimizer])
    return _state_of(Own(source, optimizer))


def _state_of(own: Own) -> OptimizerState:
    import torch

    state = own.state()
    keys = set(own.keys)
    shared = {str(key): value for key, value in own.saved["state"].items() if key not in keys}
    if isinstance(own.kind, torch.optim.LBFGS) and state:
        flat = state[own.names[0]]
        state = split_flat(flat, {name: real_shape(p) for name, p in own.by_name.items()})
        shared |= {key: value for key, value in flat.items() if key not in FLAT}
    names = iter(own.names)
    groups = [
        {
            **{key: value for key, value in group.items() if key not in NO_OPTIONS},
            "params": [next(names) for _ in group["params"]],
        }
        for group in own.saved["param_groups"]
    ]
    shapes = {name: tuple(p.shape) for name, p in own.by_name.items()}
    extra = {key: value for key, value in own.saved.items() if key not in ("state", "param_groups")}
    return OptimizerState(own.class_name, state, groups, shapes, shared, extra)


# --- LBFGS ----------------------------------------------------------------------------------------


def real_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of a parameter in LBFGS, which views a complex number as two real ones."""
    return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)


def split_flat(flat: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """Split LBFGS's vectors by parameter, as views.

    Args:
        flat: LBFGS's state.
        shapes: The parameters' `real_shape`s by name, in the order of the vectors.

    Raises:
        MismatchError: The length of a vector differs from the number of elements.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    found: dict[str, dict[str, Any]] = {name: {} for name in shapes}
    for key in FLAT:
        value = flat.get(key)
        if value is None:
            continue
        vectors = value if isinstance(value, list) else [value]
        for vector in vectors:
            if vector.numel() != total:
                raise MismatchError(
                    f"the {key!r} of LBFGS has {vector.numel():,} elements, and the parameters {total:,}",
                    hint="pass the names of the parameters in the optimizer's order",
                )
        at = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            parts = [vector.reshape(-1)[at : at + size].view(shape) for vector in vectors]
            found[name][key] = parts if isinstance(value, list) else parts[0]
            at += size
    return found


def join_flat(state: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Join the vectors again, in the order of `names`."""
    import torch

    joined: dict[str, Any] = {}
    for key in FLAT:
        parts = [state[name][key] for name in names if key in state.get(name, ())]
        if len(parts) != len(names):
            continue
        if isinstance(parts[0], list):
            joined[key] = [torch.cat([p[i].reshape(-1) for p in parts]) for i in range(len(parts[0]))]
        else:
            joined[key] = torch.cat([part.reshape(-1) for part in parts])
    return joined


# --- print ----------------------------------------------------------------------------------------


def _collect(name: str, value: Any, found: dict[str, Any]) -> None:
    """Collect every tensor in a nested value, under its joined keys."""
    import torch

    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _collect(f"{name}.{key}", inner, found)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _collect(f"{name}.{i}", inner, found)


def _brief(key: Any, value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and not value.dim() and value.device.type == "cpu":
            return f"{key}={value.item():g}"
        return str(key)
    if isinstance(value, list | tuple | Mapping):
        return f"{key} ({len(value)})"
    return f"{key}={shorten(repr(value), 20)}"


def _json(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, float):
        return json_number(value)
    return value if isinstance(value, str | int | None) else shorten(repr(value))
