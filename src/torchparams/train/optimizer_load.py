"""An optimizer's state back into an optimizer, by name: parameters may be in another order, frozen, gone or new."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.errors import MismatchError, UnsupportedSource, nearest
from torchparams.info import ParameterInfo, file_tensor
from torchparams.renames import Renames, propose
from torchparams.report import human_shape, listed, plural
from torchparams.sources._module import ModuleSource
from torchparams.train._live import live_table
from torchparams.train.coverage import Coverage, Item, grouped, strict_kinds
from torchparams.train.optimizer import (
    FLAT,
    OptimizerState,
    class_name,
    join_flat,
    names_by_id,
    real_shape,
    refuse_no_optimizer,
    split_flat,
)

if TYPE_CHECKING:
    import torch

_NEEDED = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg", "momentum": "momentum_buffer"}
"""Options that are of no use without something in the state, which torch makes with the first step only."""

_ELEMENTWISE = frozenset(
    (
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum"),
        *("exp_inf", "prev", "step_size", "ax"),
    )
)
"""Keys of torch's optimizers whose tensors have an element for each of the parameter."""

_CANDIDATES = 16  # names of each kind that are compared letter by letter


def load_optimizer_state(
    model: Any,
    optimizer: torch.optim.Optimizer,
    x: Any,
    *,
    names: Sequence[str] | None = None,
    rename: object = None,
    options: bool = False,
    strict: bool | Collection[str] = True,
) -> Coverage:
    """Give an optimizer the state that was saved, each parameter that of its own name.

    The model may have its parameters in another order or in other groups, frozen ones among them or left out, and new
    ones. A parameter that nothing is loaded for keeps the state that it has. Values are copied, and cast as
    `optimizer.load_state_dict` does it, by which they are loaded at last. Nothing is changed unless all fits that
    `strict` asks for.

    Args:
        model: The model whose parameters the optimizer trains; a table of it stands for all of it.
        optimizer: The optimizer.
        x: An `OptimizerState`, its `state_dict()`, one by name of `torch.distributed.checkpoint`, or the `state_dict()`
            of an optimizer with `param_names` in its groups (see `torchparams.groups`).
        names: For the `state_dict()` of an optimizer without `param_names`: the names of its parameters, in the order
            that the optimizer had them in. Nothing is guessed.
        rename: How saved names become the model's: any spelling of `torchparams.renames`, or `"auto"` for the prefixes
            that make most of them fit. Tensors are never paired by their shape.
        options: Restore the options of the groups too, such as `lr`; of a group whose parameters were in several
            groups these must agree.
        strict: True to refuse what is missing, unexpected or mismatched; False to load what fits; or the kinds to
            refuse, as in `("mismatched",)`.

    Returns:
        What was loaded, by the name of the parameter, and what did not fit.

    Raises:
        MismatchError: Something does not fit that `strict` asks for, or nothing at all; or the state is that of another
            kind of optimizer. Nothing was changed.
        UnsupportedSource: `x` is no state of an optimizer, or one without names.

    >>> import torch
    >>> import torchparams as tp
    >>> a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
    >>> a(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> saved = tp.optimizer_state(a, optimizer).state_dict()
    >>> other = torch.optim.SGD([b.bias, b.weight], lr=0.1, momentum=0.9)
    >>> print(tp.load_optimizer_state(b, other, saved))
    SGD state → SGD of Linear
    2 loaded · 0 missing · 0 unexpected · 0 mismatched
    >>> torch.equal(other.state[b.weight]["momentum_buffer"], optimizer.state[a.weight]["momentum_buffer"])
    True
    """
    import torch

    strict_kinds(strict)
    refuse_no_optimizer(optimizer)
    source, _ = live_table(model, "torchparams.load_optimizer_state")
    own = _Own(source, optimizer)
    saved = _renamed(_parsed(x, names, own), rename, own)
    _check_kind(saved, optimizer)
    chosen = _options(saved, own, options)
    coverage = _match(saved, own, chosen)
    coverage.refuse(strict, lambda: "strict=False loads what fits" if coverage.loaded else None)
    if not coverage.loaded and own.names:
        raise MismatchError(
            "nothing of it fits the optimizer",
            where=f"{coverage.source} → {coverage.model}",
            exists=f"it is of {listed(saved.names) or 'no parameters'}; the optimizer has {listed(own.names)}",
            hint='rename="auto" finds the prefixes that wrappers add',
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        if not coverage.complete:
            raise MismatchError(
                "LBFGS keeps one state of all parameters together, and these are not the same parameters",
                where=f"{coverage.source} → {coverage.model}",
                exists=f"{listed([*coverage.missing, *coverage.unexpected, *coverage.mismatched])} differ",
                hint="start it anew",
            )
        joined = {**saved.shared, **join_flat(saved.state, own.names)}
        state: dict[Any, Any] = {0: _copied(joined)} if joined else {}
    else:
        state = {key: _copied(value) for key, value in saved.shared.items()}
        for place, (name, parameter) in enumerate(zip(own.names, own.parameters, strict=True)):
            if name in coverage.loaded:
                if name in saved.state:
                    state[place] = _copied(saved.state[name])
            elif parameter in optimizer.state:
                state[place] = optimizer.state[parameter]
    places = iter(range(len(own.names)))
    groups = [
        {**given, "params": [next(places) for _ in group["params"]]}
        for given, group in zip(chosen, optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return coverage


class _Own:
    """The optimizer's parameters, by name."""

    def __init__(self, source: ModuleSource, optimizer: torch.optim.Optimizer) -> None:
        self.source = source
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known = names_by_id(source)
        unknown = sum(id(p) not in known for p in self.parameters)
        if unknown:
            raise MismatchError(
                f"the optimizer holds {plural(unknown, 'tensor')} that the model does not",
                where=source.label,
                hint="make the optimizer of the model's own parameters",
            )
        self.names = [known[id(p)] for p in self.parameters]
        self.by_name = dict(zip(self.names, self.parameters, strict=True))
        self.model = ModuleSource(source.module).keys()

    def canonical(self, name: str) -> str:
        """The canonical name for a spelling of it; a stranger's own otherwise."""
        if name in self.model:
            return name
        return self.source.resolve(name) if self.source.takes(name) else name

    def has(self, name: str) -> bool:
        """Whether it is a spelling of the name of a parameter of the model."""
        return self.canonical(name) in self.model


# --- what was saved -------------------------------------------------------------------------------


def _parsed(x: Any, names: Sequence[str] | None, own: _Own) -> OptimizerState:
    if isinstance(x, OptimizerState):
        return x
    if not isinstance(x, Mapping) or "state" not in x or "param_groups" not in x:
        raise UnsupportedSource(
            f"a {type(x).__name__} is no state of an optimizer",
            exists="that is an OptimizerState, or a state_dict with the keys state and param_groups",
            hint=_hint(x),
        )
    groups = [dict(group) for group in x["param_groups"]]
    keys = [key for group in groups for key in group["params"]]
    if names is None and all(isinstance(key, str) for key in keys):
        called = dict(zip(keys, keys, strict=True))
    else:
        called = dict(zip(keys, _names_of(groups, keys, names), strict=True))
    for group in groups:
        group["params"] = [called[key] for key in group["params"]]
    state = {called[key]: value for key, value in x["state"].items() if key in called}
    shared = {str(key): value for key, value in x["state"].items() if key not in called}
    shared |= x.get("shared") or {}
    if "shapes" not in x and any(_is_flat(value) for value in state.values()):
        # The state of LBFGS as torch has it: vectors of all parameters, under the first of them.
        flat = next(value for value in state.values() if _is_flat(value))
        shapes = {name: real_shape(own.model[own.canonical(name)]) for name in called.values() if own.has(name)}
        if len(shapes) < len(called):
            raise MismatchError(
                "the vectors of LBFGS are of all its parameters, and the model does not have all of these",
                exists=f"it lacks {listed(name for name in called.values() if not own.has(name))}",
                hint="save torchparams.optimizer_state(model, optimizer).state_dict() instead, which cuts them by name",
            )
        state = split_flat(flat, shapes)
        shared |= {key: value for key, value in flat.items() if key not in FLAT}
    shapes_saved = {name: tuple(shape) for name, shape in (x.get("shapes") or {}).items()}
    return OptimizerState(str(x.get("optimizer") or ""), state, groups, shapes_saved, shared)


def _is_flat(value: Mapping[str, Any]) -> bool:
    flat = value.get("prev_flat_grad")
    return flat is not None and flat.dim() == 1


def _names_of(groups: list[dict[str, Any]], keys: list[Any], names: Sequence[str] | None) -> list[str]:
    if names is None:
        if not all("param_names" in group for group in groups):
            raise UnsupportedSource(
                "the state knows its parameters by position alone, and their names are not in it",
                hint="give names=, the names of the parameters in the order that the optimizer had them in: "
                "list(dict(model.named_parameters())) of the model as it was, if it was made of model.parameters()",
            )
        names = [name for group in groups for name in group["param_names"]]
    if len(names) != len(keys) or len(set(names)) != len(names):
        raise MismatchError(
            f"there are {plural(len(set(names)), 'name')} for {plural(len(keys), 'parameter')}",
            hint="give each parameter of the optimizer one name, in its order",
        )
    return list(names)


def _hint(x: Any) -> str | None:
    if isinstance(x, str) or hasattr(x, "__fspath__"):
        return "load the file first: torch.load(path, weights_only=True)"
    if isinstance(x, Mapping):
        inside = [key for key, value in x.items() if isinstance(value, Mapping) and "param_groups" in value]
        return f"pass what is under {inside[0]!r} in it" if inside else None
    return "pass its state_dict()" if hasattr(x, "state_dict") else None


def _renamed(saved: OptimizerState, rename: object, own: _Own) -> OptimizerState:
    """The same under the names that the model uses."""
    names = saved.names
    if isinstance(rename, str) and rename == "auto":
        proposal = propose(
            _records({name: saved.shapes.get(name, ()) for name in names}),
            _records({name: tuple(p.shape) if saved.shapes else () for name, p in own.model.items()}),
        )
        renames = proposal or Renames()
    else:
        renames = Renames.of(rename)
    new = renames.apply(names, where="the saved state") if renames else dict(zip(names, names, strict=True))
    new = {old: own.canonical(name) for old, name in new.items()}
    if all(old == name for old, name in new.items()):
        return saved
    return OptimizerState(
        saved.optimizer,
        {new[name]: values for name, values in saved.state.items()},
        [{**group, "params": [new[name] for name in group["params"]]} for group in saved.groups],
        {new[name]: shape for name, shape in saved.shapes.items() if name in new},
        saved.shared,
    )


def _records(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ParameterInfo]:
    dtype = DType.of("F32")
    return {name: file_tensor(name, shape, dtype, 0, 0, "", 0, 0) for name, shape in shapes.items()}


def _check_kind(saved: OptimizerState, optimizer: torch.optim.Optimizer) -> None:
    """Refuse the state of another kind of optimizer: its keys would be met by code that knows others."""
    module, _, name = saved.optimizer.rpartition(".")
    if not name or name == type(optimizer).__name__:
        return
    other = getattr(sys.modules.get(module), name, None)
    if isinstance(other, type) and (issubclass(other, type(optimizer)) or isinstance(optimizer, other)):
        return  # AdamW is an Adam
    raise MismatchError(
        f"the state is that of {saved.optimizer}, and the optimizer is a {class_name(optimizer)}",
        hint="start it anew: one cannot go on with what the other remembers",
    )


# --- matching -------------------------------------------------------------------------------------


def _match(saved: OptimizerState, own: _Own, options: Sequence[Mapping[str, Any]]) -> Coverage:
    saved_with = {name: group for group in saved.groups for name in group["params"]}
    loaded: list[Item] = []
    mismatched: list[Item] = []
    missing: list[str] = []
    groups = zip(options, own.optimizer.param_groups, strict=True)
    option_of = {id(p): chosen for chosen, group in groups for p in group["params"]}
    for name, parameter in zip(own.names, own.parameters, strict=True):
        if name not in saved_with:
            missing.append(name)
            continue
        why = _problem(saved, name, parameter, option_of[id(parameter)], saved_with[name], own.optimizer)
        (mismatched if why else loaded).append(Item(name, name, why))
    unexpected = [name for name in saved.names if name not in own.by_name]
    kind = type(own.optimizer).__name__
    return Coverage(
        f"{kind} of {own.source.label}",
        f"{saved.optimizer.rpartition('.')[2] or 'optimizer'} state",
        grouped(loaded),
        grouped(Item(name, nearest=_near(name, unexpected, i)) for i, name in enumerate(missing)),
        grouped(
            Item(name, name, _absence(name, own), _near(name, missing, i) if name not in own.model else None)
            for i, name in enumerate(unexpected)
        ),
        grouped(mismatched),
    )


def _near(name: str, names: list[str], place: int) -> str | None:
    return next(iter(nearest(name, names, 1)), None) if place < _CANDIDATES else None


def _absence(name: str, own: _Own) -> str:
    if name not in own.model:
        return ""
    return "in no group" if own.model[name].requires_grad else "frozen, and in no group"


def _problem(
    saved: OptimizerState,
    name: str,
    parameter: torch.Tensor,
    options: Mapping[str, Any],
    saved_with: Mapping[str, Any],
    optimizer: object,
) -> str:
    import torch

    shape = tuple(parameter.shape)
    if saved.shapes.get(name, shape) != shape:
        return f"saved for shape {human_shape(saved.shapes[name])}, not {human_shape(shape)}"
    state = saved.state.get(name, {})
    if name not in saved.shapes:
        for key, value in state.items():
            if key in _ELEMENTWISE and isinstance(value, torch.Tensor) and value.dim() and tuple(value.shape) != shape:
                return f"its {key} is of shape {human_shape(tuple(value.shape))}, not {human_shape(shape)}"
    for option, key in _NEEDED.items():
        # SGD makes its buffer whenever there is none.
        switched_on = options.get(option) and not saved_with.get(option)
        if state and switched_on and key not in state and not isinstance(optimizer, torch.optim.SGD):
            return f"saved without {option}, which needs {key}"
    return ""


def _options(saved: OptimizerState, own: _Own, restore: bool) -> list[dict[str, Any]]:
    """The options of each group: those that it has, or those that were saved."""
    current = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in own.optimizer.param_groups
    ]
    if not restore:
        return current
    of_name = {name: i for i, group in enumerate(saved.groups) for name in group["params"]}
    names = iter(own.names)
    chosen = []
    for place, (options, group) in enumerate(zip(current, own.optimizer.param_groups, strict=True)):
        mine = [next(names) for _ in group["params"]]
        origins = list(dict.fromkeys(of_name[name] for name in mine if name in of_name))
        found = [
            {key: value for key, value in saved.groups[i].items() if key not in ("params", "param_names")}
            for i in origins
        ]
        for i, other in zip(origins, found, strict=True):
            key = next((key for key in found[0] if other.get(key) != found[0][key]), None)
            if key is not None:
                raise MismatchError(
                    f"the parameters of group {place} were in the groups {origins[0]} and {i}, "
                    f"whose {key} was {found[0][key]!r} and {other.get(key)!r}",
                    hint="group the parameters as they were, or leave options out and set them",
                )
        chosen.append({**options, **(found[0] if found else {})})
    return chosen


def _copied(value: Any) -> Any:
    """A copy whose tensors share memory with nothing: the state of two optimizers must not be one."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)
