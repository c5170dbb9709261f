"""Load optimizer state by parameter name; parameters may be reordered, frozen, removed or new."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.errors import MismatchError, UnsupportedSource, nearest, shorten
from torchparams.info import ParameterInfo, file_tensor
from torchparams.proposals import propose
from torchparams.renames import Renames
from torchparams.render.tree import human_shape, listed, plural
from torchparams.train._live import live_table
from torchparams.train._needed import Needs
from torchparams.train._optimizers import NO_OPTIONS, Own, Snapshot, class_name, leaf_keys
from torchparams.train._placeholders import copied
from torchparams.train._saved import parsed
from torchparams.train._shards import refuse_flat_state
from torchparams.train._state_shards import meet_to_reshard, reshard
from torchparams.train.coverage import Coverage, Item, grouped, strict_kinds
from torchparams.train.optimizer import OptimizerState, join_flat

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import torch

_SCHEDULED = frozenset(("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"))
"""Keys that learning rate schedulers put into groups."""

_ELEMENTWISE = frozenset(
    (
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum"),
        *("exp_inf", "prev", "step_size", "ax"),
    )
)
"""Keys of torch's optimizers whose tensors have the shape of the parameter."""

_CANDIDATES = 16  # names of each kind compared by spelling


def load_optimizer_state(
    model: Any,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    x: Any,
    *,
    names: Sequence[str] | None = None,
    rename: object = None,
    options: bool = False,
    strict: bool | Collection[str] = True,
) -> Coverage:
    """Load saved state into an optimizer, by parameter name.

    The model may have its parameters in a different order or in different groups, with frozen, removed or new ones. A
    parameter without saved state keeps its current state. Values are copied, and loaded by
    `optimizer.load_state_dict`, with its casts. If `strict` refuses a mismatch, nothing is changed; if
    `load_state_dict` fails, the optimizer is restored.

    State of sharded parameters (DTensors) is sharded as they are, whatever ranks saved it. From a file, each rank reads
    its own part of each tensor, without communication. For DTensors in memory that are sharded in another way than the
    parameter, all ranks make the call: they meet, and send each other the elements, without collectives. The state of
    an optimizer over FSDP1's flat parameter is refused.

    An option is a key of `optimizer.defaults` that the constructor accepts. All other keys of a group, such as a step
    counter, are state and are loaded too.

    Args:
        model: The model whose parameters the optimizer trains. A table means its whole model.
        optimizer: The optimizer, or a list of optimizers with disjoint parameters.
        x: An `OptimizerState`, its `state_dict()`, a state by name from `torch.distributed.checkpoint`, or the
            `state_dict()` of an optimizer with `param_names` in its groups (see `torchparams.groups`); a list of
            these, one for each optimizer, in any order; or the path of a file with one, written by `torchparams.save`
            or `torch.save`, with `#key` for a state inside a checkpoint; or the directory of a distributed checkpoint,
            with `#optimizer` for a state under that name.
        names: For the `state_dict()` of an optimizer without `param_names`, the names of its parameters in the
            optimizer's order. They are never guessed.
        rename: Map from saved names to the model's names: any form that `torchparams.renames` accepts, or `"auto"` for
            the prefixes that make most names match. Tensors are never paired by their shape.
        options: Restore the options of the groups too, such as `lr`. If the parameters of a group were in several
            groups, their options must agree.
        strict: True to refuse missing, unexpected and mismatched state; False to load the state that fits; or the kinds
            to refuse, as in `("mismatched",)`.

    Returns:
        The coverage: loaded state by parameter name, and mismatches.

    Raises:
        MismatchError: There is a mismatch that `strict` refuses, no state fits, or the state is from a different kind
            of optimizer or lacks keys that this one needs. Nothing is changed.
        UnsupportedSource: `x` is not an optimizer state, or has no names.

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
    strict_kinds(strict)
    source, _ = live_table(model, "torchparams.load_optimizer_state")
    refuse_flat_state(source)
    owns = [Own(source, one) for one in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])]
    if not owns:
        raise UnsupportedSource("the list of optimizers is empty", where=source.label)
    _refuse_twice(owns)
    saved = _renamed(parsed(x, names, source), rename, owns)
    planned = []
    for own in owns:
        part = _part(saved, own, alone=len(owns) == 1)
        _check_kind(part, own.kind)
        chosen = _options(part, own, options)
        planned.append(_Planned(own, part, chosen, _match(part, own, chosen)))
    coverage = _coverage(saved, planned)
    coverage.refuse(strict, lambda: _way_out(coverage))
    if not coverage.loaded and any(own.names for own in owns):
        coverage.refuse(("mismatched",), lambda: _way_out(coverage))
        raise MismatchError(
            "none of the state fits the optimizer",
            where=f"{coverage.source} → {coverage.model}",
            exists=f"it is of {listed(saved.names) or 'no parameters'}; the optimizer has "
            f"{listed(name for own in owns for name in own.names)}",
            hint='rename="auto" finds the prefixes that wrappers add',
        )
    meet_to_reshard((state for plan in planned for state in plan.states()), coverage.model)
    payloads = [plan.payload(coverage) for plan in planned]
    before = Snapshot(owns)
    try:
        for plan, payload in zip(planned, payloads, strict=True):
            plan.load(payload)
    except BaseException:
        before.restore()
        raise
    return coverage


@dataclass
class _Planned:
    """State to load into one optimizer."""

    own: Own
    saved: OptimizerState
    options: list[dict[str, Any]]
    matched: Coverage

    def states(self) -> Iterator[tuple[str, Any, Any, Any]]:
        """Name, saved state, parameter and current state of each parameter that is loaded."""
        current = self.own.saved["state"]
        for key, name in zip(self.own.keys, self.own.names, strict=True):
            if name in self.matched.loaded and name in self.saved.state:
                yield name, self.saved.state[name], self.own.by_name[name], current.get(key)

    def payload(self, coverage: Coverage) -> dict[str, Any]:
        """Argument for its `load_state_dict`."""
        import torch

        own, saved = self.own, self.saved
        if isinstance(own.kind, torch.optim.LBFGS):
            if not self.matched.complete:
                wrong = [*self.matched.missing, *self.matched.unexpected, *self.matched.mismatched]
                raise MismatchError(
                    "LBFGS keeps one state for all parameters together, and the parameters differ",
                    where=f"{coverage.source} → {coverage.model}",
                    exists=f"{listed(wrong)} differ",
                    hint="start without the saved state",
                )
            joined = {**copied(saved.shared), **join_flat(copied(saved.state), own.names)}
            state: dict[Any, Any] = {own.keys[0]: joined} if joined else {}
        else:
            state = {key: copied(value) for key, value in saved.shared.items()}
            current = own.saved["state"]
            for key, name in zip(own.keys, own.names, strict=True):
                if name in self.matched.loaded:
                    if name in saved.state:
                        parameter, now = own.by_name[name], current.get(key)
                        state[key] = reshard(saved.state[name], parameter, now, name, coverage.model)
                elif key in current:
                    state[key] = current[key]
        groups = [
            {**copied(given), **{key: group[key] for key in NO_OPTIONS if key in group}}
            for given, group in zip(self.options, own.saved["param_groups"], strict=True)
        ]
        return {**own.saved, **copied(saved.extra), "state": state, "param_groups": groups}

    def load(self, payload: dict[str, Any]) -> None:
        """Load the state, and check that the optimizer holds it.

        Raises:
            MismatchError: The optimizer refuses the state, or does not hold it afterwards.
        """
        own = self.own
        given = {key: leaf_keys(values) for key, values in payload["state"].items()}
        try:
            own.optimizer.load_state_dict(payload)
        except Exception as error:
            said = shorten(f"{type(error).__name__}: {error}", 200)
            raise MismatchError(
                f"load_state_dict() of {own.label} refused the state: {said}",
                where=own.source.label,
                exists="the optimizer was restored",
            ) from error
        for key, parameter, name in zip(own.keys, own.parameters, own.names, strict=True):
            lost = given.get(key, frozenset()) - leaf_keys(own.kind.state.get(parameter, {}))
            if lost:
                raise MismatchError(
                    f"load_state_dict() of {own.label} did not load {listed(sorted(lost))} of {name!r}",
                    where=own.source.label,
                    exists="the optimizer was restored",
                    hint="load into the optimizer inside it" if own.wrapped else None,
                )


def _refuse_twice(owns: Sequence[Own]) -> None:
    twice = [name for name, count in Counter(name for own in owns for name in own.names).items() if count > 1]
    if twice:
        raise MismatchError(
            f"{plural(len(twice), 'parameter is', 'parameters are')} in two of the optimizers: {listed(twice)}",
            hint="load each optimizer separately",
        )


def _way_out(coverage: Coverage) -> str | None:
    if any("saved without" in item.note for item in coverage.mismatched.values()):
        return "options=True restores the options that it was saved with"
    return "strict=False loads what fits" if coverage.loaded else None


# --- saved state ----------------------------------------------------------------------------------


def _renamed(saved: OptimizerState, rename: object, owns: Sequence[Own]) -> OptimizerState:
    """The state under the model's names."""
    names, own = saved.names, owns[0]
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
    return OptimizerState.of_parts([_under(part, new) for part in saved.parts or (saved,)])


