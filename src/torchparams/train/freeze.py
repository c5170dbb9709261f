"""Freezing: `requires_grad`, the gradients that are left over, and the statistics that would move without them.

A parameter with `requires_grad=False` can still move: an optimizer with momentum or weight decay moves whatever has a
gradient, also an old one. And the running statistics of a normalisation layer are buffers, which its forward pass moves
in training mode, whether its parameters are trained or not. `freeze` stops all three, and takes it back.

**Which statistics stop.** Those of a layer whose parameters are then all frozen, at least one of them by this call.
A layer without parameters of its own (`affine=False`) goes with the nearest module around it that has some. Layers that
are half frozen are still being trained: their statistics go on, and the report says so. A layer counts when it has
running statistics: those of the BatchNorm and InstanceNorm families, anybody's class with a buffer called
`running_mean` or `running_var`, and the power iteration of a spectral norm.

**How they stop.** The layer stays in evaluation mode: it uses its statistics and does not move them. Its `train` is
shadowed by a `StatisticsHold` in the instance, so that `model.train()` passes it by, while copies and pickles of the
model keep what they have. `track_running_stats` is not touched: without it a layer would normalise by the batch.
What makes new layers of the old ones (`convert_sync_batchnorm`, `torch.jit.script`) leaves the holds behind: freeze
what it gives.

**What freezing cannot stop.** LBFGS steps along directions that it keeps of all its parameters together, without a look
at their gradients: made before, it goes on moving what is frozen. Make it anew after freezing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, TorchParamsError, nearest
from torchparams.render.tree import Table, Text, listed, plural
from torchparams.sources.live.tensors import is_leaf
from torchparams.train._change import Change, Steps, shown, which
from torchparams.train._live import Chosen, choose
from torchparams.train._statistics import Layers, hold_on

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def freeze(model: object, selector: object = None, *, statistics: bool = True) -> Frozen:
    """Stop the selected parameters from changing: no gradient, no left-over gradient, no moving statistics.

    Everything happens in place: the parameters stay the same objects, so an optimizer that has them needs no change.
    Only LBFGS has to be made anew: it keeps directions for all its parameters together, and moves frozen ones by them.
    Freeze before wrapping in `DistributedDataParallel`, which decides at its making what it waits for.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one.
        selector: What to freeze, strictly; None is all of `model`. A buffer, which only a table has that is made with
            `buffers=True`, stands for the running statistics of its layer: they stop, whatever else is trained.
        statistics: Also stop the running statistics of normalisation layers that are then wholly frozen.

    Returns:
        What was done; `.undo()`, or leaving a `with` block, takes it back.

    Raises:
        NoMatch: A part of the selector hits nothing.
        TorchParamsError: A selected tensor is the result of an operation, which cannot be frozen. Nothing has changed.

    >>> from torch import nn
    >>> import torchparams as tp
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> frozen = tp.freeze(model, "0.** | 1.**")
    >>> model.train()[1].training, model[2].training
    (False, True)
    >>> print(frozen)
    Sequential: froze 4 tensors
    name      shape   numel  before
    0.weight  [4, 3]     12  trainable
    0.bias    [4]         4  trainable
    1.weight  [4]         4  trainable
    1.bias    [4]         4  trainable
    running statistics stopped in 1 layer: 1
    10 of 34 parameters are trainable, 29.4%
    >>> frozen.undo()
    >>> model[1].training, model[1].weight.requires_grad
    (True, True)
    """
    return _freeze(choose(model, selector, "torchparams.freeze"), None if statistics else ())


def unfreeze(model: object, selector: object = None) -> Unfrozen:
    """Let the selected parameters be trained, and the statistics of their layers move again.

    A layer that `freeze` has stopped gets back the mode that it would have now without it. Parameters that cannot have
    a gradient (integers) are left alone and listed.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one.
        selector: What to unfreeze, strictly; None is all of `model`. Buffers as in `freeze`.

    Returns:
        What was done; `.undo()`, or leaving a `with` block, takes it back.

    Raises:
        NoMatch: A part of the selector hits nothing.

    >>> from torch import nn
    >>> import torchparams as tp
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> frozen = tp.freeze(model)
    >>> with tp.unfreeze(model, "1.**"):
    ...     print([name for name, p in model.named_parameters() if p.requires_grad], model[1].training)
    ['1.weight', '1.bias'] True
    >>> tp.of(model).select(":frozen").numel
    24
    """
    chosen = choose(model, selector, "torchparams.unfreeze")
    steps = Steps(requires_grad=True)
    changed, cannot = [], []
    try:
        for name, parameter in chosen.parameters().items():
            if not (parameter.dtype.is_floating_point or parameter.dtype.is_complex):
                cannot.append(name)
            elif steps.flip(parameter, parameter.grad):
                changed.append(name)
        layers = Layers(chosen)
        released = []
        for name, layer in layers.by_name.items():
            if hold_on(layer) is not None:
                touched, frozen, _ = layers.state(layer)
                if layers.named(layer) or (touched and not frozen):
                    released.append(name)
        for name in released:
            steps.release(layers.by_name[name])
    except BaseException:
        steps.undo()
        raise
    return Unfrozen(chosen, tuple(changed), tuple(released), steps, tuple(cannot))


def _freeze(chosen: Chosen, statistics: Sequence[str] | None) -> Frozen:
    """Freeze, and stop the statistics of the layers that are named so; None: of those that are wholly frozen."""
    for name, parameter in chosen.parameters().items():
        if not is_leaf(parameter):
            raise TorchParamsError(
                f"{name} is the result of an operation, and only a tensor that stands by itself can be frozen",
                where=chosen.source.label,
                hint="freeze the parameters that it is computed from",
            )
    steps = Steps()
    changed, moving = [], []
    try:
        for name, parameter in chosen.parameters().items():
            before = parameter.grad
            if steps.flip(parameter, before):
                changed.append(name)
            if before is not None:
                steps.clear(parameter, before)
        layers = Layers(chosen)
        stopped: list[str] | None = None if statistics is None else list(statistics)
        if stopped is None:
            stopped = []
            for name, layer in layers.by_name.items():
                touched, frozen, own = layers.state(layer)
                if (touched and frozen) or layers.named(layer):
                    stopped.append(name)
                elif touched and own and hold_on(layer) is None:
                    moving.append(name)
        for name in stopped:
            steps.hold(layers.by_name[name])
    except BaseException:
        steps.undo()
        raise
    return Frozen(chosen, tuple(changed), tuple(stopped), steps, tuple(moving))


# --- what was done, and its undoing ---------------------------------------------------------


class Frozen(Change):
    """What `freeze` has done: print it, undo it, or write it down and do it again to another model.

    Attributes:
        label: The model.
        names: The frozen parameters that were selected, by canonical name, in the model's order.
        changed: Those of them that were trainable before.
        statistics: The layers whose running statistics are stopped, by canonical name.
        moving: Layers whose running statistics go on, since only some of their parameters are frozen.
        cleared: Count of left-over gradients that were cleared.
        trainable: Count of elements of the model's trainable parameters, afterwards.
        numel: Count of elements of all its parameters.

    >>> import json
    >>> from torch import nn
    >>> import torchparams as tp
    >>> saved = json.dumps(tp.freeze(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "1.**").to_json())
    >>> fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> tp.Frozen.from_json(json.loads(saved)).apply(fresh).statistics
    ('1',)
    >>> fresh.train()[1].training
    False
    """

    did = "froze"
    before = ("trainable", "frozen")
    statistics_did = "stopped"

    def __init__(
        self,
        chosen: Chosen | None,
        changed: tuple[str, ...],
        statistics: tuple[str, ...],
        steps: Steps,
        moving: tuple[str, ...],
    ) -> None:
        super().__init__(chosen, changed, statistics, steps)
        self.moving = moving
        self._found = False
        self.cleared = len(steps.cleared)

    @classmethod
    def of(cls, model: object) -> Frozen:
        """All that is frozen in `model` now, by whatever means; changes nothing, and has nothing to undo.

        This is what to save with a checkpoint where a model is frozen bit by bit.

        >>> from torch import nn
        >>> import torchparams as tp
        >>> model = nn.Linear(3, 2).requires_grad_(False)
        >>> tp.Frozen.of(model).names
        ('weight', 'bias')
        """
        chosen = choose(model, None, "torchparams.Frozen.of")
        names = tuple(name for name, parameter in chosen.parameters().items() if not parameter.requires_grad)
        chosen = Chosen(chosen.source, chosen.records, names)
        held = tuple(name for name, layer in Layers(chosen).by_name.items() if hold_on(layer) is not None)
        frozen = cls(chosen, (), held, Steps(), ())
        frozen._found = True
        return frozen

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Frozen:
        """What `to_json` wrote: of no model yet, to be given to one by `apply`.

        Args:
            data: The whole of it, or `names` and `statistics` alone.

        Raises:
            MismatchError: It is no such record.
        """
        lists = [data.get(key) for key in ("names", "statistics")] if hasattr(data, "get") else [None]
        for given in lists:
            if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
                raise MismatchError(
                    "this is no record of what was frozen",
                    exists="one has the lists 'names' and 'statistics'",
                    hint="give what Frozen.to_json() returned",
                )
        names, statistics = map(tuple, lists)  # type: ignore[arg-type]  # lists of text, as just seen
        frozen = cls(None, (), statistics, Steps(), ())
        frozen.names = names
        return frozen

    def apply(self, model: object) -> Frozen:
        """Freeze in `model` what is frozen here: the same parameters, and the statistics of the same layers.

        Args:
            model: A live `nn.Module`.

        Returns:
            What was done to `model`, with its own undo.

        Raises:
            MismatchError: `model` lacks some of the parameters or layers. Nothing has changed.
        """
        chosen = choose(model, None, "torchparams.Frozen.apply")
        names = _found(self.names, chosen)
        chosen = Chosen(chosen.source, chosen.records, tuple(name for name in chosen.tensors if name in names))
        layers = Layers(chosen).by_name
        missing = [name for name in self.statistics if name not in layers]
        _refuse_missing(missing, self.statistics, tuple(layers), "layers", chosen)
        return _freeze(chosen, self.statistics)

    def to_json(self) -> dict[str, Any]:
        """What was done, as JSON takes it; `from_json` reads it."""
        return {**super().to_json(), "moving": list(self.moving), "cleared": self.cleared}

    def _title(self) -> str:
        if not self._found:
            return super()._title()
        return f"{self.label}: {plural(len(self.names), 'frozen tensor')}"

    def _notes(self) -> list[Text | Table]:
        notes: list[Text | Table] = []
        if self.moving:
            what = "layer that is half frozen", "layers that are half frozen"
            notes.append(Text(f"running statistics go on in {which(self.moving, *what)}", "warn"))
        if self.cleared:
            notes.append(Text(f"cleared {plural(self.cleared, 'left-over gradient')}"))
        if self._ddp:
            notes.append(Text("DistributedDataParallel still waits for the gradients of what it was made with", "warn"))
        return notes


class Unfrozen(Change):
    """What `unfreeze` has done.

    Attributes:
        label: The model.
        names: The selected parameters, by canonical name, in the model's order.
        changed: Those of them that were frozen before.
        statistics: The layers whose running statistics move again, by canonical name.
        cannot: Selected parameters that cannot have a gradient: integers.
        trainable: Count of elements of the model's trainable parameters, afterwards.
        numel: Count of elements of all its parameters.
    """

    did = "unfroze"
    before = ("frozen", "trainable")
    statistics_did = "move again"

    def __init__(
        self,
        chosen: Chosen,
        changed: tuple[str, ...],
        statistics: tuple[str, ...],
        steps: Steps,
        cannot: tuple[str, ...],
    ) -> None:
        super().__init__(chosen, changed, statistics, steps)
        self.cannot = cannot
        left = frozenset(cannot)
        self.names = tuple(name for name in self.names if name not in left)

    def to_json(self) -> dict[str, Any]:
        """What was done, as JSON takes it."""
        return {**super().to_json(), "cannot": list(self.cannot)}

    def _notes(self) -> list[Text | Table]:
        if not self.cannot:
            return []
        return [Text(f"no gradient is possible for {which(self.cannot, 'parameter')}", "warn")]


def _found(names: Sequence[str], chosen: Chosen) -> frozenset[str]:
    """The canonical names for `names`, which may be those of a model whose ties or wrappers were otherwise."""
    known = list(chosen.tensors)
    other = {spelling: known[row] for row, spelling in (*chosen.records.aliases, *chosen.records.raws)}
    found = {name: name if name in chosen.tensors else other.get(name) for name in names}
    _refuse_missing([n for n, hit in found.items() if hit is None], names, known, "parameters", chosen)
    return frozenset(name for name in found.values() if name is not None)


def _refuse_missing(
    missing: Sequence[str], wanted: Sequence[str], known: Sequence[str], what: str, chosen: Chosen
) -> None:
    if not missing:
        return
    near = nearest(missing[0], known, count=1)
    raise MismatchError(
        f"{len(missing):,} of {len(wanted):,} frozen {what} are not in this model: {listed(shown(missing))}",
        where=chosen.source.label,
        exists=f"the nearest to {missing[0]!r} is {near[0]!r}" if near else None,
        hint="freeze by a selector, or take the missing ones out of the record",
    )
