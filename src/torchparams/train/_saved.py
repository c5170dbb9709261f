"""Parser for saved optimizer states in all supported forms."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torchparams.errors import MismatchError, UnsupportedSource
from torchparams.render.tree import listed, plural
from torchparams.sources.live.module import ModuleSource
from torchparams.train._placeholders import copied
from torchparams.train.optimizer import FLAT, OptimizerState, real_shape, split_flat
from torchparams.train.optimizer_file import read_optimizer_file


def parsed(x: Any, names: Sequence[str] | None, source: ModuleSource) -> OptimizerState:
    """Parse a saved optimizer state into state by parameter name.

    Args:
        x: Any form that `load_optimizer_state` accepts.
        names: Names of the parameters, for a state that identifies them by position.
        source: The model.

    Raises:
        UnsupportedSource: `x` is not an optimizer state, or has no names.
        MismatchError: The names do not match the state.
    """
    if isinstance(x, OptimizerState):
        return x
    if isinstance(x, str | os.PathLike):
        x = read_optimizer_file(os.fspath(x))
    if isinstance(x, Mapping) and set(x) == {"optimizers"}:
        x = x["optimizers"]
    if isinstance(x, list | tuple) and x:
        if names is not None and len(x) > 1:
            raise UnsupportedSource(
                "names= works for one optimizer, and this is the state of several",
                hint="load the state of each optimizer separately",
            )
        return OptimizerState.of_parts([parsed(part, names, source) for part in x])
    if not isinstance(x, Mapping) or "state" not in x or "param_groups" not in x:
        raise UnsupportedSource(
            f"a {type(x).__name__} is not an optimizer state",
            exists="a state is an OptimizerState, or a state_dict with the keys state and param_groups",
            hint=_hint(x),
        )
    if not _is_laid_out(x):
        raise UnsupportedSource(
            "the optimizer state is malformed",
            exists="it needs a mapping under state, and a list of mappings with params under param_groups",
        )
    groups = [copied(dict(group)) for group in x["param_groups"]]
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
        # Torch's LBFGS keeps vectors over all parameters, under the first parameter.
        flat = copied(next(value for value in state.values() if _is_flat(value)))
        model = ModuleSource(source.module).keys()
        found = {name: source.resolve(name) for name in called.values() if source.takes(name)}
        shapes = {name: real_shape(model[canonical]) for name, canonical in found.items() if canonical in model}
        if len(shapes) < len(called):
            raise MismatchError(
                "LBFGS keeps vectors over all its parameters, and the model lacks some of them",
                exists=f"it lacks {listed(name for name in called.values() if name not in shapes)}",
                hint="save torchparams.optimizer_state(model, optimizer).state_dict(), which splits them by name",
            )
        state = split_flat(flat, shapes)
        shared |= {key: value for key, value in flat.items() if key not in FLAT}
    shapes_saved = {name: tuple(shape) for name, shape in (x.get("shapes") or {}).items()}
    ours = ("optimizer", "state", "param_groups", "shapes", "shared", "extra")
    # Further keys of an optimizer's state_dict, and those kept by earlier parsing.
    extra = {**{key: value for key, value in x.items() if key not in ours}, **(x.get("extra") or {})}
    return OptimizerState(str(x.get("optimizer") or ""), state, groups, shapes_saved, shared, extra)


def _is_laid_out(x: Mapping[Any, Any]) -> bool:
    state, groups = x["state"], x["param_groups"]
    return (
        isinstance(state, Mapping)
        and isinstance(groups, list | tuple)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups)
        and all(isinstance(key, str | int) for group in groups for key in group["params"])
        and all(isinstance(state[key], Mapping) for group in groups for key in group["params"] if key in state)
        and all(isinstance(x.get(key) or {}, Mapping) for key in ("shapes", "shared", "extra"))
    )


def _is_flat(value: Mapping[str, Any]) -> bool:
    flat = value.get("prev_flat_grad")
    return flat is not None and flat.dim() == 1 and "old_dirs" in value


def _names_of(groups: list[dict[str, Any]], keys: list[Any], names: Sequence[str] | None) -> list[str]:
    if names is None:
        if not all("param_names" in group for group in groups):
            raise UnsupportedSource(
                "the state identifies its parameters by position and has no names",
                hint="pass names=, the names of the parameters in the optimizer's order: "
                "list(dict(model.named_parameters())) of the original model, if the optimizer got model.parameters()",
            )
        names = [name for group in groups for name in group["param_names"]]
    if len(names) != len(keys) or len(set(names)) != len(names):
        raise MismatchError(
            f"there are {plural(len(set(names)), 'name')} for {plural(len(keys), 'parameter')}",
            hint="pass one name for each parameter of the optimizer, in its order",
        )
    return list(names)


def _hint(x: Any) -> str | None:
    if isinstance(x, Mapping):
        inside = [key for key, value in x.items() if isinstance(value, Mapping) and "param_groups" in value]
        return f"pass what is under {inside[0]!r} in it" if inside else None
    return "pass its state_dict()" if hasattr(x, "state_dict") else None
