"""The state of an optimizer by the names of the parameters; PyTorch knows it by position alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, UnsupportedSource, shorten
from torchparams.report import (
    Column,
    Report,
    Row,
    Table,
    Text,
    cut,
    human_bytes,
    json_number,
    plural,
    printable,
    to_html,
    to_text,
)
from torchparams.rows import ROWS_SHOWN
from torchparams.sources._module import ModuleSource
from torchparams.train._live import live_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

FLAT = ("d", "prev_flat_grad", "old_dirs", "old_stps")
"""What LBFGS keeps of all parameters together: vectors, or lists of vectors, of their elements one after the other."""


class OptimizerState(Mapping[str, Any]):
    """What an optimizer remembers, by the names of the parameters: a mapping `fc.weight.exp_avg` → tensor.

    As a mapping it holds the tensors, so that `torchparams.of`, `stats` and `diff` take it; `state` holds everything.
    The tensors are the optimizer's own, not copies. Made by `torchparams.optimizer_state`.

    Attributes:
        optimizer: The class of the optimizer, with its module.
        state: Name of the parameter → key → value, as in `optimizer.state`. The vectors that LBFGS keeps of all
            parameters are cut into those of each.
        groups: The groups' options; under `params`, the names of the parameters of each.
        shapes: Name → shape of the parameter.
        shared: State that belongs to no one parameter: what else LBFGS keeps, and other keys of `optimizer.state`.

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
    ) -> None:
        self.optimizer = optimizer
        self.state = {name: dict(values) for name, values in state.items()}
        self.groups = [dict(group) for group in groups]
        self.shapes = dict(shapes)
        self.shared = dict(shared or {})

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and tensors, for `torch.save`; `load_optimizer_state` takes it back.

        The keys `state` and `param_groups` are laid out as `torch.distributed.checkpoint` does it by name.
        """
        return {
            "optimizer": self.optimizer,
            "state": self.state,
            "param_groups": self.groups,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "shared": self.shared,
        }

    @property
    def names(self) -> list[str]:
        """The names of all parameters that the optimizer has, with state or without, in the order of the groups."""
        return [name for group in self.groups for name in group["params"]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(tensor.nbytes) for tensor in self._tensors().values())

    # --- a mapping of tensors --------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        import torch

        # A loop over the items asks for each: the way there leads through the name, not through all tensors.
        owner, _, key = name.rpartition(".")
        value = self.state.get(owner, {}).get(key)
        if value is None and key.isdecimal():
            owner, _, key_of_list = owner.rpartition(".")
            listed = self.state.get(owner, {}).get(key_of_list)
            value = listed[int(key)] if isinstance(listed, list | tuple) and int(key) < len(listed) else None
        return value if isinstance(value, torch.Tensor) else self._tensors()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors())

    def __len__(self) -> int:
        return len(self._tensors())

    def _tensors(self) -> dict[str, Any]:
        import torch

        found = {}
        for name, values in self.state.items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    found[f"{name}.{key}"] = value
                elif isinstance(value, list | tuple):
                    found.update({f"{name}.{key}.{i}": v for i, v in enumerate(value) if isinstance(v, torch.Tensor)})
        return found

    # Comparing values is `diff`; `==` of two mappings of tensors would be an error.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    # --- print -----------------------------------------------------------------------------------

    def report(self, *, limit: int | None = ROWS_SHOWN) -> Report:
        """A table of the parameters, what is kept of each, and the options of its group.

        Args:
            limit: Most parameters to show; None for all.
        """
        columns = (
            Column("parameter", style="name", shrink=True),
            Column("group", right=True, style="number"),
            Column("state", shrink=True),
        )
        rows = [
            Row((name, str(i), ", ".join(_brief(key, value) for key, value in self.state.get(name, {}).items())))
            for i, group in enumerate(self.groups)
            for name in group["params"]
        ]
        parts: list[Text | Table] = [
            Text(printable(f"{self.optimizer.rpartition('.')[2]} ({plural(len(self.groups), 'group')})"), "title"),
            Table(columns, cut(rows, limit, "parameters")),
        ]
        for i, group in enumerate(self.groups):
            options = ", ".join(f"{key}={value!r}" for key, value in group.items() if key not in _NO_OPTIONS)
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
        return Report(tuple(parts))

    def to_json(self) -> dict[str, Any]:
        """The state as JSON takes it: tensors by shape and dtype, their values left out."""
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
                {key: _json(value) for key, value in group.items() if key not in _NO_OPTIONS} for group in self.groups
            ],
            "shared": {str(key): _json(value) for key, value in self.shared.items()},
        }

    def __str__(self) -> str:
        return to_text(self.report())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return to_html(self.report())


_NO_OPTIONS = ("params", "param_names")


def optimizer_state(model: Any, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """What an optimizer remembers of a model's parameters, by their names.

    Args:
        model: The model whose parameters the optimizer trains, wrapped or not; a table of it stands for all of it.
        optimizer: Any `torch.optim.Optimizer`.

    Raises:
        MismatchError: The optimizer holds tensors that are no parameters of the model.
        UnsupportedSource: The model is not live, or the optimizer is none.

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
    import torch

    refuse_no_optimizer(optimizer)
    source, _ = live_table(model, "torchparams.optimizer_state")
    names = names_by_id(source)
    groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    strangers = [
        (i, p)
        for i, (group, found) in enumerate(zip(optimizer.param_groups, groups, strict=True))
        for p, name in zip(group["params"], found, strict=True)
        if name is None
    ]
    if strangers:
        i, first = strangers[0]
        raise MismatchError(
            f"the optimizer holds {plural(len(strangers), 'tensor')} that the model does not: "
            f"the first is of shape {list(first.shape)}, in group {i}",
            where=source.label,
            hint="pass the model that the optimizer was made of; "
            "if parameters were replaced since, make the optimizer anew",
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    listed = [names[id(p)] for p in params]
    state = {name: optimizer.state[p] for name, p in zip(listed, params, strict=True) if p in optimizer.state}
    shared = {str(key): value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    shapes = {name: tuple(p.shape) for name, p in zip(listed, params, strict=True)}
    if isinstance(optimizer, torch.optim.LBFGS) and state:
        flat = state[listed[0]]
        state = split_flat(flat, {name: real_shape(p) for name, p in zip(listed, params, strict=True)})
        shared |= {key: value for key, value in flat.items() if key not in FLAT}
    options = [
        {**{key: value for key, value in group.items() if key not in _NO_OPTIONS}, "params": found}
        for group, found in zip(optimizer.param_groups, groups, strict=True)
    ]
    return OptimizerState(class_name(optimizer), state, options, shapes, shared)


def refuse_no_optimizer(optimizer: object) -> None:
    """An error for what is no optimizer, such as its `state_dict`.

    Raises:
        UnsupportedSource: It has no `param_groups` and `state`.
    """
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise UnsupportedSource(
            f"a {type(optimizer).__name__} is no optimizer",
            exists="an optimizer has param_groups and a state",
            hint="pass the model, then the optimizer itself",
        )


def names_by_id(source: ModuleSource) -> dict[int, str]:
    """`id` of each parameter → its canonical name."""
    return {id(tensor): name for name, tensor in ModuleSource(source.module).keys().items()}


def class_name(optimizer: object) -> str:
    """The class of an optimizer, with its module."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


# --- LBFGS ----------------------------------------------------------------------------------------


def real_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of what LBFGS sees of a parameter: a complex number is two."""
    return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)


def split_flat(flat: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """The part of each parameter in the vectors that LBFGS keeps: views of them.

    Args:
        flat: LBFGS's state.
        shapes: The parameters' `real_shape`s by name, in the order of the vectors.

    Raises:
        MismatchError: The vectors are not of so many elements.
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
                    hint="give the names of the parameters in the order that the optimizer had them in",
                )
        at = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            parts = [vector.reshape(-1)[at : at + size].view(shape) for vector in vectors]
            found[name][key] = parts if isinstance(value, list) else parts[0]
            at += size
    return found


def join_flat(state: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The vectors again, in the order of `names`."""
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


def _brief(key: Any, value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and not value.dim() and value.device.type == "cpu":
            return f"{key}={value.item():g}"
        return str(key)
    if isinstance(value, list | tuple):
        return f"{key} ({len(value)})"
    return f"{key}={shorten(repr(value), 20)}"


def _json(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float):
        return json_number(value)
    return value if isinstance(value, str | int | None) else shorten(repr(value))
