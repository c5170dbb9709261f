"""Optimizers as their `state_dict()` shows them: by parameter name, and through wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, UnsupportedSource, shorten
from torchparams.render.tree import listed, plural

if TYPE_CHECKING:
    import torch

    from torchparams.sources.live.module import ModuleSource

NO_OPTIONS = ("params", "param_names")
"""Keys of a group that are not options."""


class Own:
    """Optimizer of a model, by parameter name.

    Attributes:
        source: The model.
        optimizer: The given optimizer, possibly a wrapper.
        kind: The optimizer that owns the groups: the inner one for `accelerate`'s wrapper and `Lookahead`.
        saved: Its `state_dict()`.
        keys: Keys of the parameters in `saved`.
        parameters: The parameters, in the order of the groups.
        names: Their names, in the same order.
        by_name: Name → parameter.
        model: Name → parameter of the whole model.

    Raises:
        MismatchError: The optimizer holds tensors that are not parameters of the model.
        UnsupportedSource: It is not an optimizer, or its `state_dict()` cannot be matched by name.
    """

    def __init__(self, source: ModuleSource, optimizer: Any) -> None:
        from torchparams.sources.live.module import ModuleSource

        refuse_no_optimizer(optimizer)
        self.source = source
        self.optimizer = optimizer
        self.all = list(_optimizers(optimizer))
        self.kind = self._kind()
        self.model = ModuleSource(source.module).keys()
        known = {id(tensor): name for name, tensor in self.model.items()}
        self._refuse_strangers(known)
        self.parameters: list[torch.Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.names = [known[id(p)] for p in self.parameters]
        self.by_name = dict(zip(self.names, self.parameters, strict=True))
        self.saved = self._state_dict()
        self.keys = [key for group in self.saved["param_groups"] for key in group["params"]]
        self._refuse_hidden_state()

    # --- what it is ------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Class name without its module."""
        return type(self.optimizer).__name__

    @property
    def class_name(self) -> str:
        """Class of the innermost optimizer, with its module."""
        return class_name(self.kind)

    @property
    def wrapped(self) -> bool:
        """True if the optimizer wraps the one that steps."""
        return self.kind is not self.optimizer

    def _kind(self) -> Any:
        groups = list(map(id, self.optimizer.param_groups))
        found = self.optimizer
        for inner in self.all:
            if list(map(id, inner.param_groups)) == groups:
                found = inner
        return found

    def is_option(self, key: str) -> bool:
        """True if a key of a group is an option: a default that a constructor accepts.

        All other keys of a group are state, such as a step counter.
        """
        return any(key in optimizer.defaults for optimizer in self.all) and any(
            taken is None or key in taken for taken in map(_arguments, map(type, self.all))
        )

    # --- names -----------------------------------------------------------------------------------

    def canonical(self, name: str) -> str:
        """Canonical form of a name; unknown names are returned unchanged."""
        if name in self.model:
            return name
        return self.source.resolve(name) if self.source.takes(name) else name

    def has(self, name: str) -> bool:
        """True if the name, in any spelling, is that of a parameter of the model."""
        return self.canonical(name) in self.model

    def _refuse_strangers(self, known: Mapping[int, str]) -> None:
        strangers = [
            (i, p) for i, group in enumerate(self.optimizer.param_groups) for p in group["params"] if id(p) not in known
        ]
        if strangers:
            i, first = strangers[0]
            raise MismatchError(
                f"the optimizer holds {plural(len(strangers), 'tensor')} that the model does not: "
                f"the first is of shape {list(first.shape)}, in group {i}",
                where=self.source.label,
                hint="pass the model that the optimizer was made of; "
                "if parameters were replaced since, make a new optimizer",
            )

    # --- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Name → state of the parameter, for parameters with state."""
        state = self.saved["state"]
        return {name: state[key] for name, key in zip(self.names, self.keys, strict=True) if key in state}

    def _state_dict(self) -> dict[str, Any]:
        try:
            saved = self.optimizer.state_dict()
        except Exception as error:
            raise UnsupportedSource(
                f"the state_dict() of {self.label} failed: {shorten(str(error), 200)}", where=self.source.label
            ) from error
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if not isinstance(saved, Mapping) or not isinstance(saved.get("state"), Mapping):
            raise UnsupportedSource(
                f"the state_dict() of {self.label} has no state by parameter",
                where=self.source.label,
                exists=f"its keys are {listed(map(str, saved))}" if isinstance(saved, Mapping) else None,
                hint="pass the optimizer inside it" if len(self.all) > 1 else None,
            )
        if [len(group["params"]) for group in saved.get("param_groups", ())] != sizes:
            raise UnsupportedSource(
                f"the state_dict() of {self.label} and the optimizer have different groups", where=self.source.label
            )
        return dict(saved)

    def _refuse_hidden_state(self) -> None:
        """Refuse a wrapper whose `state_dict()` leaves out state of its inner optimizer."""
        key_of = {id(p): key for p, key in zip(self.parameters, self.keys, strict=True)}
        state = self.saved["state"]
        for inner in self.all[1:]:
            for parameter, values in inner.state.items():
                shown = leaf_keys(state.get(key_of.get(id(parameter)), {}))
                left_out = leaf_keys(values) - shown
                if left_out:
                    raise UnsupportedSource(
                        f"the state_dict() of {self.label} leaves out state of the {type(inner).__name__} inside it: "
                        f"{listed(sorted(left_out))}",
                        where=self.source.label,
                        hint="pass the optimizer inside it",
                    )