def _under(saved: OptimizerState, new: Mapping[str, str]) -> OptimizerState:
    return OptimizerState(
        saved.optimizer,
        {new[name]: values for name, values in saved.state.items()},
        [{**group, "params": [new[name] for name in group["params"]]} for group in saved.groups],
        {new[name]: shape for name, shape in saved.shapes.items() if name in new},
        saved.shared,
        saved.extra,
    )


def _part(saved: OptimizerState, own: Own, alone: bool) -> OptimizerState:
    """Saved state for the parameters of one optimizer.

    Raises:
        MismatchError: The parameters were in several optimizers, whose state cannot be combined.
    """
    if alone and not saved.parts:
        return saved
    held = [part for part in saved.parts or (saved,) if any(name in own.by_name for name in part.names)]
    if not held:
        return OptimizerState("", {}, [], {})
    if len({part.optimizer for part in held}) > 1 or (len(held) > 1 and any(p.shared or p.extra for p in held)):
        raise MismatchError(
            f"the parameters of one {own.label} were in several optimizers: "
            f"{', '.join(part.optimizer or 'one without a name' for part in held)}",
            where=own.source.label,
            hint="group the parameters as they were",
        )
    if len(held) == 1:
        return held[0]
    whole = OptimizerState.of_parts(held)
    return OptimizerState(held[0].optimizer, whole.state, whole.groups, whole.shapes)