def refuse_no_optimizer(optimizer: object) -> None:
    """Refuse an object that is not an optimizer, such as a `state_dict`.

    Raises:
        UnsupportedSource: It has no `param_groups` and `state`.
    """
    if not _is_optimizer(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        raise UnsupportedSource(
            f"a {type(optimizer).__name__} is not an optimizer",
            exists="an optimizer has param_groups and a state",
            hint="pass its optimizer: scheduler.optimizer"
            if _is_optimizer(inner)
            else "pass the model, then the optimizer itself",
        )


def class_name(optimizer: object) -> str:
    """Class name of an optimizer, with its module."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _is_optimizer(x: object) -> bool:
    return all(hasattr(x, name) for name in ("param_groups", "state", "state_dict", "load_state_dict"))


def _optimizers(optimizer: Any) -> Iterator[Any]:
    """The optimizer and all optimizers inside it, outermost first."""
    waiting, seen = [optimizer], {id(optimizer)}
    for found in waiting:
        yield found
        for value in vars(found).values():
            inside = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            for inner in inside:
                if id(inner) not in seen and not isinstance(inner, type) and _is_optimizer(inner):
                    seen.add(id(inner))
                    waiting.append(inner)


def _arguments(kind: type) -> frozenset[str] | None:
    """Parameter names of a class's constructors; None if unknown."""
    import torch

    names: set[str] = set()
    for base in kind.__mro__:
        if base in (torch.optim.Optimizer, object) or "__init__" not in vars(base):
            continue
        try:
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        except (TypeError, ValueError):
            return None
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return None
        names.update(parameter.name for parameter in parameters)
    return frozenset(names)


def leaf_keys(values: Any) -> frozenset[str]:
    """Keys of all leaves, at any depth: bitsandbytes nests its state in a mapping.

    >>> sorted(leaf_keys({"step": 1, "packed": {"state1": 2}}))
    ['state1', 'step']
    """
    found: set[str] = set()
    for key, value in values.items() if isinstance(values, Mapping) else ():
        found |= leaf_keys(value) if isinstance(value, Mapping) and value else {str(key)}
    return frozenset(found)


class Snapshot:
    """State of optimizers at one moment; refers to the tensors without copying them."""

    def __init__(self, owns: Sequence[Own]) -> None:
        self._held = [
            (
                optimizer,
                dict(vars(optimizer)),
                optimizer.state,
                dict(optimizer.state),
                {id(values): (values, dict(values)) for values in optimizer.state.values() if isinstance(values, dict)},
                optimizer.param_groups,
                [(group, dict(group)) for group in optimizer.param_groups],
            )
            for own in owns
            for optimizer in own.all
        ]

    def restore(self) -> None:
        """Restore the state."""
        for optimizer, attributes, state, entries, values, groups, options in self._held:
            vars(optimizer).clear()
            vars(optimizer).update(attributes)
            state.clear()
            state.update(entries)
            for mapping, content in values.values():
                mapping.clear()
                mapping.update(content)
            groups[:] = [group for group, _ in options]
            for group, content in options:
                group.clear()
                group.update(content)