def _records(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ParameterInfo]:
    dtype = DType.of("F32")
    return {name: file_tensor(name, shape, dtype, 0, 0, "", 0, 0) for name, shape in shapes.items()}


def _check_kind(saved: OptimizerState, optimizer: object) -> None:
    """Refuse the state of a different kind of optimizer, whose keys have a different meaning."""
    module, _, name = saved.optimizer.rpartition(".")
    if not name or saved.optimizer == class_name(optimizer):
        return
    other = getattr(sys.modules.get(module), name, None)
    if isinstance(other, type):
        if issubclass(other, type(optimizer)) or isinstance(optimizer, other):
            return  # AdamW is an Adam
    elif name == type(optimizer).__name__:
        return  # the class was moved, or has the same name as another: the keys are checked later
    raise MismatchError(
        f"the state is from {saved.optimizer}, and the optimizer is a {class_name(optimizer)}",
        hint="start without the saved state: the two kinds are incompatible",
    )


# --- matching -------------------------------------------------------------------------------------


def _match(saved: OptimizerState, own: Own, options: Sequence[Mapping[str, Any]]) -> Coverage:
    """Coverage of one optimizer; `unexpected` has the parameters that it lacks."""
    saved_with = {name: group for group in saved.groups for name in group["params"]}
    needs = Needs(own, named=bool(saved.optimizer))
    loaded: list[Item] = []
    mismatched: list[Item] = []
    groups = zip(options, own.optimizer.param_groups, strict=True)
    option_of = {id(p): chosen for chosen, group in groups for p in group["params"]}
    for name, parameter in zip(own.names, own.parameters, strict=True):
        if name in saved_with:
            why = _problem(saved, name, parameter, option_of[id(parameter)], saved_with[name], needs)
            (mismatched if why else loaded).append(Item(name, name, why))
    missing = [Item(name) for name in own.names if name not in saved_with]
    unexpected = [Item(name, name) for name in saved.names if name not in own.by_name]
    notes: tuple[str, ...] = ()
    if not saved.optimizer and saved.state and not needs.known:
        notes = (
            f"The state does not name its optimizer, and {own.label} has not stepped yet: whether it is its state was "
            "not checked.",
        )
    return Coverage(
        own.label,
        saved.label,
        grouped(loaded),
        grouped(missing),
        grouped(unexpected),
        grouped(mismatched),
        notes=notes,
    )


def _coverage(saved: OptimizerState, planned: Sequence[_Planned]) -> Coverage:
    """Coverage of all optimizers together."""
    owns = [plan.own for plan in planned]
    mine = {name for own in owns for name in own.names}
    missing = [name for plan in planned for name in plan.matched.missing]
    unexpected = [name for name in saved.names if name not in mine]
    labels = ", ".join(dict.fromkeys(own.label for own in owns))
    return Coverage(
        f"{labels} of {owns[0].source.label}",
        f"{saved.label or 'optimizer'} state",
        grouped(item for plan in planned for item in plan.matched.loaded.values()),
        grouped(Item(name, nearest=_near(name, unexpected, i)) for i, name in enumerate(missing)),
        grouped(
            Item(name, name, _absence(name, owns[0]), None if name in owns[0].model else _near(name, missing, i))
            for i, name in enumerate(unexpected)
        ),
        grouped(item for plan in planned for item in plan.matched.mismatched.values()),
        notes=tuple(dict.fromkeys(note for plan in planned for note in plan.matched.notes)),
    )


def _near(name: str, names: list[str], place: int) -> str | None:
    return next(iter(nearest(name, names, 1)), None) if place < _CANDIDATES else None


def _absence(name: str, own: Own) -> str:
    if name not in own.model:
        return ""
    return "in no group" if own.model[name].requires_grad else "frozen, and in no group"


def _problem(
    saved: OptimizerState,
    name: str,
    parameter: torch.Tensor,
    options: Mapping[str, Any],
    saved_with: Mapping[str, Any],
    needs: Needs,
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
    return needs.problem(state, parameter, options, saved_with)


def _options(saved: OptimizerState, own: Own, restore: bool) -> list[dict[str, Any]]:
    """Saved state of each group, with its current or its saved options."""
    of_name = {name: i for i, group in enumerate(saved.groups) for name in group["params"]}
    names = iter(own.names)
    chosen = []
    for place, group in enumerate(own.saved["param_groups"]):
        mine = [next(names) for _ in group["params"]]
        options = {key: value for key, value in group.items() if key not in NO_OPTIONS}
        origins = list(dict.fromkeys(of_name[name] for name in mine if name in of_name))
        for key in dict.fromkeys(key for i in origins for key in saved.groups[i] if key not in NO_OPTIONS):
            values = [(i, saved.groups[i].get(key)) for i in origins]
            first, value = values[0]
            other = next(((i, v) for i, v in values if not _same(v, value)), None)
            if not restore:
                if own.is_option(key):
                    continue
                # Keys of a scheduler belong to the rate, and text is a label: both stay those of the new run.
                if (key in _SCHEDULED or isinstance(value, str)) and (key in options or other):
                    continue
            if other is not None:
                raise MismatchError(
                    f"the parameters of group {place} were in the groups {first} and {other[0]}, "
                    f"whose {key} was {value!r} and {other[1]!r}",
                    hint="group the parameters as they were, or leave options out and set them"
                    if own.is_option(key)
                    else "group the parameters as they were",
                )
            options[key] = value
        chosen.append(options)
    return chosen


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool((a == b.to(a.device)).all())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
